"""Products for compute capability 9.0, scales and bias inside: slid weights on sparse tensor cores, dense ones on the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ... import ops
from ...ops import sm90
from ...ops.launch import allocator, current_stream
from ...ops.prologue import Activations, quantiser
from ...ops.quantize import moves_nothing
from ...pattern import Pattern
from ..layouts import Copy
from ..problem import Problem
from .base import Kernel, Pipeline, int32_overflow

_OUTPUTS = (torch.bfloat16, torch.float16)


class Sm90(Kernel):
    """Quantises (and lifts), then one kernel multiplies, scales, adds the bias and rounds once; 16-bit weights have no scales.

    A variant names the tile's tokens and the cluster, as ``256 2x1``, and whether steps are divided evenly: ``256 2x1 split``.
    """

    name = "sm90"
    layouts = ("tiled", "dense")
    code = (
        "gemm.kernels.base", "gemm.kernels.sm90", "gemm.layouts", "ops.sm90.device.cu", "ops.sm90.gemm.cu", "ops.sm90.launch",
        "ops.sm90.layout", "ops.sm90.predict", "ops.sm90.schedule", "ops.sm90.variants", "ops.prologue", "ops.quantize",
        "ops.kernels_quantize", "ops.row_config",
    )  # fmt: skip

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        """Needs compute capability 9.0, 16-bit activations, weights of 8 bits or of their type, and 2:4 windows of single weights."""
        if problem.capability != (9, 0):
            return "runs on GPUs of compute capability 9.0"
        if problem.scheme.pair:
            return f"multiplies int8, fp8, bf16 and fp16, not {problem.scheme.name}"
        if problem.dtype not in _OUTPUTS:
            return f"gives bfloat16 and float16, not {problem.dtype}"
        if not problem.scheme.dynamic and not problem.native:
            return "weights, activations and bias are not of one 16-bit type"
        pattern = problem.pattern
        if (pattern.n, pattern.l, pattern.unit) != (2, 4, 1):
            return f"pattern {pattern} is not one of 2:4 hardware and single weights"
        step = _step(problem)
        if problem.n % 8 or problem.k % step:
            return f"copies rows of 16 bytes: N must be a multiple of 8 and K of {step}, not {problem.n} and {problem.k}"
        if variant:
            try:
                parsed = sm90.Variant.parse(variant)
            except ValueError as error:
                return str(error)
            if not sm90.fits(parsed, problem.scheme.name, problem.bias is not None):
                return f"variant {variant} of int8 products with a bias takes more registers than there are"
        return int32_overflow(problem) or sm90.unavailable()

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        """By predicted time on slid weights; split ones last: their predicted times are less certain."""
        found = [variant for _, variant in self.predicted(problem, m, sparse=True)]
        return tuple(map(str, sorted(found, key=lambda variant: variant.split)))

    def search(self, problem: Problem, x: Tensor, copy: Copy) -> tuple[str, ...]:
        """Those of least predicted time: three, the best within 6 % of the fastest for 128 products measured, and two split ones."""
        found = [variant for _, variant in self.predicted(problem, x.shape[0], sparse=copy[0].dim() == 3)]
        divided = [variant for variant in found if variant.split]
        return tuple(map(str, [*[variant for variant in found if not variant.split][:3], *divided[:2]]))

    @staticmethod
    def predicted(problem: Problem, m: int, *, sparse: bool, rates: sm90.Rates = sm90.H200) -> list[tuple[float, sm90.Variant]]:
        """Microseconds of a whole linear of ``m`` tokens by every variant, the least first, on ``sparse`` slid weights or on dense ones."""
        n, k, scheme = problem.n, problem.k, problem.scheme
        width, values = problem.pattern.slid_k(k) if sparse else k, str(scheme.dtype).removeprefix("torch.")
        able = [one for one in sm90.VARIANTS if sm90.fits(one, scheme.name, problem.bias is not None)]
        found = [(sm90.predicted_us(one, n, k, width, m, values=values, sparse=sparse, rates=rates), one) for one in able]
        return sorted(found, key=lambda timed: timed[0])

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, direct: bool) -> Pipeline:
        """See `Kernel`."""
        m, n, sparse, index = x.shape[0], problem.n, layout == "tiled", x.device.index or 0
        width = -(-problem.pattern.slid_k(problem.k) // _step(problem)) * _step(problem) if sparse else problem.k
        bias = "" if problem.bias is None else str(problem.bias).removeprefix("torch.")
        values, out = (str(dtype).removeprefix("torch.") for dtype in (problem.scheme.dtype, problem.dtype))
        with torch.cuda.device(x.device):
            gemm = sm90.loaded(sm90.Variant.parse(variant), sm90.Types(values, sparse, out, bias), index)
            work, empty = gemm.table(m, n, width), allocator(x.device)

        def multiply(q: Tensor, x_scale: Tensor | None, copy: Copy, scale: Tensor | None, added: Tensor | None) -> Tensor:
            y = empty((m, n), (n, 1), problem.dtype)
            gemm(q, x_scale, copy[0], scale, added, work, y, current_stream(index), early=passes)
            return y

        def multiply_there(q: Tensor, x_scale: Tensor | None, copy: Copy, scale: Tensor | None, added: Tensor | None) -> Tensor:
            with torch.cuda.device(q.device):
                return multiply(q, x_scale, copy, scale, None if added is None else added.contiguous())

        pattern = problem.pattern if sparse else None
        lifted = None if pattern is None or moves_nothing(pattern, 0) else pattern
        passes = problem.scheme.dynamic or lifted is not None  # another kernel stands between those that made the weights and this one
        quantise: Callable[..., tuple[Tensor, Tensor | None]] = (
            quantiser(x, problem.scheme, pattern, width, 1, direct)
            if problem.scheme.dynamic
            else partial(_rows, pattern=lifted, width=width)
        )
        return Pipeline(layout, quantise, multiply if direct else multiply_there)


def _step(problem: Problem) -> int:
    """Values in 16 bytes."""
    return 16 // problem.scheme.dtype.itemsize


def _rows(x: Tensor, pattern: Pattern | None, width: int) -> tuple[Tensor, None]:
    """16-bit activations, lifted if there is a pattern, in rows that bulk copies take: as they lie wherever that does."""
    if pattern is not None:
        return ops.lift(x, pattern, width=width), None
    m, k = x.shape
    spaced = m == 1 or (x.stride(0) >= k and x.stride(0) % 8 == 0)
    if x.stride(1) == 1 and spaced and x.data_ptr() % 16 == 0:
        return x, None
    return x.clone(memory_format=torch.contiguous_format), None
