"""The arithmetic that routes and backends share: dense weights, exact integer sums, and the epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops.rescale import scaled
from ..ops.w8a8 import WIDEST_K
from ..quant import dequantize_nvfp4
from .problem import Problem, Weights

INT32_SAFE_K = WIDEST_K
"""Widest K whose int8 products, at most 128 · 127 each, are sure to fit an int32 sum."""


_CHUNK = 1024  # 1024 products of at most 128 · 128 sum to at most 2^24, which float32 still holds exactly


def int32_overflow(problem: Problem) -> str | None:
    """Why int32 cannot be trusted with this problem's sums, None if it can."""
    if problem.scheme.name == "int8" and problem.k > INT32_SAFE_K:
        return f"K = {problem.k} int8 products may overflow an int32 sum, which holds {INT32_SAFE_K}"
    return None


def dense_weights(problem: Problem, weights: Weights) -> Tensor:
    """Dense weights ``[N, K]`` in the problem's compute dtype."""
    dense = ops.restore(weights.packed)
    if weights.scheme.pair:
        dense = dequantize_nvfp4(dense, weights.scale, weights.global_scale)
    return dense.to(problem.compute_dtype)


def products(q: Tensor, dense: Tensor) -> Tensor:
    """Sums of 8-bit products, ``[M, K]`` · ``[N, K]``ᵀ: int32 and exact of int8, float32 of the others."""
    return int_matmul(q, dense) if q.dtype == torch.int8 else q.to(torch.float32) @ dense.to(torch.float32).t()


def finish(problem: Problem, sums: Tensor, x_scale: Tensor | None, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Sums ``[M, N]`` → outputs: weight scale ``[N, 1]``, token scale ``[M, 1]`` and bias in float32, one rounding.

    One pass by a kernel in eager mode; plain torch under torch.compile, which fuses it with whatever consumes the output.
    """
    if sums.device.type == "cuda" and not torch.compiler.is_compiling():
        return ops.rescale(sums, x_scale, scale, bias, problem.dtype, n=problem.n)
    return scaled(sums, x_scale, None if scale is None else scale.view(1, -1), bias, problem.dtype)


def int_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Exact int8 product ``[M, K]`` · ``[N, K]``ᵀ → int32 ``[M, N]``; K at most `INT32_SAFE_K`.

    torch._int_mm wherever it is exact and takes the shape: on a CPU with int8 dot products it was 3 to 5 times as fast as float32
    (4096 × 4096, 2 cores: 0.3 against 1.3 ms at M = 1, 8 against 32 ms at M = 128, 27 against 59 ms at M = 512), needs no float copy
    of the weights, and takes every shape but K = 1, where it is wrong (torch 2.13). Elsewhere float32 in chunks of K short enough to
    be exact.
    """
    usable = _int_mm_takes(q, weight) if q.device.type == "cuda" else q.shape[1] > 1 and _int_mm_is_exact(q.device.type)
    if usable:
        return torch._int_mm(q, weight.t())
    total = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        total += (q[:, columns].to(torch.float32) @ weight[:, columns].to(torch.float32).t()).to(torch.int32)
    return total


def _int_mm_takes(q: Tensor, weight: Tensor) -> bool:
    """cuBLASLt's limits: more than 16 rows, K and N multiples of 8."""
    return q.shape[0] > 16 and q.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0


# A plain table: torch.compile looks into it, but would trace through a cached function.
_EXACT: dict[str, bool] = {}


def _int_mm_is_exact(device: str) -> bool:
    if device not in _EXACT:
        _EXACT[device] = _probe_int_mm(device)
    return _EXACT[device]


def _probe_int_mm(device: str) -> bool:
    """Whether int8 products are summed exactly here: CPUs without int8 dot products may saturate pairs of them at 16 bits."""
    for left, right in ((127, 127), (127, -128)):
        q = torch.full((17, 256), left, dtype=torch.int8, device=device)
        weight = torch.full((32, 256), right, dtype=torch.int8, device=device)
        try:
            product = torch._int_mm(q, weight.t())
        except (RuntimeError, NotImplementedError):
            return False
        if not bool((product == 256 * left * right).all()):
            return False
    return True
