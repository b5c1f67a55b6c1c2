"""Whole linears with SwiGLU or a norm in front: what every route gives behind them, and the ops that graphs hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from layers import DTYPE, made, normed, oracle, swiglu
from slidesparse import pruning
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Runner, Weights, op
from slidesparse.ops.prologue import Gated, Normed
from slidesparse.packing import Shard
from slidesparse.pattern import Pattern
from slidesparse.quantization import quantize_weight
from slidesparse.tolerance import check_bitwise

ON_CPU = [None, "dense", "packed", "packed:exact64", "dense:exact"]
ROUTES = [
    *(("int8", route) for route in ("dense:triton", "dense:cublaslt", "dense:exact", "packed:triton", "slid", "tiled", "dense:sm90", None)),
    *(("fp8", route) for route in ("dense:tensorwise", "dense:rowwise", "packed:tensorwise", "slid", "tiled", "dense:sm90", None)),
]


def run_op(x: Gated | Normed, name: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """By the op; the sum that a norm's gives goes where the oracle's does."""
    if isinstance(x, Gated):
        return op.silu_mul_linear(x.gate_up, name, bias, n)
    y, total = op.add_rms_norm_linear(x.x, x.residual, x.weight, x.eps, name, bias, n)
    x.total.copy_(total)
    return y


def check_near(y: Tensor, x: Gated | Normed, weights: Weights, dense: Tensor, bias: Tensor | None) -> None:
    """As the oracle behind the layers, but for a quantised value here and there; the sum bit by bit."""
    total = x.total.clone() if isinstance(x, Normed) else None
    expected = oracle(x.computed(), weights, dense, bias, torch.float64)
    assert total is None or total.equal(x.total)
    error, size = (y.cpu().double() - expected).norm(dim=1), expected.norm(dim=1)
    assert y.dtype == DTYPE and y.is_contiguous() and (error <= 0.02 * size).all(), (error / size).max()


@pytest.mark.parametrize("before", [swiglu, normed])
@pytest.mark.parametrize("route", ON_CPU)
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_layer_behind_is_the_layer_on_what_stands_in_front(scheme: str, route: str | None, before: Callable) -> None:
    for m, n, k in ((0, 24, 64), (1, 33, 100), (16, 48, 256)):
        weights, dense = made(n, k, scheme)
        x, run = before(m, k), Runner(weights, route=route)
        for bias in (None, torch.randn(n).to(DTYPE)):
            for _ in range(2):
                y = run.behind(x, bias)
                check_bitwise(y, run(x.computed(), bias))
                check_near(y, x, weights, dense, bias)
    with pytest.raises(ValueError, match="255 columns, the layer takes 256"):
        run.behind(before(3, 255))


@pytest.mark.parametrize(("scheme", "pattern"), [("bf16", "6:8"), ("fp16", "2:4"), ("nvfp4", "6:8x2")])
def test_a_layer_that_quantises_nothing_runs_on_what_is_computed_first(scheme: str, pattern: str) -> None:
    weights, _ = made(32, 64, scheme, pattern)
    for x in (swiglu(5, 64), normed(5, 64)):
        run = Runner(weights)
        check_bitwise(run.behind(x), run(x.computed()))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_the_ops_widen_a_cut_shard(scheme: str, rank: int) -> None:
    shard, kind, ops = Shard.even(Pattern.parse("4:6"), 56, rank, 4), SCHEMES[scheme], torch.ops.slidesparse
    weight, scale = quantize_weight(pruning.prune(torch.randn(16, 14), shard.pattern, offset=shard.offset), kind)
    weights = Weights(shard.pack(weight), kind, scale)
    owner, run = nn.Module(), Runner(weights)
    name = op.handle(owner, lambda dtype, device: run, shard.margins)
    for bias in (None, torch.randn(16).to(DTYPE)):
        gated, behind = swiglu(5, 14), normed(5, 14)
        for x in (gated, behind):
            check_near(run_op(x, name, bias, 16), x, weights, weight, bias)
        torch.library.opcheck(ops.silu_mul_linear, (gated.gate_up, name, bias, 16))
        torch.library.opcheck(ops.add_rms_norm_linear, (*behind[:4], name, bias, 16))


def test_the_ops_know_a_layer_as_long_as_its_owner_lives() -> None:
    weights, _ = made(32, 64, "int8")
    owner, run = nn.Module(), Runner(weights)
    name = op.handle(owner, lambda dtype, device: run)
    assert run_op(swiglu(3, 64), name, None, 32).shape == (3, 32)
    del owner
    for x in (swiglu(3, 64), normed(3, 64)):
        with pytest.raises(UnsupportedError, match="a layer that is gone"):
            run_op(x, name, None, 32)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("pattern", ["6:8", "2:4", "8:10"])
@pytest.mark.parametrize(("scheme", "route"), ROUTES, ids=str)
def test_routes_on_a_gpu(scheme: str, route: str | None, pattern: str) -> None:
    weights, dense = made(272, 528, scheme, pattern, "cuda")
    owner, run, device = nn.Module(), Runner(weights, route=route), torch.device("cuda", 0)
    try:
        run.prepare(DTYPE, device)
    except UnsupportedError as error:
        pytest.skip(str(error))
    name = op.handle(owner, lambda dtype, device: run)
    for m in (0, 1, 7, 16, 63, 1000):
        for bias in (None, torch.randn(272, device=device).to(DTYPE)):
            for x in (swiglu(m, 528, "cuda"), normed(m, 528, "cuda")):
                for _ in range(2):  # as decided, too
                    check_near(run_op(x, name, bias, 272), x, weights, dense, bias)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("layout", ["dense", "slid"])
def test_the_ops_are_captured(layout: str) -> None:
    weights, dense = made(256, 512, "int8", device="cuda")
    owner, run = nn.Module(), Runner(weights, route=layout)
    run.prepare(DTYPE, torch.device("cuda", 0))
    name = op.handle(owner, lambda dtype, device: run)
    op.warm(name, run.ready, (16,))
    for x, fresh in ((swiglu(16, 512, "cuda"), swiglu(16, 512, "cuda")), (normed(16, 512, "cuda"), normed(16, 512, "cuda"))):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run_op(x, name, None, 256)
        x[0].copy_(fresh[0])
        graph.replay()
        check_near(y, x, weights, dense, None)
