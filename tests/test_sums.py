"""Linears whose scales and bias are left to the caller: every backend against float64, alone and behind the prepared op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slidesparse import prune, reference
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Execution, Weights, prepared, registry
from slidesparse.gemm.activations import Gated, Normed
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


def tokens(m: int, k: int) -> Tensor:
    """Rows of very different scales."""
    return (torch.randn(m, k) * torch.logspace(-3, 3, m).view(-1, 1)).to(DTYPE)


def check(found: tuple[Tensor, Tensor], x: Tensor, dense: Tensor, weights: Weights) -> None:
    """Sums that were rounded once, times the weight scales of int8, and scales bit by bit."""
    (sums, scale), (q, expected_scale) = found, reference.quantize(x, weights.scheme)
    exact = q.double() @ dense.double().t()
    if weights.scheme.name == "int8":
        exact *= weights.scale.cpu().view(1, -1)
    same = exact.to(DTYPE)
    if weights.scheme.name == "fp8" and sums.is_cuda and len(x):
        one = torch.ones((), device="cuda")
        same = torch._scaled_mm(q.cuda(), dense.cuda().t(), one, one, out_dtype=DTYPE, use_fast_accum=True).cpu()
    assert sums.dtype == DTYPE
    check_bitwise(scale.cpu(), expected_scale)
    check_close(sums.cpu(), exact, same)


def ready(weights: Weights, backend: str | None, device: str) -> Execution:
    execution = Execution(weights, backend=backend, sums=True)
    execution.prepare(DTYPE, torch.empty(0, device=device).device)
    return execution


@pytest.mark.parametrize("backend", [None, "dense", "restore", "reference", "dense:exact"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_sums_are_rounded_once_and_nothing_else(scheme: str, backend: str | None) -> None:
    for m, n, k in ((0, 24, 64), (1, 33, 100), (16, 48, 256)):
        weights, dense = made(n, k, scheme)
        x = tokens(m, k)
        check(ready(weights, backend, "cpu").sums(x), x, dense, weights)


def swiglu(m: int, k: int, scaled: bool, device: str = "cpu") -> Gated:
    """Gates and ups of rows of very different scales, the scales given with them or in them."""
    scale = torch.logspace(-2, 2, m).view(-1, 1)
    gate_up, channel = torch.randn(m, 2 * k), torch.rand(1, 2 * k) + 0.5
    tensors = (gate_up.to(DTYPE), scale, channel) if scaled else ((gate_up * scale).to(DTYPE), None, None)
    return Gated(*(None if tensor is None else tensor.to(device) for tensor in tensors))


def normed(m: int, k: int, scaled: bool, device: str = "cpu") -> Normed:
    """A norm's inputs of rows of very different scales, the scales given with them or in them."""
    scale = torch.logspace(-2, 2, m).view(-1, 1)
    x, channel = torch.randn(m, k), torch.rand(1, k) + 0.5
    x, scale, channel = (x.to(DTYPE), scale, channel) if scaled else ((x * scale).to(DTYPE), None, None)
    made = Normed(x, torch.randn(m, k).to(DTYPE), torch.rand(k).to(DTYPE), 1e-6, torch.zeros(m, k, dtype=DTYPE), scale, channel)
    return Normed(*(one.to(device) if isinstance(one, Tensor) else one for one in made))


def check_fused(found: tuple[Tensor, Tensor], x: Gated | Normed, dense: Tensor, weights: Weights) -> None:
    """As the activations would give if they were computed first, but for a quantised value here and there."""
    total = x.total.clone() if isinstance(x, Normed) else None
    (sums, scale), (q, expected_scale) = found, reference.quantize(x.computed().cpu(), weights.scheme)
    if total is not None:
        check_bitwise(total, x.total)
        x.total.zero_()
    exact = q.double() @ dense.double().t()
    if weights.scheme.name == "int8":
        exact *= weights.scale.cpu().view(1, -1)
    off = (scale.cpu() - expected_scale).abs() > 2 * torch.finfo(DTYPE).eps * expected_scale
    assert sums.dtype == DTYPE and not off.any()
    error, size = (sums.cpu().double() - exact).norm(dim=1), exact.norm(dim=1)
    assert (error <= 0.02 * size).all(), (error / size).max()


@pytest.mark.parametrize("backend", [None, "dense", "restore", "reference", "dense:exact"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_swiglu_and_norms_may_be_left_to_the_product(scheme: str, backend: str | None) -> None:
    weights, dense = made(48, 256, scheme)
    for m, scaled in ((0, False), (1, True), (16, False), (16, True)):
        for x in (swiglu(m, 256, scaled), normed(m, 256, scaled)):
            check_fused(ready(weights, backend, "cpu").sums(x), x, dense, weights)
    with pytest.raises(ValueError, match="255 columns, the layer takes 256"):
        ready(weights, backend, "cpu").sums(swiglu(3, 255, False))


ROUTES = [
    *(("int8", route) for route in ("dense:triton", "dense:exact", "restore:triton", "cusparselt", None)),
    *(("fp8", route) for route in ("dense:tensorwise", "dense:rowwise", "restore:tensorwise", "cusparselt", None)),
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
        x = tokens(m, 528)
        check(execution.sums(x.cuda()), x, dense, weights)
        for scaled in (False, True):
            for fused in (swiglu(m, 528, scaled, "cuda"), normed(m, 528, scaled, "cuda")):
                for _ in range(2):  # as decided, too
                    check_fused(execution.sums(fused), fused, dense, weights)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_prepared_op_widens_a_cut_shard(rank: int) -> None:
    shard = Shard.even(Pattern.parse("4:6"), 56, rank, 4)
    for scheme in ("int8", "fp8"):
        kind = SCHEMES[scheme]
        weight, scale = quantize_weight(prune.prune(torch.randn(16, 14), shard.pattern, offset=shard.offset), kind)
        weights = Weights(shard.pack(weight), kind, scale)
        owner, execution = nn.Module(), Execution(weights, sums=True)
        name = prepared.prepare(owner, execution, DTYPE, torch.device("cpu"), None, margins=shard.margins)
        x = tokens(5, 14)
        check(prepared.sums(x, name, 16), x, weight, weights)
        prepared.warm(name, (1, 8))
        torch.library.opcheck(torch.ops.slidesparse.sums, (x, name, 16))
        gated, behind = swiglu(5, 14, True), normed(5, 14, True)
        check_fused(prepared.silu_mul_sums(*gated, name, 16), gated, weight, weights)
        torch.library.opcheck(torch.ops.slidesparse.silu_mul_sums, (*gated, name, 16))
        inputs = (*behind[:4], *behind[5:], name, 16)
        y, y_scale, total = prepared.add_rms_norm_sums(*inputs)
        check_fused((y, y_scale), behind._replace(total=total), weight, weights)
        torch.library.opcheck(torch.ops.slidesparse.add_rms_norm_sums, inputs)
        with pytest.raises(UnsupportedError, match="before asking for its sums"):
            prepared.sums(x.float(), name, 16)


@pytest.mark.needs_gpu
@on_gpu
@pytest.mark.parametrize("backend", ["dense", "cusparselt"])
def test_sums_are_captured(backend: str) -> None:
    weights, dense = made(256, 512, "int8", device="cuda")
    owner, execution = nn.Module(), Execution(weights, backend=backend, sums=True)
    name = prepared.prepare(owner, execution, DTYPE, torch.device("cuda", 0), None)
    prepared.warm(name, (16,))
    x, graph = torch.zeros(16, 512, dtype=DTYPE, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = prepared.sums(x, name, 256)
    fresh = tokens(16, 512)
    x.copy_(fresh)
    graph.replay()
    check(found, fresh, dense, weights)
    gated, graph = swiglu(16, 512, False, "cuda"), torch.cuda.CUDAGraph()
    gate_up = torch.zeros_like(gated.gate_up)
    with torch.cuda.graph(graph):
        found = prepared.silu_mul_sums(gate_up, None, None, name, 256)
    gate_up.copy_(gated.gate_up)
    graph.replay()
    check_fused(found, gated, dense, weights)


@pytest.mark.parametrize(
    ("route", "gives"), [("dense:cublaslt", False), ("dense:triton", True), ("cusparselt:exact", False), ("cusparselt:", True)]
)
def test_a_route_that_applies_scales_itself_is_refused(route: str, gives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in registry.backends():
        monkeypatch.setattr(type(backend), "refuses", lambda *_: None)
    problem = made(32, 64, "int8")[0].problem(DTYPE, torch.device("cuda"), None)
    assert registry.refusal(route, problem) is None
    assert (registry.refusal(route, problem, sums=True) is None) == gives
    if not gives:
        with pytest.raises(UnsupportedError, match="cannot leave scales"):
            registry.named(route, problem, 16, sums=True)


def test_sums_of_a_layer_that_is_not_ready_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="prepare the layer"):
        Execution(made(32, 64, "int8")[0], sums=True).sums(tokens(3, 64))
