"""vLLM's own dense linears: layers that no plan makes faster are given back to them, and their product takes part in plans.

A layer that runs dense whatever the number of tokens is to vLLM what it would be in a dense checkpoint: the same kernels, and the same
fusions of norm and activation with quantisation, which an op of ours would hide from vLLM's compiler.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from ... import ops
from ...compat.vllm import CompressedTensorsW8A8Fp8, CompressedTensorsW8A8Int8, UnquantizedLinearMethod, cutlass_scaled_mm, has_cutlass
from ...format import Scheme
from ...gemm import Problem, active_plan, register
from ...gemm.kernels.base import int32_overflow
from ...gemm.kernels.dense import HERE, ROWS, DenseKernel, Scale
from ...gemm.runner import cannot_run
from ...ops.launch import allocate
from ..engine.policy import Decision, decide
from ..vllm_facts import KERNEL, facts

Apply = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
"""Runs a layer: ``(layer, x [M, K], bias [N] or None)`` → ``[M, N]``."""


def can_give_back(scheme: Scheme, device: torch.device) -> bool:
    """Whether vLLM multiplies weights and activations of this scheme here."""
    return device.type == "cuda" and (not scheme.dynamic or _multiplies(scheme, ops.capability(device)))


def _multiplies(scheme: Scheme, capability: tuple[int, int]) -> bool:
    """Whether vLLM's W8A8 kernels run on such a card: fp8 from compute capability 8.9, int8 before 10.0."""
    return capability >= (8, 9) if scheme.name == "fp8" else (7, 5) <= capability < (10, 0)


def decided(problem: Problem, *, most: int, swiglu: bool) -> Decision:
    """Whose a layer is by the plan in force, see `engine.policy.decide`."""
    plan = active_plan().plan
    without = frozenset() if plan is None else cannot_run(plan, problem)
    return decide(problem, plan, facts(problem, most=most, swiglu=swiglu), without)


def give_back(layer: nn.Module, scheme: Scheme, weight: Tensor, scale: Tensor | None) -> Apply:
    """Make a layer on dense weights ``[N, K]`` and scales ``[N, 1]`` what vLLM makes of a dense checkpoint's."""
    if scale is None:
        method = UnquantizedLinearMethod()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        method.process_weights_after_loading(layer)
        return method.apply
    if scheme.name == "int8":
        stock = CompressedTensorsW8A8Int8(strategy="channel", is_static_input_scheme=False, input_symmetric=True)
    else:
        arguments = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False)
        stock = CompressedTensorsW8A8Fp8(arguments, is_static_input_scheme=False)
    n, k = weight.shape
    with torch.device("meta"):
        stock.create_weights(
            layer=layer, input_size_per_partition=k, output_partition_sizes=[n], input_size=k, output_size=n,
            params_dtype=layer.params_dtype, weight_loader=_never_loaded,
        )  # fmt: skip
    layer.weight, layer.weight_scale = nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)
    stock.process_weights_after_loading(layer)
    return stock.apply_weights


def _never_loaded(*arguments: object) -> None:
    raise AssertionError("the weights are there already")


def offer_kernel() -> None:
    """Let vLLM's W8A8 kernels take part: ``tune`` times them as ``dense:cutlass``, and plans may choose them."""
    register(DenseKernel(KERNEL, _refuses, _run, code=(*HERE, *ROWS)))


def _refuses(problem: Problem) -> str | None:
    if not problem.scheme.dynamic or not problem.cuda:
        return "multiplies int8 and fp8 on CUDA"
    if problem.dtype not in (torch.bfloat16, torch.float16) or problem.bias not in (None, problem.dtype):
        return "needs a 16-bit output and a bias of its type"
    if problem.n % 16 or problem.k % 16:
        return f"N = {problem.n} and K = {problem.k} must be multiples of 16"
    if not has_cutlass():
        return "this vLLM was built without its CUTLASS kernels"
    if not _multiplies(problem.scheme, problem.capability):
        return f"vLLM's {problem.scheme.name} kernels do not run on compute capability {'.'.join(map(str, problem.capability))}"
    return int32_overflow(problem)


def _run(problem: Problem, q: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Scale) -> Tensor:
    y = allocate(q, q.shape[0], weight.shape[0], problem.dtype)
    cutlass_scaled_mm(y, q, weight.t(), x_scale, scale, bias)
    return y
