"""Rounding to 8 bits that knows what the layer computes: coordinate descent on the grid (after QuantEase, arXiv 2309.01885)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import Scheme
from ..quantization import quantize_rows
from .statistics import Statistics, row_errors

_BLOCK = 128


def round_to_grid(solution: Tensor, weight: Tensor, statistics: Statistics, scheme: Scheme, *, sweeps: int = 6) -> tuple[Tensor, Tensor]:
    """8-bit values ``[N, K]`` and scales float32 ``[N, 1]`` near ``solution [N, K]`` that best give the outputs of ``weight [N, K]``.

    Scales are those of the solution's rows, max|w| / Q. From the nearest grid points on, one column after the other takes the grid
    point with the smallest error given all others, in ``sweeps`` sweeps at most; zeros stay zeros. No row's error is larger than that of
    nearest rounding.
    """
    nearest, scale = quantize_rows(solution.float(), scheme)
    hessian, start = statistics.moments, nearest.float()
    found = _descend(start, solution != 0, weight.float() / scale, hessian, scheme, sweeps)
    better = row_errors(weight, found * scale, hessian) < row_errors(weight, start * scale, hessian)
    values = torch.where(better.unsqueeze(-1), found, start)
    # -0.0 is a zero like any other.
    return (values + 0.0).to(scheme.dtype), scale


def _descend(start: Tensor, keep: Tensor, weight: Tensor, hessian: Tensor, scheme: Scheme, sweeps: int) -> Tensor:
    """Values ``[N, K]`` after the sweeps, which end when nothing moves; all in units of the rows' scales, float32."""
    # Transposed, [K, N]: a column is a contiguous row.
    point = start.t().clone(memory_format=torch.contiguous_format)
    keep = keep.t().float()
    gradient = hessian @ (point - weight.t())
    diagonal = hessian.diagonal()
    # An input that was never seen gives no reason to move.
    step = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal)).tolist()
    for _ in range(sweeps):
        last_point = point.clone()
        for first in range(0, len(step), _BLOCK):
            last = min(first + _BLOCK, len(step))
            near, local, before = gradient[first:last].clone(), hessian[first:last, first:last], point[first:last].clone()
            for column in range(last - first):
                row = point[first + column]
                moved = _on_grid(torch.add(row, near[column], alpha=-step[first + column]), scheme).mul_(keep[first + column])
                # For the columns behind; a row of the symmetric Hessian is contiguous.
                near[column + 1 :].addr_(local[column, column + 1 :], moved - row)
                row.copy_(moved)
            gradient.addmm_(hessian[:, first:last], point[first:last] - before)
        if torch.equal(point, last_point):
            break
    return point.t()


def _on_grid(x: Tensor, scheme: Scheme) -> Tensor:
    """The nearest values of the scheme's dtype, ties to even, within ±Q, as float32."""
    clamped = x.clamp(-scheme.largest, scheme.largest)
    return clamped.round() if scheme.dtype == torch.int8 else clamped.to(scheme.dtype).float()
