"""Calls whose decisions were made once: what they allocate, launch and return, with stand-ins for kernels and library."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slidesparse import pack, reference
from slidesparse.format import SCHEMES
from slidesparse.gemm import Problem, execution
from slidesparse.gemm.backends import cusparselt as backend
from slidesparse.gemm.execution import Execution
from slidesparse.ops import cusparselt, rescale
from slidesparse.pattern import Pattern
from slidesparse.testing import check_bitwise
from test_sums import made, tokens

SHAPES = [("6:8", 33, 100), ("4:6", 64, 96), ("2:4", 48, 64)]


class Product:
    """In place of a plan of the library: exact products, scaled if there is an alpha, rounded to the output's type."""

    def run(self, q: Tensor, weight: Tensor, alpha: Tensor | None, y: Tensor) -> None:
        sums = q.double() @ weight.double().t()
        y.copy_(sums if alpha is None else sums.float() * alpha)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Python in place of kernels and library; counts what was made ready."""
    counts = {"quantize": 0, "rescale": 0, "plan": 0}

    def quantize_call(x: Tensor, pattern: Pattern | None, dtype: torch.dtype, offset: int, width: int) -> Callable:
        counts["quantize"] += 1

        def call(x: Tensor, q: Tensor, scale: Tensor) -> None:
            values, found = reference.quantize(x, SCHEMES["int8" if dtype == torch.int8 else "fp8"])
            values = values if pattern is None else reference.lift(values, pattern)
            q.view(torch.int8).zero_()
            q[: x.shape[0], : values.shape[1]] = values
            scale.copy_(found)

        return call

    def rescale_call(types: tuple, m: int, n: int, stride: int) -> Callable:
        counts["rescale"] += 1

        def call(acc: Tensor, y: Tensor, x_scale: Tensor, w_scale: Tensor | None, bias: Tensor | None) -> None:
            given = (acc, y, x_scale, w_scale, bias)
            assert types == tuple(None if tensor is None else tensor.dtype for tensor in given) and acc.stride(0) == stride
            y.copy_(rescale(acc, x_scale, w_scale, bias, y.dtype, m=m, n=n))

        return call

    def known(wanted: tuple) -> Product:
        counts["plan"] += 1
        cusparselt.Algorithm.parse(wanted[-1])
        return Product()

    monkeypatch.setattr(backend, "quantize_call", quantize_call)
    monkeypatch.setattr(backend, "rescale_call", rescale_call)
    monkeypatch.setattr(backend, "runs_kernels", lambda device, dtype: True)
    monkeypatch.setattr(cusparselt.plans, "known", known)
    return counts


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
def test_bound_calls_are_the_layer(pattern: str, n: int, k: int, scheme: str, variant: str, stand_ins: dict[str, int]) -> None:
    weights, dense = made(n, k, scheme, pattern)
    bias = torch.randn(n).bfloat16()
    problem = weights.problem(torch.bfloat16, torch.device("cpu"), torch.bfloat16)
    resident, sparse = held(weights, dense, problem), backend.CuSparseLt()
    for m in (1, 16, 37):
        x = tokens(m, k + 8)[:, 3 : k + 3]
        q, x_scale = reference.quantize(x, SCHEMES[scheme])
        products = q.double() @ dense.double().t()
        if sparse.gives_sums(variant):
            sums, scale = sparse.bind(problem, x, resident, variant, sums=True).sums(x, resident)
            check_bitwise(scale, x_scale)
            check_bitwise(sums.contiguous(), products.to(torch.bfloat16))
        y = sparse.bind(problem, x, resident, variant, sums=False).run(x, resident, weights.channel_scale, bias)
        assert y.shape == (m, n) and y.dtype == torch.bfloat16 and y.is_contiguous()
        if variant.startswith("exact"):
            between = products.float()
        else:
            alpha = weights.channel_scale.view(1, -1) if scheme == "int8" else 1
            between = (products.float() * alpha).to(torch.bfloat16).float()
        w_scale = None if scheme == "int8" and not variant.startswith("exact") else weights.channel_scale
        check_bitwise(y, rescale(between, x_scale, w_scale, bias, torch.bfloat16))


def test_what_cannot_be_decided_beforehand_is_not(stand_ins: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, dense = made(33, 100, "int8")
    problem = weights.problem(torch.bfloat16, torch.device("cpu"), None)
    resident, sparse, x = held(weights, dense, problem), backend.CuSparseLt(), tokens(4, 100)
    assert sparse.bind(problem, x, resident, "", sums=False) is not None
    assert sparse.bind(problem, x.t().contiguous().t(), resident, "", sums=False) is None
    plain = Problem(33, 100, problem.pattern, SCHEMES["bf16"], "cpu", torch.bfloat16)
    assert sparse.bind(plain, x, resident, "", sums=False) is None
    monkeypatch.setattr(cusparselt.plans, "known", lambda wanted: None)
    assert sparse.bind(problem, x, resident, "", sums=False) is None
    monkeypatch.setattr(backend, "runs_kernels", lambda device, dtype: False)
    assert sparse.bind(problem, x, resident, "", sums=False) is None


class Binding:
    """A backend that counts what it decides."""

    name, layout = "binding", "packed"
    bound = 0

    def refuses(self, problem, variant=None):
        return None

    def variants(self, problem, m):
        return ("one",)

    def prepare(self, problem, weights):
        return weights.tensors()

    def roundings(self, variant):
        return 1

    def gives_sums(self, variant):
        return True

    def run(self, problem, x, resident, scale, bias, variant):
        return x.new_zeros(x.shape[0], problem.n)

    def sums(self, problem, x, resident, variant):
        return self.run(problem, x, resident, None, None, variant), x.new_zeros(x.shape[0], 1)

    def bind(self, problem, x, resident, variant, *, sums):
        self.bound += 1
        outer = self

        class Bound:
            def run(self, x, resident, scale, bias):
                return outer.run(problem, x, resident, scale, bias, variant) + 1

            def sums(self, x, resident):
                return self.run(x, resident, None, None), x.new_zeros(x.shape[0], 1)

        return None if x.shape[0] == 7 else Bound()


def test_decisions_are_shared_kept_bounded_and_not_taken_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, weights = Binding(), made(24, 64, "int8")[0]
    monkeypatch.setattr(execution, "named", lambda route, problem, m, sums=False: execution.Choice(sparse, "one"))
    monkeypatch.setattr(execution, "unwatched", lambda x: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(execution, "_BOUND", {})
    one, other = (Execution(weights, backend="binding") for _ in range(2))
    x = torch.randn(5, 64).bfloat16()
    assert one(x).eq(1).all() and one(x).eq(1).all() and other(x).eq(1).all() and sparse.bound == 1
    assert one(x[:3]).eq(1).all() and one(torch.randn(5, 80).bfloat16()[:, :64]).eq(1).all() and sparse.bound == 3
    assert one(torch.randn(7, 64).bfloat16()).eq(0).all()
    monkeypatch.setattr(execution, "CALLS", 3)
    assert one(x[:2]).eq(1).all() and len(one._ready.bound) == 1
    bare = Execution(weights, backend="binding", sums=True)
    bare.prepare(torch.bfloat16, x.device)
    assert bare.sums(x)[0].eq(1).all() and len(one._ready.bound) == 2
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert one(x).eq(0).all()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(execution, "unwatched", lambda x: False)
    assert one(x).eq(0).all() and bare.sums(x)[0].eq(0).all()
