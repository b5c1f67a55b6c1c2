"""Layers for tests of kernels: stored weights, activations, and what they should give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slidesparse import pruning, reference
from slidesparse.format import SCHEMES
from slidesparse.gemm import Problem, Weights
from slidesparse.ops.prologue import Gated, Normed
from slidesparse.packing import pack
from slidesparse.pattern import Pattern
from slidesparse.quantization import dequantize_nvfp4, nvfp4_global_scale, quantize_nvfp4, quantize_weight

DTYPE = torch.bfloat16
HOPPER = (9, 0)
hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER, reason="needs compute capability 9.0"
)


def posed(n: int, k: int, scheme: str, pattern: str, bias: torch.dtype | None = None) -> Problem:
    """With activations as kernels take them."""
    kind = SCHEMES[scheme]
    return Problem(n, k, Pattern.parse(pattern), kind, HOPPER, torch.bfloat16 if kind.dynamic else kind.dtype, bias)


def made(n: int, k: int, scheme: str, pattern: str = "6:8", device: str = "cpu") -> tuple[Weights, Tensor]:
    """Stored weights, and the dense matrix ``[N, K]`` on the CPU that they stand for before scaling (nvfp4: after)."""
    kind, parsed = SCHEMES[scheme], Pattern.parse(pattern)
    weight = pruning.prune(torch.randn(n, k), parsed)
    if kind.pair:
        factor = nvfp4_global_scale(float(weight.abs().max()))
        values, scale = quantize_nvfp4(weight, factor)
        weights = Weights(pack(values, kind.pattern_stored(parsed)), kind, scale, torch.tensor([factor]))
        return weights.to(torch.device(device)), dequantize_nvfp4(values, scale, weights.global_scale)
    values, scale = quantize_weight(weight, kind)
    return Weights(pack(values, parsed), kind, scale).to(torch.device(device)), values


def tokens(m: int, k: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Rows of very different scales: a bias added before the token scale would show."""
    return (torch.randn(m, k) * torch.logspace(-3, 3, m).view(-1, 1)).to(dtype)


def swiglu(m: int, k: int, device: str = "cpu") -> Gated:
    """Gates and ups of rows of very different scales."""
    return Gated((torch.randn(m, 2 * k) * torch.logspace(-2, 2, m).view(-1, 1)).to(device, DTYPE))


def normed(m: int, k: int, device: str = "cpu") -> Normed:
    """A norm's inputs of rows of very different scales."""
    x = torch.randn(m, k) * torch.logspace(-2, 2, m).view(-1, 1)
    x, residual, weight = (one.to(device, DTYPE) for one in (x, torch.randn(m, k), torch.rand(k)))
    return Normed(x, residual, weight, 1e-6, torch.zeros(m, k, dtype=DTYPE, device=device))


def quantised(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """What a scheme multiplies: quantised activations and token scales, or the activations themselves."""
    return reference.quantize(x, weights.scheme) if weights.scheme.dynamic else (x, None)


def oracle(x: Tensor, weights: Weights, dense: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One rounding, on the CPU."""
    q, s = quantised(x.cpu(), weights)
    scale = None if weights.channel_scale is None else weights.channel_scale.cpu()
    return reference.linear(q, s, dense, scale, None if bias is None else bias.cpu(), dtype)
