"""Calls that are bound once: with stand-ins for launches and library they are bitwise the ops' and the oracle's, and shared rightly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import stand_ins
from layers import DTYPE, made, normed, oracle, swiglu, tokens
from slidesparse import reference
from slidesparse.errors import UnsupportedError
from slidesparse.gemm import Problem, Runner, Weights, kernels
from slidesparse.gemm.kernels import Pipeline
from slidesparse.gemm.layouts import LAYOUTS, Copy
from slidesparse.ops import cusparselt, prologue
from slidesparse.ops.prologue import Activations
from slidesparse.tolerance import check_bitwise

CPU = torch.device("cpu")
SHAPES = [("6:8", 33, 100), ("4:6", 64, 96), ("2:4", 48, 64)]
SPARSE = [f"slid:cusparselt:{variant}" for variant in ("default", "alg=3", "exact", "exact alg=3,split_k=2")]
DENSE = {"int8": ("triton", "cublaslt", "exact"), "fp8": ("rowwise", "tensorwise", "exact")}
ROUTES = [
    *((scheme, route) for scheme in DENSE for route in SPARSE),
    *((scheme, f"{layout}:{name}") for scheme, names in DENSE.items() for name in names for layout in ("dense", "packed")),
]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The CPU plays a card; the plans that the library was asked for."""
    exact = lambda q, dense: kernels.dense.int_matmul(q, dense) if q.dtype == torch.int8 else (q.double() @ dense.double().t()).float()  # noqa: E731
    monkeypatch.setattr(kernels.dense, "products", exact)
    return stand_ins.pretend_a_card(monkeypatch)


class Bound:
    """A layer on a route, run as `Pipeline` says."""

    def __init__(self, weights: Weights, route: str, bias: Tensor | None = None, dtype: torch.dtype = DTYPE) -> None:
        self.weights, self.bias = weights, bias
        self.problem = weights.problem(dtype, CPU, None if bias is None else bias.dtype)
        self.layout, self.kernel, self.variant = kernels.chosen(route, self.problem, 100)
        self.copy: Copy = LAYOUTS[self.layout].prepare(self.problem, weights)

    def __call__(self, x: Activations, *, direct: bool) -> Tensor:
        call = kernels.kernels()[self.kernel].bind(self.problem, self.layout, self.variant, x, direct=direct)
        assert call.layout == self.layout
        return stand_ins.runner.run(call, x, self.copy, self.weights.channel_scale, self.bias)

    def expected(self, x: Tensor, dense: Tensor) -> Tensor:
        """Rounded once, or where the kernel says twice, to bfloat16 on the way; int8 channels are scaled by then only by the library."""
        if kernels.kernels()[self.kernel].roundings(self.variant) == 1:
            return oracle(x, self.weights, dense, self.bias, self.problem.dtype)
        q, s = reference.quantize(x, self.weights.scheme)
        between, scale = (q.double() @ dense.double().t()).float(), self.weights.channel_scale.view(1, -1)
        if self.weights.scheme.name == "int8":
            between, scale = between * scale, None
        return reference.scaled(between.to(torch.bfloat16), s, scale, self.bias, self.problem.dtype)


@pytest.mark.parametrize(("pattern", "n", "k"), SHAPES)
@pytest.mark.parametrize(("scheme", "route"), ROUTES)
def test_bound_calls_are_the_ops_and_the_oracle(scheme: str, route: str, pattern: str, n: int, k: int, card: list[tuple]) -> None:
    if n == 33 and route.split(":")[1] in ("rowwise", "tensorwise", "cublaslt"):
        n, k = 32, 112  # the libraries' multiples
    weights, dense = made(n, k, scheme, pattern)
    for m in (1, 16, 37, 600):
        x = tokens(m, k + 8)[:, 3 : k + 3]
        for bias in (None, torch.randn(n).to(DTYPE)):
            bound = Bound(weights, route, bias)
            whole, plain = bound(x, direct=True), bound(x, direct=False)
            assert whole.is_contiguous() and plain.is_contiguous()
            check_bitwise(whole, bound.expected(x, dense))
            check_bitwise(plain, whole)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_plans_are_those_that_the_op_asks_for(scheme: str, card: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    op: list[tuple] = []

    def sparse_mm(q: Tensor, weight: Tensor, alpha: Tensor | None, n: int, dtype: torch.dtype, algorithm: str) -> Tensor:
        op.append((0, n, q.shape[1], q.shape[0], q.dtype, dtype, alpha is not None, algorithm))
        return stand_ins.sparse_mm(q, weight, alpha, n, dtype, algorithm)

    monkeypatch.setattr(cusparselt, "sparse_mm", sparse_mm)
    weights, _ = made(33, 100, scheme)
    for route in SPARSE:
        bound = Bound(weights, route)
        for m in (1, 600):
            for direct in (False, True):
                bound(tokens(m, 100), direct=direct)
    assert card == op and len(set(op)) == 8


@pytest.mark.parametrize("before", [swiglu, normed])
@pytest.mark.parametrize(("scheme", "route"), ROUTES)
def test_what_stands_in_front_goes_into_the_pass(scheme: str, route: str, before: Callable, card: list[tuple]) -> None:
    weights, dense = made(48, 96, scheme)
    x = before(5, 96)
    across = x._replace(**{x._fields[0]: x[0].t().contiguous().t()})  # rows that no kernel reads
    for bias in (None, torch.randn(48).to(DTYPE)):
        bound = Bound(weights, route, bias)
        for one in (x, across):
            for direct in (False, True):
                if before is normed:
                    x.total.fill_(7)
                got = bound(one, direct=direct)
                total = x.total.clone() if before is normed else None
                check_bitwise(got, bound.expected(one.computed(), dense))
                assert total is None or total.equal(x.total)


@pytest.mark.parametrize(("scheme", "route"), [one for one in ROUTES if not one[1].startswith("packed")])
def test_rows_that_no_kernel_reads_go_through_the_ops(scheme: str, route: str, card: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, dense = made(48, 96, scheme)
    bound, x = Bound(weights, route, torch.randn(48).to(DTYPE)), tokens(5, 96)
    wanted = bound.expected(x, dense)
    check_bitwise(bound(x.t().contiguous().t(), direct=True), wanted)
    monkeypatch.setattr(prologue, "runs_kernels", lambda device, dtype: False)
    check_bitwise(bound(x, direct=True), wanted)


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize(("scheme", "route"), [("int8", "dense:cublaslt"), ("fp8", "dense:tensorwise"), ("int8", "slid"), ("fp8", "slid")])
def test_without_triton_or_where_it_fuses_the_pass_behind_is_the_ops(
    scheme: str, route: str, fuses: bool, card: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, dense = made(48, 96, scheme)
    bound, x = Bound(weights, route, torch.randn(48).to(DTYPE)), tokens(5, 96)
    monkeypatch.setattr(prologue, "runs_kernels", lambda device, dtype: False)
    monkeypatch.setattr("slidesparse.ops.has_triton", lambda: fuses)
    monkeypatch.setattr(kernels.base, "fuses", lambda capability: fuses)
    monkeypatch.setattr(kernels.base, "rescale_call", lambda *_: pytest.fail("a kernel of Triton's is launched"))
    check_bitwise(bound(x, direct=True), bound.expected(x, dense))


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
@pytest.mark.parametrize(("pattern", "n", "k"), SHAPES)
def test_sixteen_bits_are_multiplied_as_they_are(pattern: str, n: int, k: int, scheme: str, card: list[tuple]) -> None:
    weights, dense = made(n, k, scheme, pattern)
    for m in (1, 16, 37):
        x, bias = torch.randn(m, k).to(dense.dtype), torch.randn(n).to(dense.dtype)
        product = (x.double() @ dense.double().t()).float().to(dense.dtype)
        for added, wanted in ((None, product), (bias, product + bias)):
            for direct in (False, True):
                check_bitwise(Bound(weights, "slid", added, dense.dtype)(x, direct=direct).contiguous(), wanted)
                native = Bound(weights, "dense:native", added, dense.dtype)
                check_bitwise(native(x, direct=direct), torch.nn.functional.linear(x, dense, added))


@pytest.mark.parametrize(("m", "k", "pattern"), [(32, 64, "2:4"), (640, 64, "2:4"), (33, 64, "2:4"), (32, 60, "2:4"), (32, 64, "6:8")])
def test_16_bit_activations_are_copied_only_where_something_moves_or_is_padded(m: int, k: int, pattern: str, card: list[tuple]) -> None:
    problem = made(32, k, "bf16", pattern)[0].problem(DTYPE, CPU, None)
    wide = torch.randn(m, k + 16).to(DTYPE)
    odd = torch.empty(m * k + 1, dtype=DTYPE)[1:].view(m, k).copy_(wide[:, :k])  # at no address that the library takes
    call = kernels.kernels()["cusparselt"].bind(problem, "slid", "default", wide[:, :k], direct=False)
    for x in (wide[:, :k].contiguous(), wide[:, :k], odd):
        q, scale = call.quantise(x)
        as_it_lies = x.is_contiguous() and x is not odd and pattern == "2:4" and k == 64 and m != 33
        assert scale is None and q.is_contiguous() and (q is x) == as_it_lies
        lifted = reference.lift(x.contiguous(), problem.pattern)
        check_bitwise(q[:m, : lifted.shape[1]], lifted)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_a_search_compares_no_rows_that_hold_anything(scheme: str, card: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that pad the tokens are never written: in fp8 they may be NaN, and no algorithm's results equal those."""
    weights, found = made(33, 100, scheme)[0], []
    problem, kernel = weights.problem(DTYPE, CPU, None), kernels.kernels()["cusparselt"]
    rows = torch.full((32, 288), -1, dtype=torch.int8).view(weights.scheme.dtype)
    monkeypatch.setattr(type(kernel), "_quantise", staticmethod(lambda problem, x, direct: lambda x: (rows.clone(), None)))
    monkeypatch.setattr(cusparselt, "search", lambda q, *rest: found.append(q) or [cusparselt.Algorithm(3), cusparselt.Algorithm()])
    copy = LAYOUTS["slid"].prepare(problem, weights)
    assert kernel.search(problem, tokens(17, 100), copy) == ("alg=3", "default")
    assert found[0].view(torch.int8)[17:].eq(0).all() and found[0].view(torch.int8)[:17].eq(-1).all()


@pytest.mark.parametrize(
    ("scheme", "route"), [("int8", "slid"), ("fp8", "slid"), ("int8", "dense:triton"), ("fp8", "dense:rowwise"), ("fp8", "packed:rowwise")]
)
def test_equal_layers_share_calls_but_no_weights(scheme: str, route: str, card: list[tuple]) -> None:
    layers = [made(48, 96, scheme) for _ in range(2)]
    runners = [Runner(weights, route=route) for weights, _ in layers]
    x, gated, bias = tokens(5, 96), swiglu(5, 96), torch.randn(48).to(DTYPE)
    for _ in range(2):
        for run, (weights, dense) in zip(runners, layers, strict=True):
            bound = Bound(weights, route, bias)
            check_bitwise(run(x, bias), bound.expected(x, dense))
            check_bitwise(run.behind(gated, bias), bound.expected(gated.computed(), dense))
    first, second = (run.ready.calls for run in runners)
    assert first is second and len(first) == 2


class Telling:
    """A kernel whose results tell how they were bound, and that counts how often that happened."""

    name, layouts, worth_timing, version, code = "telling", ("dense",), False, 1, ()

    def __init__(self) -> None:
        self.bound = 0

    def refuses(self, problem: Problem, variant: str = "") -> None:
        return None

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        return ("1",)

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, direct: bool) -> Pipeline:
        self.bound += 1
        result, (m, _) = 10 * int(variant) + 2 * direct + (not isinstance(x, Tensor)), x.shape
        return Pipeline(layout, lambda x: (x, None), lambda *_: torch.full((m, problem.n), result, dtype=x.dtype))


@pytest.fixture
def telling(card: list[tuple], monkeypatch: pytest.MonkeyPatch) -> Telling:
    made = Telling()
    monkeypatch.setattr(kernels, "_KERNELS", kernels.kernels() | {made.name: made})
    return made


def test_calls_are_shared_by_equal_layers_and_kept_apart_otherwise(telling: Telling) -> None:
    weights, x = made(24, 64, "int8")[0], tokens(5, 64)
    one, other = (Runner(weights, route="dense:telling") for _ in range(2))
    for layer in (one, one, other):
        assert layer(x).eq(12).all()
    assert telling.bound == 1
    for part in (x[:3], tokens(5, 80)[:, :64]):
        assert one(part).eq(12).all() and other(part).eq(12).all()
    assert telling.bound == 3
    gated = swiglu(5, 64)
    assert one.behind(gated).eq(13).all() and one(x).eq(12).all() and other.behind(gated).eq(13).all()
    assert telling.bound == 4
    assert Runner(weights, route="dense:telling:2")(x).eq(22).all() and one(x).eq(12).all()
    assert Runner(made(24, 64, "fp8")[0], route="dense:telling")(x).eq(12).all()
    assert one(x.float()).dtype == torch.float32 and one(x, torch.zeros(24)).eq(12).all() and one(x).eq(12).all()
    assert telling.bound == 8


def test_calls_are_bounded(telling: Telling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest of all kinds of layers stay: a new one takes one old one's place, not that of all."""
    monkeypatch.setattr(stand_ins.runner, "MOST_CALLS", 3)
    layers = [Runner(made(n, 64, "int8")[0], route="dense:telling") for n in (24, 32)]
    for m in range(1, 9):
        assert layers[m % 2](torch.zeros(m, 64).to(DTYPE)).shape == (m, (24, 32)[m % 2])
        assert sum(len(layer.ready.calls) for layer in layers if layer.ready) == min(m, 3)
    for m in (8, 7, 6):
        layers[m % 2](torch.zeros(m, 64).to(DTYPE))
    assert telling.bound == 8
    layers[1](torch.zeros(5, 64).to(DTYPE))
    assert telling.bound == 9


def test_nothing_is_launched_directly_where_somebody_looks_or_something_does_not_fit(
    telling: Telling, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gated, wide = tokens(5, 64), swiglu(5, 64), torch.zeros(48).to(DTYPE)
    layer = Runner(made(24, 64, "int8")[0], route="dense:telling")
    for bias, result in ((wide[:24], 12), (wide[::2], 10), (wide[:24], 12), (None, 12)):
        assert layer(x, bias).eq(result).all() and layer.behind(gated, bias).eq(result + 1).all()
    assert Runner(made(24, 64, "bf16")[0], route="dense:telling")(x).eq(10).all()
    monkeypatch.setattr(stand_ins.runner, "current_device", lambda: 0)
    assert layer(x).eq(10).all()
    monkeypatch.setattr(stand_ins.runner, "current_device", lambda: -1)
    monkeypatch.setattr(stand_ins.runner, "can_bypass_dispatcher", lambda x: False)
    assert layer(x).eq(10).all()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_narrows_no_call(narrow: torch.dtype, card: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    # As they are: sums in float32, which autocast would narrow.
    monkeypatch.setattr(kernels.dense, "products", lambda q, dense: q.to(torch.float32) @ dense.to(torch.float32).t())
    layer, x = Runner(made(33, 100, "fp8")[0], route="dense:exact"), tokens(5, 100)
    gated = swiglu(5, 100)
    whole, behind = layer(x), layer.behind(gated)
    with torch.autocast("cpu", narrow):
        narrowed = torch.ones(1, 1) @ torch.ones(1, 1)
        for _ in range(2):
            check_bitwise(layer(x), whole)
            check_bitwise(layer.behind(gated), behind)
        fresh = Runner(layer.weights, route="dense:exact")
        check_bitwise(fresh(x), whole)
    assert narrowed.dtype == narrow


def test_a_capture_is_refused_before_the_first_call_and_not_after(card: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _ = made(48, 96, "int8")
    ran, fresh, x = Runner(weights, route="dense:triton"), Runner(weights, route="dense:triton"), tokens(5, 96)
    wanted = ran(x)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_bitwise(ran(x), wanted)
    for call in (lambda: fresh(x), lambda: fresh.behind(swiglu(5, 96)), lambda: ran(x.float())):
        with pytest.raises(UnsupportedError, match="once before capturing"):
            call()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check_bitwise(fresh(x), wanted)


def test_wrong_widths_are_refused_by_bound_calls_too(card: list[tuple]) -> None:
    layer = Runner(made(24, 64, "int8")[0], route="slid")
    for _ in range(2):
        layer(tokens(5, 64)), layer.behind(swiglu(5, 64))
        for columns in (56, 72):
            for call in (lambda: layer(tokens(5, columns)), lambda: layer.behind(swiglu(5, columns))):  # noqa: B023
                with pytest.raises(ValueError, match=f"have {columns} columns, the layer takes 64"):
                    call()
