"""Calls whose decisions were made once: what they allocate, launch and return, with stand-ins for kernels and library."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slidesparse import pack, reference
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Problem, activations, execution, routes
from slidesparse.gemm.backends import cusparselt as backend
from slidesparse.gemm.backends import dense as dense_backend
from slidesparse.gemm.execution import Execution
from slidesparse.gemm.registry import backends
from slidesparse.ops import cusparselt, fused, rescale
from slidesparse.pattern import Pattern
from slidesparse.testing import check_bitwise
from test_sums import made, normed, swiglu, tokens

bind = dense_backend.Dense.bind
SHAPES = [("6:8", 33, 100), ("4:6", 64, 96), ("2:4", 48, 64)]


class Product:
    """In place of a plan of the library: exact products, scaled if there is an alpha, rounded to the output's type."""

    def run(self, q: Tensor, weight: Tensor, alpha: Tensor | None, y: Tensor) -> None:
        sums = q.double() @ weight.double().t()
        y.copy_(sums if alpha is None else sums.float() * alpha)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Python in place of kernels and library; the multiplications that plans are asked for."""
    asked: list[tuple] = []

    def quantize_call(x: Tensor, pattern: Pattern | None, dtype: torch.dtype, offset: int, width: int) -> Callable:
        def call(x: Tensor, q: Tensor, scale: Tensor) -> None:
            values, found = reference.quantize(x, SCHEMES["int8" if dtype == torch.int8 else "fp8"])
            values = values if pattern is None else reference.lift(values, pattern)
            q.view(torch.int8).zero_()
            q[: x.shape[0], : values.shape[1]] = values
            scale.copy_(found)

        return call

    def silu_call(gate_up: Tensor, dtype: torch.dtype, pattern: str, added: tuple, width: int) -> Callable:
        quantize = quantize_call(gate_up, Pattern.parse(pattern) if pattern else None, dtype, 0, width)

        def call(gate_up: Tensor, scale: Tensor, channel: Tensor, bias: Tensor, q: Tensor, out: Tensor) -> None:
            given = [tensor if one is not None else None for one, tensor in zip(added, (scale, channel, bias), strict=True)]
            quantize(fused.silu_mul(gate_up, *given), q, out)

        return call

    def norm_call(x: Tensor, residual: Tensor, eps: float, dtype: torch.dtype, pattern: str, added: tuple, width: int) -> Callable:
        quantize = quantize_call(x, Pattern.parse(pattern) if pattern else None, dtype, 0, width)

        def call(x: Tensor, weight: Tensor, residual: Tensor, *rest: Tensor) -> None:
            *scales, total, q, out = rest
            given = [tensor if one is not None else None for one, tensor in zip(added, scales, strict=True)]
            found, normed = fused.added_norm(x, weight, residual, eps, *given)
            total.copy_(found)
            quantize(normed, q, out)

        return call

    def rescale_call(types: tuple, m: int, n: int, stride: int, tile: None) -> Callable:
        def call(acc: Tensor, y: Tensor, x_scale: Tensor, w_scale: Tensor | None, bias: Tensor | None) -> None:
            given = (acc, y, x_scale, w_scale, bias)
            assert types == tuple(None if tensor is None else tensor.dtype for tensor in given) and acc.stride(0) == stride
            y.copy_(rescale(acc, x_scale, w_scale, bias, y.dtype, m=m, n=n))

        return call

    def known(wanted: tuple) -> Product:
        asked.append(wanted)
        return Product()

    monkeypatch.setattr(activations, "quantize_call", quantize_call)
    monkeypatch.setattr(activations, "silu_call", silu_call)
    monkeypatch.setattr(activations, "norm_call", norm_call)
    monkeypatch.setattr(backend, "rescale_call", rescale_call)
    monkeypatch.setattr(activations, "runs_kernels", lambda device, dtype: True)
    monkeypatch.setattr(cusparselt.plans, "known", known)
    return asked


def multiplications(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Those that the ops make: what a plan must be known for."""
    made: list[tuple] = []

    def sparse_mm(q: Tensor, weight: Tensor, alpha: Tensor | None, n: int, dtype: torch.dtype, algorithm: str) -> Tensor:
        made.append((q.get_device(), n, q.shape[1], q.shape[0], q.dtype, dtype, alpha is not None, algorithm))
        return q.new_zeros((q.shape[0], n), dtype=dtype)

    monkeypatch.setattr(cusparselt, "sparse_mm", sparse_mm)
    return made


def held(weights, dense: Tensor, problem: Problem) -> dict[str, Tensor]:
    """What the backend would keep, its weights slid and padded but not compressed."""
    n, width = backend._padded(problem)
    slid = torch.zeros(n, width, dtype=dense.dtype)
    found = pack.slide(weights.packed)
    slid[: found.shape[0], : found.shape[1]] = found
    resident = {"compressed": slid}
    if problem.scheme.name == "int8":
        resident["alpha"] = torch.nn.functional.pad(weights.channel_scale.view(-1), (0, n - problem.n), value=1.0)
    return resident


@pytest.mark.parametrize("variant", ["", "alg=3", "exact", "exact alg=3,split_k=2"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(("pattern", "n", "k"), SHAPES)
def test_bound_calls_are_the_layer(pattern: str, n: int, k: int, scheme: str, variant: str, asked: list[tuple], monkeypatch) -> None:
    weights, dense = made(n, k, scheme, pattern)
    made_by_ops = multiplications(monkeypatch)
    bias = torch.randn(n).bfloat16()
    problem = weights.problem(torch.bfloat16, torch.device("cpu"), torch.bfloat16)
    resident, sparse = held(weights, dense, problem), backend.CuSparseLt()
    for m in (1, 16, 37, 600):
        x = tokens(m, k + 8)[:, 3 : k + 3]
        q, x_scale = reference.quantize(x, SCHEMES[scheme])
        products = q.double() @ dense.double().t()
        if sparse.gives_sums(variant):
            sums, scale = sparse.bind(problem, x, resident, variant, sums=True).sums(x, resident, weights.channel_scale)
            check_bitwise(scale, x_scale)
            scaled = products.float() * weights.channel_scale.view(1, -1) if scheme == "int8" else products
            check_bitwise(sums.contiguous(), scaled.to(torch.bfloat16))
        y = sparse.bind(problem, x, resident, variant, sums=False).run(x, resident, weights.channel_scale, bias)
        assert y.shape == (m, n) and y.dtype == torch.bfloat16 and y.is_contiguous()
        if variant.startswith("exact"):
            between = products.float()
        else:
            alpha = weights.channel_scale.view(1, -1) if scheme == "int8" else 1
            between = (products.float() * alpha).to(torch.bfloat16).float()
        w_scale = None if scheme == "int8" and not variant.startswith("exact") else weights.channel_scale
        check_bitwise(y, rescale(between, x_scale, w_scale, bias, torch.bfloat16))
        if sparse.gives_sums(variant):
            sparse.sums(problem, x, resident, weights.channel_scale, variant)
        sparse.run(problem, x, resident, weights.channel_scale, bias, variant)
    assert asked == made_by_ops


def test_what_cannot_be_decided_beforehand_is_not(asked: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, dense = made(33, 100, "int8")
    problem = weights.problem(torch.bfloat16, torch.device("cpu"), None)
    resident, sparse, x = held(weights, dense, problem), backend.CuSparseLt(), tokens(4, 100)
    assert sparse.bind(problem, x, resident, "", sums=False) is not None
    assert sparse.bind(problem, x.t().contiguous().t(), resident, "", sums=False) is None
    plain = Problem(33, 100, problem.pattern, SCHEMES["bf16"], "cpu", torch.bfloat16)
    assert sparse.bind(plain, x, resident, "", sums=False) is None
    monkeypatch.setattr(cusparselt.plans, "known", lambda wanted: None)
    assert sparse.bind(problem, x, resident, "", sums=False) is None
    monkeypatch.setattr(activations, "runs_kernels", lambda device, dtype: False)
    assert sparse.bind(problem, x, resident, "", sums=False) is None


@pytest.mark.parametrize("route", ["exact", "padded"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_bound_dense_calls_are_the_layer(scheme: str, route: str, asked: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, dense = made(33, 100, scheme)
    exact = routes.route_named("exact")
    padded = replace(exact, run=lambda problem, q, *rest: exact.run(problem, q[: rest[0].shape[0]], *rest), rows=32)
    monkeypatch.setitem(routes._ROUTES, "padded", padded)
    bias = torch.randn(33).bfloat16()
    problem = weights.problem(torch.bfloat16, torch.device("cpu"), torch.bfloat16)
    resident, one = {"weight": dense}, dense_backend.Dense()
    assert one.bind(problem, tokens(3, 100), resident, route, sums=True) is None  # on a CPU
    on_card = replace(problem, device="cuda")
    for m in (1, 37):
        x = tokens(m, 108)[:, 3:103]
        sums, scale = one.bind(on_card, x, resident, route, sums=True).sums(x, resident, weights.channel_scale)
        for found, expected in zip((sums, scale), one.sums(problem, x, resident, weights.channel_scale, route), strict=True):
            check_bitwise(found, expected)
        y = one.bind(on_card, x, resident, route, sums=False).run(x, resident, weights.channel_scale, bias)
        check_bitwise(y, one.run(problem, x, resident, weights.channel_scale, bias, route))
    assert one.bind(on_card, x.t().contiguous().t(), resident, route, sums=True) is None
    assert one.bind(replace(on_card, scheme=SCHEMES["bf16"]), x, resident, "native", sums=False) is None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("before", [swiglu, normed])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["cusparselt", "dense"])
def test_bound_calls_take_what_stands_in_front_into_the_pass(
    name: str, scheme: str, before: Callable, scaled: bool, asked: list[tuple]
) -> None:
    weights, dense = made(33, 100, scheme)
    problem = weights.problem(torch.bfloat16, torch.device("cpu"), None)
    x = before(5, 100, scaled)
    if name == "dense":
        problem, resident, one, route = replace(problem, device="cuda"), {"weight": dense}, dense_backend.Dense(), "exact"
    else:
        resident, one, route = held(weights, dense, problem), backend.CuSparseLt(), ""
    found = one.bind(problem, x, resident, route, sums=True).sums(x, resident, weights.channel_scale)
    total = x.total.clone() if before is normed else None
    plain = x.computed()
    expected = one.bind(problem, plain, resident, route, sums=True).sums(plain, resident, weights.channel_scale)
    for a, b in zip(found, expected, strict=True):
        check_bitwise(a.contiguous(), b.contiguous())
    assert total is None or total.equal(x.total)
    across = x._replace(**{x._fields[0]: x[0].t().contiguous().t()})
    assert one.bind(problem, across, resident, route, sums=True) is None
    assert len({activations.kind_of(kind) for kind in (x, plain, across, before(5, 100, not scaled))}) == 4


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_a_search_compares_no_rows_that_hold_anything(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that pad the tokens are never written: in fp8 they may be NaN, and no algorithm's results equal those."""
    kind, found = SCHEMES[scheme], []
    problem = Problem(33, 100, Pattern(6, 8), kind, "cpu", torch.bfloat16)
    rows = torch.full((32, 288), -1, dtype=torch.int8).view(kind.dtype)
    monkeypatch.setattr(backend.CuSparseLt, "_activations", staticmethod(lambda problem, x: (rows.clone(), None)))
    monkeypatch.setattr(cusparselt, "search", lambda q, *rest: found.append(q) or [cusparselt.Algorithm(3)])
    assert backend.CuSparseLt().search(problem, tokens(17, 100), {"compressed": rows}, None) == ("alg=3",)
    assert found[0].view(torch.int8)[17:].eq(0).all() and found[0].view(torch.int8)[:17].eq(-1).all()


@pytest.mark.parametrize(("m", "k", "pattern"), [(32, 64, "2:4"), (640, 64, "2:4"), (33, 64, "2:4"), (32, 60, "2:4"), (32, 64, "6:8")])
def test_16_bit_activations_are_copied_only_where_something_moves_or_is_padded(m: int, k: int, pattern: str) -> None:
    problem = Problem(32, k, Pattern.parse(pattern), SCHEMES["bf16"], "cpu", torch.bfloat16)
    wide = torch.randn(m, k + 16).bfloat16()
    odd = torch.empty(m * k + 1, dtype=torch.bfloat16)[1:].view(m, k).copy_(wide[:, :k])  # at no address that the library takes
    for x in (wide[:, :k].contiguous(), wide[:, :k], odd):
        q, scale = backend.CuSparseLt._activations(problem, x)
        as_it_lies = x.is_contiguous() and x is not odd and pattern == "2:4" and k == 64 and m != 33
        assert scale is None and q.is_contiguous() and (q is x) == as_it_lies
        lifted = reference.lift(x.contiguous(), problem.pattern)
        check_bitwise(q[:m, : lifted.shape[1]], lifted)


def test_many_tokens_share_plans() -> None:
    steps = {m: cusparselt.token_step(m) for m in (1, 512, 513, 4096, 4097, 1 << 20)}
    assert steps == {1: 16, 512: 16, 513: 64, 4096: 64, 4097: 128, 1 << 20: 128}
    assert len({-(-m // step) * step for m, step in ((m, cusparselt.token_step(m)) for m in range(1, 32769))}) < 320


def test_a_traced_number_of_tokens_is_one_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(lambda x: x.new_zeros(x.shape[0] // cusparselt.token_step(x.shape[0]), 1), backend=backend, dynamic=True)
    for m in (32, 640, 6400):
        assert len(run(torch.zeros(m, 2))) == m // 16
    assert len(graphs) == 1


class Binding:
    """A backend that counts what it decides, whose results tell what was asked."""

    name, layout = "binding", "packed"

    def __init__(self, offset: int = 0) -> None:
        self.offset, self.bound = offset, 0

    def prepare(self, problem, weights):
        return weights.tensors()

    def run(self, problem, x, resident, scale, bias, variant):
        return x.new_zeros(x.shape[0], problem.n)

    def sums(self, problem, x, resident, scale, variant):
        return self.run(problem, x, resident, None, None, variant), x.new_zeros(x.shape[0], 1)

    def bind(self, problem, x, resident, variant, *, sums):
        self.bound += 1
        result = self.offset + 10 * int(variant) + (2 if sums else 1)

        class Bound:
            def run(self, x, resident, scale, bias):
                assert not sums
                return x.new_full((x.shape[0], problem.n), result)

            def sums(self, x, resident, scale):
                assert sums
                return x.new_full((x.shape[0], problem.n), result), x.new_zeros(x.shape[0], 1)

        return None if x.shape[0] == 7 else Bound()


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Execution]:
    """Layers on one set of weights that run on a backend in a variant, as if on the current CUDA device."""
    weights = made(24, 64, "int8")[0]
    monkeypatch.setattr(execution, "unwatched", lambda x: True)
    monkeypatch.setattr(execution, "current_device", lambda: -1)

    def build(sparse: Binding, variant: str = "1", sums: bool = False) -> Execution:
        monkeypatch.setattr(execution, "named", lambda route, problem, m, sums=False: execution.Choice(sparse, variant))
        layer = Execution(weights, backend="binding", sums=sums)
        layer.prepare(torch.bfloat16, torch.device("cpu"), None)
        return layer

    return build


def test_decisions_are_shared_by_equal_layers_and_kept_apart_otherwise(binding: Callable[..., Execution]) -> None:
    sparse, x = Binding(), torch.randn(5, 64).bfloat16()
    one, other = binding(sparse), binding(sparse)
    for layer in (one, one, other):
        assert layer(x).eq(11).all()
    assert sparse.bound == 1
    for part in (x[:3], torch.randn(5, 80).bfloat16()[:, :64]):
        assert one(part).eq(11).all() and one(part).eq(11).all()
    assert sparse.bound == 3
    second, third, bare = binding(sparse, "2"), binding(Binding(100)), binding(sparse, sums=True)
    assert second(x).eq(21).all() and third(x).eq(111).all() and one(x).eq(11).all()
    assert bare(x).eq(0).all() and bare.sums(x)[0].eq(12).all() and bare(x).eq(0).all()
    seven = torch.randn(7, 64).bfloat16()
    assert one(seven).eq(0).all() and one(seven).eq(0).all()


def test_decisions_are_bounded_and_go_with_their_layers(binding: Callable[..., Execution], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "MOST_DECIDED", 3)
    layer = binding(Binding())
    for m in range(1, 6):
        layer(torch.zeros(m, 64).bfloat16())
    assert len(layer._ready.decided) == 2
    held = weakref.ref(layer._ready.decided)
    del layer
    gc.collect()
    assert held() is None


def test_nothing_is_decided_where_somebody_looks_or_something_does_not_fit(
    binding: Callable[..., Execution], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, layer = torch.randn(5, 64).bfloat16(), binding(Binding())
    weights = layer.weights
    layer.prepare(torch.bfloat16, x.device, torch.bfloat16)
    wide = torch.zeros(48).bfloat16()
    assert (
        layer(x, wide[:1]).eq(0).all()
        and layer(x, wide[:24]).eq(11).all()
        and layer(x, wide[:1]).eq(0).all()
        and layer(x, wide[::2]).eq(0).all()
    )
    assert layer(x).eq(11).all() and layer(x.float()).dtype == torch.float32  # prepared anew
    layer = Execution(weights, backend="binding")
    assert layer(x).eq(11).all()
    monkeypatch.setattr(execution, "current_device", lambda: 0)
    assert layer(x).eq(0).all()
    monkeypatch.setattr(execution, "current_device", lambda: -1)
    monkeypatch.setattr(execution, "unwatched", lambda x: False)
    assert layer(x).eq(0).all()
    bare = binding(Binding(), sums=True)
    with pytest.raises(UnsupportedError, match=r"prepare the layer for torch\.float16"):
        bare.sums(x.half())


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_narrows_no_call(narrow: torch.dtype, asked: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = made(33, 100, "fp8")[0]
    monkeypatch.setattr(execution, "unwatched", lambda x: True)
    monkeypatch.setattr(execution, "current_device", lambda: -1)
    monkeypatch.setattr(
        dense_backend.Dense, "bind", lambda self, problem, *rest, **sums: bind(self, replace(problem, device="cuda"), *rest, **sums)
    )
    x = tokens(5, 100)
    for sums in (False, True):
        layer = Execution(weights, backend="dense:exact", sums=sums)
        layer.prepare(torch.bfloat16, x.device, None)
        call = layer.sums if sums else layer
        want = call(x)
        assert layer._ready.decided
        with torch.autocast("cpu", narrow):
            for _ in range(2):
                for one, expected in zip(call(x) if sums else [call(x)], want if sums else [want], strict=True):
                    check_bitwise(one, expected)


def test_what_a_layer_was_not_made_for_is_refused(binding: Callable[..., Execution]) -> None:
    whole, bare = binding(Binding()), binding(Binding(), sums=True)
    x = torch.randn(5, 64).bfloat16()
    for _ in range(2):
        whole(x), bare.sums(x)
        with pytest.raises(UnsupportedError, match="whole linears was asked for its sums"):
            whole.sums(x)
        for columns in (56, 72):
            for call in (whole, bare.sums):
                with pytest.raises(ValueError, match=f"have {columns} columns, the layer takes 64"):
                    call(torch.randn(5, columns).bfloat16())


def test_backends_say_how_often_they_round() -> None:
    said = {f"{one.name}:{variant}": one.roundings(variant) for one in backends() for variant in ("", "exact", "exact alg=3", "tensorwise")}
    assert said["cusparselt:"] == 2 and said["cusparselt:exact"] == said["cusparselt:exact alg=3"] == 1
    assert said["dense:tensorwise"] == said["restore:tensorwise"] == 2 and said["dense:exact"] == said["reference:"] == 1
