"""Names of vLLM, whose next version may move any of them, and what is asked of its objects beyond their public methods.

Importing this imports vLLM, so only `integrations` may. An older vLLM than the oldest tested, or one that lacks a name, raises
`UnsupportedError` with the way out.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from torch import Tensor

from ..errors import UnsupportedError
from .versions import check_vllm, not_imported

check_vllm(vllm.__version__)  # of an older one, the imports could fail with a less helpful message

try:
    from vllm import ir
    from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
    from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig, get_current_vllm_config_or_none
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        RowParallelLinear,
        UnquantizedLinearMethod,
        register_weight_loader_v2_supported_method,
    )
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8, CompressedTensorsW8A8Int8
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter
    from vllm.platforms import current_platform
except ImportError as error:
    raise UnsupportedError(not_imported("vllm", error)) from error

__all__ = [
    "CUDAGraphMode", "ChannelQuantScaleParameter", "CompilationMode", "CompressedTensorsConfig", "CompressedTensorsW8A8Fp8",
    "CompressedTensorsW8A8Int8", "InductorPass", "LinearBase", "LinearMethodBase", "ModelWeightParameter", "ParallelLMHead",
    "PerTensorScaleParameter", "QuantizationConfig", "QuantizeMethodBase", "RoutedExperts", "RowParallelLinear", "UnquantizedLinearMethod",
    "VllmConfig", "add_pass", "cutlass_scaled_mm", "enable_fake_mode", "fused_add_rms_norm",
    "get_current_vllm_config_or_none", "has_cutlass", "load_data", "register_method", "register_weight_loader_v2_supported_method",
    "silu_and_mul",
]  # fmt: skip


def register_method(name: str, config: type) -> bool:
    """Make a quantization method known to vLLM; False where it was known already."""
    if name in QUANTIZATION_METHODS:
        return False
    register_quantization_config(name)(config)
    return True


def load_data(parameter: Any, part: Tensor) -> None:
    """Copy a rank's part into a parameter of vLLM's, which compares shapes."""
    parameter._assert_and_load(part)


def has_cutlass() -> bool:
    """Whether this build of vLLM has its CUTLASS kernels."""
    return hasattr(torch.ops._C, "cutlass_scaled_mm")


def cutlass_scaled_mm(y: Tensor, q: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    """``q [M, K]`` times ``weight [K, N]`` with scales by row and column and a bias, into ``y [M, N]``.

    Not by vLLM's wrapper, whose checks cost host time in every call.
    """
    torch.ops._C.cutlass_scaled_mm(y, q, weight, x_scale, w_scale, bias)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU as vLLM's layers write it into a graph: ``[M, 2 K]`` → ``[M, K]``."""
    return SiluAndMul.forward_native(gate_up)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A norm and its residual as vLLM's layers write them into a graph: normed, and the sum."""
    return ir.ops.fused_add_rms_norm.torch_op(x, residual, weight, eps, None)


def add_pass(config: VllmConfig, made: InductorPass) -> InductorPass:
    """The pass over compiled graphs in the one place that vLLM leaves for one: what is there already, or ``made``."""
    return config.compilation_config.inductor_compile_config.setdefault(current_platform.pass_key, made)
