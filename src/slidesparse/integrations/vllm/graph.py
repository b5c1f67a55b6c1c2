"""What of a packed linear stands in vLLM's graph, where its compiler fuses it: quantisation before the product, scales and bias behind.

Sparse tensor cores give sums without token scales; a pass of its own over the output to apply them costs up to a fifth of the product. In
the graph they join SiLU, residual and norm, or the rotation of queries and keys, as quantisation joins what comes before the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig, get_current_vllm_config_or_none

from ...format import Scheme
from ...gemm.prepared import sums

_CACHE_KEY = "slidesparse_layers"


def compiles() -> bool:
    """Whether the model that is being built goes through vLLM's compiler."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.compilation_config.mode == CompilationMode.VLLM_COMPILE


def enter_cache_key(config: VllmConfig | None, layer: str, how: str) -> bool:
    """Let vLLM's compile cache tell graphs apart: how a layer stands in them depends on plans, which it does not see.

    Its key covers ``additional_config``; False where a plugin keeps that in a form of its own.
    """
    if config is None:
        return True
    if not isinstance(config.additional_config, dict):
        return False
    entered = config.additional_config.get(_CACHE_KEY, {}) | {layer: how}
    config.additional_config = config.additional_config | {_CACHE_KEY: entered}
    return True


def quantise_rows(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Each row of ``x [M, K]`` quantised, as ``[M, K]`` of the scheme's type and float32 scales ``[M, 1]``, in plain torch.

    The arithmetic is that of `reference.quantize`, as the compiler has it: where its division is not rounded as IEEE 754 asks, an element
    that lies halfway between two values may go to either.
    """
    x32 = x.to(torch.float32)
    scale = x32.abs().amax(-1, keepdim=True) / scheme.bound
    scale = torch.where(scale == 0, 1.0, scale)
    q = x32 / scale
    if scheme.dtype == torch.int8:
        q = q.round()
    return q.clamp(-scheme.bound, scheme.bound).to(scheme.dtype), scale


def fused_linear(layer: nn.Module, x: Tensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
    """``x [M, K]`` → ``[M, N]``: quantise, the prepared layer's bare product, weight scale, token scale and bias in float32, rounded."""
    q, x_scale = quantise_rows(x, scheme)
    y = sums(q, layer.slidesparse_name, layer.slidesparse_outputs).to(torch.float32) * layer.slidesparse_scale * x_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)
