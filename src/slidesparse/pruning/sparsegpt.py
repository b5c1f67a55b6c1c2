"""SparseGPT: column by column, what a pruned weight did is passed on to the columns behind (Frantar & Alistarh, arXiv 2301.00774)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern
from .selection import keep_largest
from .statistics import Scaled, Statistics, inverse_factor


def sparsegpt(weight: Tensor, pattern: Pattern, statistics: Statistics, *, block: int = 128, damping: float = 0.01) -> Tensor:
    """Pruned and corrected weights, float32 ``[N, K]``.

    A group's mask is chosen when its first column is reached, by w² / (U_cc)², U the upper Cholesky factor of H⁻¹.

    Args:
        weight: ``[N, K]``, any float type.
        statistics: with the Hessian.
        block: columns worked on at a time, rounded to whole groups; the result does not depend on it beyond rounding.
        damping: this part of the mean of diag H is added to the diagonal.

    Raises:
        WeightError: a Hessian that cannot be factorised.
    """
    problem = Scaled.of(statistics, damping)
    return sweep(weight.float() * problem.scale, pattern, problem, block) / problem.scale


def sweep(scaled_weight: Tensor, pattern: Pattern, problem: Scaled, block: int = 128) -> Tensor:
    """`sparsegpt` on weights ``[N, K]`` that are scaled already: scaling a column changes neither the choice nor the correction."""
    factor = inverse_factor(problem.hessian)
    group = pattern.group * pattern.unit
    width = max(block // group, 1) * group
    weight, k = scaled_weight.clone(), scaled_weight.shape[1]
    for first in range(0, k, width):
        last = min(first + width, k)
        part, errors = _sweep_block(weight[:, first:last], factor[first:last, first:last], pattern)
        weight[:, first:last] = part
        weight[:, last:] -= errors @ factor[first:last, last:]
    return weight


def _sweep_block(weight: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Pruned columns ``[N, width]`` of one block, and the errors to pass on to the columns behind it."""
    # Columns as rows: every step then works on contiguous memory.
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    errors = torch.empty_like(columns)
    diagonal, group = factor.diagonal(), pattern.group * pattern.unit
    pivots = diagonal.tolist()
    for start in range(0, len(pivots), group):
        stop = min(start + group, len(pivots))
        score = (columns[start:stop] / diagonal[start:stop].unsqueeze(-1)).square_()
        keep = keep_largest(score.t(), pattern).t().to(columns.dtype)
        for column in range(start, stop):
            pruned = columns[column] * keep[column - start]
            torch.sub(columns[column], pruned, out=errors[column]).div_(pivots[column])
            columns[column] = pruned
            if column + 1 < len(pivots):
                columns[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    # A product with 0 keeps the sign: +0.0 is what pruning writes.
    return columns.t() + 0.0, errors.t()
