"""8-bit products for compute capability 9.0, scales and bias inside: slid weights on sparse tensor cores, dense ones on the others."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import sm90
from ...ops.launch import allocator, current_stream
from ...ops.prologue import Activations, quantiser
from ..layouts import Copy
from ..problem import Problem
from .base import Kernel, Pipeline, int32_overflow

_OUTPUTS = (torch.bfloat16, torch.float16)


class Sm90(Kernel):
    """Quantises (and lifts), then one kernel multiplies, scales, adds the bias and rounds once.

    A variant names the tile's tokens and the cluster, as ``256 2x1``.
    """

    name = "sm90"
    layouts = ("tiled", "dense")
    code = (
        "gemm.kernels.base", "gemm.kernels.sm90", "gemm.layouts", "ops.sm90.gemm.cu", "ops.sm90.launch", "ops.sm90.layout",
        "ops.sm90.variants", "ops.prologue", "ops.quantize", "ops.kernels_quantize", "ops.row_config",
    )  # fmt: skip

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        """Needs compute capability 9.0, an 8-bit scheme, 16-bit activations, and 2:4 windows of single weights."""
        if problem.capability != (9, 0):
            return "runs on GPUs of compute capability 9.0"
        if not problem.scheme.dynamic:
            return f"multiplies int8 and fp8, not {problem.scheme.name}"
        if problem.dtype not in _OUTPUTS:
            return f"gives bfloat16 and float16, not {problem.dtype}"
        pattern = problem.pattern
        if (pattern.n, pattern.l, pattern.unit) != (2, 4, 1):
            return f"pattern {pattern} is not one of 2:4 hardware and single weights"
        if problem.n % 8 or problem.k % 16:
            return f"copies rows of 16 bytes: N must be a multiple of 8 and K of 16, not {problem.n} and {problem.k}"
        if variant:
            try:
                sm90.Variant.parse(variant)
            except ValueError as error:
                return str(error)
        return int32_overflow(problem) or sm90.unavailable()

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        """By predicted time on slid weights."""
        return self._by_time(problem, m, sparse=True)

    def search(self, problem: Problem, x: Tensor, copy: Copy) -> tuple[str, ...]:
        """The three of the least predicted time: the best of them was within 3 % of the fastest for each of 128 products measured."""
        return self._by_time(problem, x.shape[0], sparse=copy[0].dim() == 3)[:3]

    def _by_time(self, problem: Problem, m: int, *, sparse: bool) -> tuple[str, ...]:
        width = problem.pattern.slid_k(problem.k) if sparse else problem.k
        found = sorted(sm90.VARIANTS, key=lambda variant: sm90.predicted_clocks(variant, problem.n, width, m, sparse=sparse))
        return tuple(map(str, found))

    def leaves(self, problem: Problem, variant: str) -> frozenset[str]:
        """Nothing: all scales are inside."""
        return frozenset()

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, unscaled: bool, direct: bool) -> Pipeline:
        """See `Kernel`."""
        m, n, sparse, index = x.shape[0], problem.n, layout == "tiled", x.device.index or 0
        width = -(-problem.pattern.slid_k(problem.k) // 16) * 16 if sparse else problem.k
        bias = "" if problem.bias is None else str(problem.bias).removeprefix("torch.")
        values, out = (str(dtype).removeprefix("torch.") for dtype in (problem.scheme.dtype, problem.dtype))
        gemm = sm90.loaded(sm90.Variant.parse(variant), sm90.Types(values, sparse, out, bias), index)
        order, empty = gemm.order(m, n), allocator(x.device)

        def multiply(q: Tensor, x_scale: Tensor, copy: Copy, scale: Tensor, added: Tensor | None) -> Tensor:
            y = empty((m, n), (n, 1), problem.dtype)
            gemm(q, x_scale, copy[0], scale, added, order, y, current_stream(index))
            return y

        return Pipeline(layout, quantiser(x, problem.scheme, problem.pattern if sparse else None, width, 1, direct), multiply, None, True)
