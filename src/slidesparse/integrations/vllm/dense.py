"""vLLM's own dense linears: layers that no plan makes faster are given back to them, and their product takes part in plans.

A layer that runs dense whatever the number of tokens is to vLLM what it would be in a dense checkpoint: the same kernels, and the same
fusions of norm and activation with quantisation, which an op of ours would hide from vLLM's compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from sys import maxsize

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from vllm import _custom_ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8, CompressedTensorsW8A8Int8

from ... import ops
from ...format import Scheme
from ...gemm import Execution, Problem, active_plan, key_of
from ...gemm.numerics import int32_overflow
from ...gemm.registry import refusal
from ...gemm.routes import Route, add_route, ones

Apply = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
"""Runs a layer: ``(layer, x [M, K], bias [N] or None)`` → ``[M, N]``."""

ROUTE = "cutlass"

HOST_US = 250.0
"""Outside CUDA graphs a layer must keep the GPU busy for so long, or a step waits for the host, of which an op of ours takes more.

On the host of an H100 vLLM took 160 µs a linear layer, with all that stands between two of them, and 90 more with an op of ours.
"""


def can_give_back(scheme: Scheme, device: torch.device) -> bool:
    """Whether vLLM multiplies weights and activations of this scheme here."""
    return device.type == "cuda" and (not scheme.dynamic or _multiplies(scheme))


def _multiplies(scheme: Scheme) -> bool:
    """Whether vLLM's W8A8 kernels run on this card: fp8 from compute capability 8.9, int8 before 10.0."""
    return ops.capability() >= (8, 9) if scheme.name == "fp8" else (7, 5) <= ops.capability() < (10, 0)


def why_give_back(
    execution: Execution, problem: Problem, captured: Sequence[int], *, most: int = maxsize, host_us: float = HOST_US
) -> str | None:
    """Why a layer had better be vLLM's own, None if it had not.

    Beyond the numbers of tokens that vLLM captures in CUDA graphs an op of ours costs the host more than vLLM's own: there a layer must
    run sparse for every number of tokens, and never take less than ``host_us``, or it is no gain. Where nobody timed vLLM's W8A8
    product, nobody knows; 16-bit products are torch's own in both. No step has more than ``most`` tokens.
    """
    plan, key, rival = active_plan().plan, key_of(problem), f"dense:{ROUTE}"
    if plan is None or not plan.cells.get(key):
        return "nothing was measured: run `slidesparse tune --vllm`"
    if refusal(rival, problem) is None and not plan.compares(key, rival, sums=execution.for_sums):
        return "the plan has not compared them: run `slidesparse tune --vllm`"
    steps, largest = execution.planned_steps(problem), max(captured, default=0)
    if all(choice.backend.layout == "dense" for _, choice in steps):
        return "nothing was measured to be faster"
    if most <= largest:
        return None
    if any(last > largest and choice.backend.layout == "dense" for last, choice in steps):
        return f"sparse does not pay for all numbers of tokens above {largest}, the most that is captured in a CUDA graph"
    times = {m: cell.times(execution.for_sums) for m, cell in plan.table(key, sums=execution.for_sums).items()}
    runs = {m: str(next(choice for last, choice in steps if m <= last)) for m in times}
    return _host_bound({m: times[m][route].p50 for m, route in runs.items() if route in times[m]}, largest, host_us)


def _host_bound(took: Mapping[int, float], largest: int, host_us: float) -> str | None:
    """Why the host would be what a step waits for, just beyond the largest number of tokens in a CUDA graph; microseconds by tokens."""
    if not took:
        return None
    m = max((m for m in took if m <= largest + 1), default=min(took))
    us = took[m]
    if us >= host_us:
        return None
    enough = min((m for m, us in took.items() if m > largest and us >= host_us), default=None)
    way_out = "" if enough is None else f"; --max-cudagraph-capture-size {enough} would change that"
    return f"{m} tokens take {us:.0f} µs, less than the host needs outside CUDA graphs{way_out}"


def give_back(layer: nn.Module, scheme: Scheme, weight: Tensor, scale: Tensor | None) -> Apply:
    """Make a layer on dense weights ``[N, K]`` and scales ``[N, 1]`` what vLLM makes of a dense checkpoint's."""
    if not scheme.dynamic:
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


def offer_route() -> None:
    """Let vLLM's W8A8 kernels take part: ``tune`` times them as ``dense:cutlass``, and plans may choose them."""
    add_route(ROUTE, Route(_refuses, _run, _sums))


def _refuses(problem: Problem) -> str | None:
    if not problem.scheme.dynamic or problem.device != "cuda":
        return "multiplies int8 and fp8 on CUDA"
    if problem.dtype not in (torch.bfloat16, torch.float16) or problem.bias not in (None, problem.dtype):
        return "needs a 16-bit output and a bias of its type"
    if problem.n % 16 or problem.k % 16:
        return f"N = {problem.n} and K = {problem.k} must be multiples of 16"
    if not hasattr(torch.ops._C, "cutlass_scaled_mm"):
        return "this vLLM was built without its CUTLASS kernels"
    if not _multiplies(problem.scheme):
        return f"vLLM's {problem.scheme.name} kernels do not run on compute capability {'.'.join(map(str, ops.capability()))}"
    return int32_overflow(problem)


def _run(problem: Problem, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    q, x_scale = ops.quantize(x, problem.scheme)
    return _custom_ops.cutlass_scaled_mm(q, weight.t(), x_scale, scale, problem.dtype, bias)


def _sums(problem: Problem, q: Tensor, weight: Tensor) -> Tensor:
    one = ones(q.device, 1)
    return _custom_ops.cutlass_scaled_mm(q, weight.t(), one, one, torch.bfloat16)
