"""8-bit products on Hopper's tensor cores with both scales and the bias inside: slid weights on the sparse ones, dense weights on the others."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops, reference
from ...ops import sm90
from ...ops.launch import allocator, current_stream
from ...ops.prologue import Activations, quantiser
from ..layouts import Copy
from ..problem import Problem, Weights
from .base import Kernel, Pipeline, int32_overflow

_OUTPUTS = (torch.bfloat16, torch.float16)


class TiledLayout:
    """Weights slid to 2:4 in the order in which the kernel reads them: uint8 ``[tiles down, across, 10240]``."""

    name = "tiled"

    def nbytes(self, problem: Problem) -> int:
        """Half the slid values and two bits for each, in whole tiles."""
        return sm90.tiled_bytes(problem.n, problem.pattern.slid_k(problem.k))

    def prepare(self, problem: Problem, weights: Weights) -> Copy:
        """Slide and put into tiles."""
        return (sm90.tile(ops.slide(weights.packed)),)

    def dense(self, problem: Problem, copy: Copy) -> Tensor:
        """Out of the tiles, each slid weight to the column that was lifted there."""
        slid = sm90.untile(copy[0], problem.n, problem.pattern.slid_k(problem.k), problem.scheme.dtype)
        columns = torch.arange(1, problem.k + 1, dtype=torch.float32, device=slid.device).view(1, -1)
        source = reference.lift(columns, problem.pattern)[0].long() - 1
        row, column = slid.view(torch.uint8).nonzero(as_tuple=True)
        dense = torch.zeros(problem.n, problem.k, dtype=torch.uint8, device=slid.device)
        dense[row, source[column]] = slid.view(torch.uint8)[row, column]
        return dense.view(problem.scheme.dtype)


class Sm90(Kernel):
    """Quantises (and lifts), then one kernel multiplies, scales, adds the bias and rounds once.

    A variant names the tile's tokens and the cluster, as ``256 2x1``.
    """

    name = "sm90"
    layouts = ("tiled", "dense")
    code = (
        "gemm.kernels.sm90", "ops.sm90.layout", "ops.sm90.variants", "ops.sm90.launch", "ops.prologue", "ops.quantize",
        "ops.kernels_quantize", "ops.row_config",
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
        if variant:
            try:
                sm90.Variant.parse(variant)
            except ValueError as error:
                return str(error)
        return int32_overflow(problem)

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        """By predicted time."""
        width = problem.pattern.slid_k(problem.k)
        return tuple(map(str, sorted(sm90.VARIANTS, key=lambda variant: sm90.predicted_clocks(variant, problem.n, width, m, sparse=True))))

    def leaves(self, problem: Problem, variant: str) -> frozenset[str]:
        """Nothing: all scales are inside."""
        return frozenset()

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, unscaled: bool, direct: bool) -> Pipeline:
        """See `Kernel`."""
        m, n, sparse = x.shape[0], problem.n, layout == "tiled"
        width = -(-problem.pattern.slid_k(problem.k) // 16) * 16 if sparse else problem.k
        chosen = sm90.Variant.parse(variant)
        bias = "" if problem.bias is None else str(problem.bias).removeprefix("torch.")
        names = [str(dtype).removeprefix("torch.") for dtype in (problem.scheme.dtype, problem.dtype)]
        index = x.device.index or 0
        gemm = sm90.loaded(chosen, sm90.Types(names[0], sparse, names[1], bias), index)
        order, empty = sm90.tile_order(n, m, chosen, x.device), allocator(x.device)
        columns = -(-n // 8) * 8

        def multiply(q: Tensor, x_scale: Tensor, copy: Copy, scale: Tensor, added: Tensor | None) -> Tensor:
            y = empty((m, columns), (columns, 1), problem.dtype)
            y = y if columns == n else y[:, :n]
            gemm(q, x_scale, copy[0], scale, added, order, y, current_stream(index))
            return y

        quantise = quantiser(x, problem.scheme, problem.pattern if sparse else None, width, 1, direct)
        return Pipeline(layout, quantise, multiply, None, True)
