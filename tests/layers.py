"""Layers for tests of kernels: stored weights, activations, and what they should give."""

from __future__ import annotations

import torch
from torch import Tensor

from slidesparse import pruning, reference
from slidesparse.format import SCHEMES
from slidesparse.gemm import Weights
from slidesparse.ops.prologue import Gated, Normed
from slidesparse.packing import pack
from slidesparse.pattern import Pattern
from slidesparse.quantization import dequantize_nvfp4, nvfp4_global_scale, quantize_nvfp4, quantize_weight

DTYPE = torch.bfloat16


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


def quantised(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """What a scheme multiplies: quantised activations and token scales, or the activations themselves."""
    return reference.quantize(x, weights.scheme) if weights.scheme.dynamic else (x, None)


def oracle(x: Tensor, weights: Weights, dense: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One rounding, on the CPU."""
    q, s = quantised(x.cpu(), weights)
    scale = None if weights.channel_scale is None else weights.channel_scale.cpu()
    return reference.linear(q, s, dense, scale, None if bias is None else bias.cpu(), dtype)


def unscaled_oracle(x: Tensor, weights: Weights, dense: Tensor) -> tuple[Tensor, Tensor]:
    """The unscaled product, rounded once from float32, and the token scales, on the CPU: channels of int8 are scaled, of fp8 not."""
    q, s = reference.quantize(x.cpu(), weights.scheme)
    sums = (q.double() @ dense.double().t()).float()
    return (sums * weights.scale.cpu().view(1, -1) if weights.scheme.name == "int8" else sums).to(DTYPE), s
