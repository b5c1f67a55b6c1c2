"""Products whose scales and bias are left to the caller: every kernel against float64, alone and behind the op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layers import DTYPE, made, normed, swiglu, tokens
from slidesparse import pruning, reference
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Problem, Route, Runner, Weights, op
from slidesparse.gemm.kernels import chosen, kernels, refusal
from slidesparse.gemm.kernels.base import LEAVES
from slidesparse.ops.prologue import Gated, Normed
from slidesparse.packing import Shard
from slidesparse.pattern import Pattern
from slidesparse.quantization import quantize_weight
from slidesparse.tolerance import check_bitwise, check_close

ON_CPU = [None, "dense", "packed", "packed:exact64", "dense:exact"]


def check(found: tuple[Tensor, Tensor], x: Tensor, dense: Tensor, weights: Weights) -> None:
    """Products that were rounded once, times the weight scales unless they are left, and token scales bit by bit."""
    (y, scale), (q, expected_scale) = found, reference.quantize(x, weights.scheme)
    exact = q.double() @ dense.double().t()
    if "channel" not in LEAVES[weights.scheme.name]:
        exact *= weights.scale.cpu().view(1, -1)
    same = exact.to(DTYPE)
    if weights.scheme.name == "fp8" and y.is_cuda and len(x):
        one = torch.ones((), device="cuda")
        same = torch._scaled_mm(q.cuda(), dense.cuda().t(), one, one, out_dtype=DTYPE, use_fast_accum=True).cpu()
    assert y.dtype == DTYPE
    check_bitwise(scale.cpu(), expected_scale)
    check_close(y.cpu(), exact, same)


def check_fused(found: tuple[Tensor, Tensor], x: Gated | Normed, dense: Tensor, weights: Weights) -> None:
    """As the activations would give if they were computed first, but for a quantised value here and there."""
    total = x.total.clone() if isinstance(x, Normed) else None
    (y, scale), (q, expected_scale) = found, reference.quantize(x.computed().cpu(), weights.scheme)
    if total is not None:
        check_bitwise(total, x.total)
        x.total.zero_()
    exact = q.double() @ dense.double().t()
    if "channel" not in LEAVES[weights.scheme.name]:
        exact *= weights.scale.cpu().view(1, -1)
    off = (scale.cpu() - expected_scale).abs() > 2 * torch.finfo(DTYPE).eps * expected_scale
    assert y.dtype == DTYPE and not off.any()
    error, size = (y.cpu().double() - exact).norm(dim=1), exact.norm(dim=1)
    assert (error <= 0.02 * size).all(), (error / size).max()


@pytest.mark.parametrize("route", ON_CPU)
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_products_are_rounded_once_and_nothing_else(scheme: str, route: str | None) -> None:
    for m, n, k in ((0, 24, 64), (1, 33, 100), (16, 48, 256)):
        weights, dense = made(n, k, scheme)
        x, run = tokens(m, k), Runner(weights, route=route)
        for _ in range(2):
            check(run.unscaled(x), x, dense, weights)


@pytest.mark.parametrize("route", ON_CPU)
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_swiglu_and_norms_may_be_left_to_the_product(scheme: str, route: str | None) -> None:
    weights, dense = made(48, 256, scheme)
    run = Runner(weights, route=route, unscaled=True)
    for m, scaled in ((0, False), (1, True), (16, False), (16, True)):
        for x in (swiglu(m, 256, scaled), normed(m, 256, scaled)):
            check_fused(run.unscaled(x), x, dense, weights)
    with pytest.raises(ValueError, match="255 columns, the layer takes 256"):
        run.unscaled(swiglu(3, 255, False))


def test_one_runner_gives_both_on_one_copy() -> None:
    for scheme in ("int8", "fp8"):
        weights, dense = made(32, 64, scheme)
        x, run = tokens(5, 64), Runner(weights)
        y = run(x)
        held = run.resident_bytes
        check(run.unscaled(x), x, dense, weights)
        check_bitwise(run(x), y)
        assert run.resident_bytes == held == 32 * 64 * run.ready.problem.compute_dtype.itemsize


def test_unscaled_products_are_refused_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(3, 64)
    with pytest.raises(UnsupportedError, match="leaves scales"):
        Runner(made(32, 64, "bf16")[0]).unscaled(x)
    monkeypatch.setattr("slidesparse.gemm.kernels.dense.DenseKernel.leaves", lambda *_: frozenset())
    weights, dense = made(32, 64, "int8")
    whole = Runner(weights, route="dense:exact")
    check_bitwise(whole(x), reference.linear(*reference.quantize(x, weights.scheme), dense, weights.scale, None, DTYPE))
    with pytest.raises(UnsupportedError, match="leaves scales"):
        whole.unscaled(x)
    with pytest.raises(UnsupportedError, match="cannot leave scales"):
        Runner(weights, route="dense:exact", unscaled=True).unscaled(x)


@pytest.mark.parametrize(
    ("route", "gives"),
    [
        ("dense:cublaslt", False),
        ("dense:triton", True),
        ("packed:triton", True),
        ("packed:exact64", True),
        ("slid:cusparselt:exact", False),
        ("slid:cusparselt:exact alg=3", False),
        ("slid:cusparselt", True),
        ("slid:cusparselt:alg=3", True),
    ],
)
def test_a_route_that_applies_scales_itself_is_refused(route: str, gives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in kernels().values():
        monkeypatch.setattr(type(kernel), "refuses", lambda *_: None)
    problem = Problem(32, 64, Pattern(6, 8), SCHEMES["int8"], (9, 0), DTYPE)
    assert refusal(Route.parse(route), problem) is None
    assert (refusal(Route.parse(route), problem, unscaled=True) is None) == gives
    assert not kernels()["native"].leaves(problem, "") and str(chosen(route, problem, 16)).startswith(route)
    if gives:
        assert str(chosen(route, problem, 16, unscaled=True)).startswith(route)
        return
    with pytest.raises(UnsupportedError, match="cannot leave scales"):
        chosen(route, problem, 16, unscaled=True)


ROUTES = [
    *(("int8", route) for route in ("dense:triton", "dense:exact", "packed:triton", "slid", None)),
    *(("fp8", route) for route in ("dense:tensorwise", "dense:rowwise", "packed:tensorwise", "slid", None)),
]
DENSE = [(scheme, route) for scheme, route in ROUTES if str(route).startswith("dense")]


@pytest.mark.needs_gpu
@pytest.mark.parametrize(
    ("scheme", "route", "pattern"),
    # The pattern is nothing to kernels on dense weights.
    [(*row, pattern) for row in ROUTES for pattern in ("6:8", "2:4", "8:10") if pattern == "6:8" or row not in DENSE],
    ids=str,
)
def test_routes_on_a_gpu(scheme: str, route: str | None, pattern: str) -> None:
    weights, dense = made(272, 528, scheme, pattern, "cuda")
    run = Runner(weights, route=route, unscaled=True)
    try:
        run.prepare(DTYPE, torch.device("cuda", 0))
    except UnsupportedError as error:
        if "nvmath" in str(error):
            pytest.skip(str(error))
        raise
    for m in (0, 1, 7, 16, 63, 1000):
        x = tokens(m, 528)
        check(run.unscaled(x.cuda()), x, dense, weights)
        for scaled in (False, True):
            for fused in (swiglu(m, 528, scaled, "cuda"), normed(m, 528, scaled, "cuda")):
                for _ in range(2):  # as decided, too
                    check_fused(run.unscaled(fused), fused, dense, weights)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_ops_widen_a_cut_shard(rank: int) -> None:
    shard, ops = Shard.even(Pattern.parse("4:6"), 56, rank, 4), torch.ops.slidesparse
    for scheme in ("int8", "fp8"):
        kind = SCHEMES[scheme]
        weight, scale = quantize_weight(pruning.prune(torch.randn(16, 14), shard.pattern, offset=shard.offset), kind)
        weights = Weights(shard.pack(weight), kind, scale)
        owner, run = nn.Module(), Runner(weights, unscaled=True)
        name = op.handle(owner, lambda dtype, device, run=run: run, shard.margins)
        x = tokens(5, 14)
        check(op.linear_unscaled(x, name, 16), x, weight, weights)
        op.warm(name, run, (1, 8), unscaled=True)
        torch.library.opcheck(ops.linear_unscaled, (x, name, 16))
        gated, behind = swiglu(5, 14, True), normed(5, 14, True)
        check_fused(op.silu_mul_linear_unscaled(*gated, name, 16), gated, weight, weights)
        torch.library.opcheck(ops.silu_mul_linear_unscaled, (*gated, name, 16))
        inputs = (*behind[:4], *behind[5:], name, 16)
        y, y_scale, total = op.add_rms_norm_linear_unscaled(*inputs)
        check_fused((y, y_scale), behind._replace(total=total), weight, weights)
        torch.library.opcheck(ops.add_rms_norm_linear_unscaled, inputs)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("layout", ["dense", "slid"])
def test_products_are_captured(layout: str) -> None:
    weights, dense = made(256, 512, "int8", device="cuda")
    owner, run = nn.Module(), Runner(weights, route=layout, unscaled=True)
    run.prepare(DTYPE, torch.device("cuda", 0))
    name = op.handle(owner, lambda dtype, device: run)
    op.warm(name, run, (16,), unscaled=True)
    x, graph = torch.zeros(16, 512, dtype=DTYPE, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op.linear_unscaled(x, name, 256)
    fresh = tokens(16, 512)
    x.copy_(fresh)
    graph.replay()
    check(found, fresh, dense, weights)
    gated, graph = swiglu(16, 512, False, "cuda"), torch.cuda.CUDAGraph()
    gate_up = torch.zeros_like(gated.gate_up)
    with torch.cuda.graph(graph):
        found = op.silu_mul_linear_unscaled(gate_up, None, None, name, 256)
    gate_up.copy_(gated.gate_up)
    graph.replay()
    check_fused(found, gated, dense, weights)
