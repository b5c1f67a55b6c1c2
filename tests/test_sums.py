"""Bare products of quantised activations: every backend that gives them against float64, alone and behind the prepared op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slidesparse import prune, reference
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Execution, Weights, prepared
from slidesparse.pack import Shard, pack
from slidesparse.pattern import Pattern
from slidesparse.quant import quantize_weight
from slidesparse.testing import check_bitwise, check_close

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPE = torch.bfloat16


def made(n: int, k: int, scheme: str, pattern: str = "6:8", device: str = "cpu") -> tuple[Weights, Tensor]:
    """Stored weights, and the quantised dense matrix."""
    kind, parsed = SCHEMES[scheme], Pattern.parse(pattern)
    values, scale = quantize_weight(prune.prune(torch.randn(n, k), parsed), kind)
    return Weights(pack(values.to(device), parsed), kind, scale.to(device)), values


def quantised(m: int, k: int, scheme: str) -> Tensor:
    return reference.quantize(torch.randn(m, k), SCHEMES[scheme])[0]


def ready(weights: Weights, backend: str | None, device: str) -> Execution:
    execution = Execution(weights, backend=backend, sums=True)
    execution.prepare(DTYPE, torch.empty(0, device=device).device)
    return execution


@pytest.mark.parametrize("backend", [None, "dense", "restore", "reference", "dense:exact"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_sums_are_rounded_once_and_nothing_else(scheme: str, backend: str | None) -> None:
    for m, n, k in ((0, 24, 64), (1, 33, 100), (16, 48, 256)):
        weights, dense = made(n, k, scheme)
        q, execution = quantised(m, k, scheme), ready(weights, backend, "cpu")
        y, exact = execution.sums(q), q.double() @ dense.double().t()
        assert y.dtype == DTYPE
        check_bitwise(y, exact.float().to(DTYPE)) if scheme == "int8" else check_close(y, exact, exact.to(DTYPE))


ROUTES = [
    *(("int8", route) for route in ("dense:triton", "dense:exact", "restore:triton", "cusparselt", None)),
    *(("fp8", route) for route in ("dense:tensorwise", "restore:tensorwise", "cusparselt", None)),
]


@pytest.mark.needs_gpu
@on_gpu
@pytest.mark.parametrize("pattern", ["6:8", "2:4", "8:10"])
@pytest.mark.parametrize(("scheme", "route"), ROUTES, ids=str)
def test_routes_on_a_gpu(scheme: str, route: str | None, pattern: str) -> None:
    weights, dense = made(272, 528, scheme, pattern, "cuda")
    try:
        execution = ready(weights, route, "cuda")
    except UnsupportedError as error:
        if "nvmath" in str(error):
            pytest.skip(str(error))
        raise
    for m in (0, 1, 7, 16, 63, 1000):
        q = quantised(m, 528, scheme)
        y, exact = execution.sums(q.cuda()).cpu(), q.double() @ dense.double().t()
        same = exact.to(DTYPE)
        if scheme == "fp8" and m:
            one = torch.ones((), device="cuda")
            same = torch._scaled_mm(q.cuda(), dense.cuda().t(), one, one, out_dtype=DTYPE, use_fast_accum=True).cpu()
        check_close(y, exact, same)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_prepared_op_widens_a_cut_shard(rank: int) -> None:
    shard = Shard.even(Pattern.parse("4:6"), 56, rank, 4)
    for scheme in ("int8", "fp8"):
        kind = SCHEMES[scheme]
        weight, scale = quantize_weight(prune.prune(torch.randn(16, 14), shard.pattern, offset=shard.offset), kind)
        owner, execution = nn.Module(), Execution(Weights(shard.pack(weight), kind, scale), sums=True)
        name = prepared.prepare(owner, execution, DTYPE, torch.device("cpu"), None, margins=shard.margins)
        q = quantised(5, 14, scheme)
        exact = q.double() @ weight.double().t()
        check_close(prepared.sums(q, name, 16), exact, exact.to(DTYPE))
        prepared.warm(name, (1, 8))
        with pytest.raises(UnsupportedError, match="prepared for sums"):
            prepared.sums(torch.randn(5, 14), name, 16)


@pytest.mark.needs_gpu
@on_gpu
@pytest.mark.parametrize("backend", ["dense", "cusparselt"])
def test_sums_are_captured(backend: str) -> None:
    weights, dense = made(256, 512, "int8", device="cuda")
    owner, execution = nn.Module(), Execution(weights, backend=backend, sums=True)
    name = prepared.prepare(owner, execution, DTYPE, torch.device("cuda", 0), None)
    prepared.warm(name, (16,))
    q, graph = torch.zeros(16, 512, dtype=torch.int8, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = prepared.sums(q, name, 256)
    fresh = quantised(16, 512, "int8")
    q.copy_(fresh)
    graph.replay()
    exact = fresh.double() @ dense.double().t()
    check_close(y.cpu(), exact, exact.to(DTYPE))


def test_a_route_without_a_bare_product_is_refused() -> None:
    weights, _ = made(32, 64, "int8")
    with pytest.raises(UnsupportedError, match="cublaslt cannot run"):
        ready(weights, "dense:cublaslt", "cpu")
