"""Rounding to 8 bits that knows what the layer computes: coordinate descent on the grid (after QuantEase, arXiv 2309.01885)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import Scheme
from ..quant import quantize_weight
from .statistics import Statistics, row_errors

_SWEEPS, _BLOCK = 2, 128


def round_to_grid(solution: Tensor, weight: Tensor, statistics: Statistics, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """8-bit values ``[N, K]`` and scales float32 ``[N, 1]`` near ``solution [N, K]`` that best give the outputs of ``weight [N, K]``.

    Scales are those of the solution's rows, max|w| / Q. From the nearest grid points on, one column after the other takes the grid
    point with the smallest error given all others; zeros stay zeros. No row's error is larger than that of nearest rounding.
    """
    nearest, scale = quantize_weight(solution.float(), scheme)
    hessian = statistics.hessian
    start = nearest.float() * scale
    found = _descend(start, weight.float(), hessian, scale, scheme)
    better = row_errors(weight, found * scale, hessian) < row_errors(weight, start, hessian)
    return torch.where(better.unsqueeze(-1), _to_grid(found, scheme), nearest), scale


def _descend(start: Tensor, weight: Tensor, hessian: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Grid values (not yet scaled) float32 ``[N, K]`` after the sweeps."""
    # Transposed, [K, N]: a column is a contiguous row.
    point = start.t().clone(memory_format=torch.contiguous_format)
    keep, scale = (point != 0).float(), scale.t()
    gradient = hessian @ (point - weight.t())
    diagonal = hessian.diagonal()
    # An input that was never seen gives no reason to move.
    step = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal)).tolist()
    for _ in range(_SWEEPS):
        for first in range(0, len(step), _BLOCK):
            last = min(first + _BLOCK, len(step))
            near, local, before = gradient[first:last].clone(), hessian[first:last, first:last], point[first:last].clone()
            for column in range(last - first):
                row = point[first + column]
                wanted = torch.add(row, near[column], alpha=-step[first + column])
                moved = _to_grid(wanted.div_(scale[0]), scheme).float().mul_(scale[0]).mul_(keep[first + column])
                near.addr_(local[:, column], moved - row)
                point[first + column] = moved
            gradient.addmm_(hessian[:, first:last], point[first:last] - before)
    return (point / scale).t()


def _to_grid(x: Tensor, scheme: Scheme) -> Tensor:
    """The nearest values of the scheme's dtype, ties to even, within ±Q."""
    clamped = x.clamp(-scheme.bound, scheme.bound)
    return clamped.round().to(scheme.dtype) if scheme.dtype == torch.int8 else clamped.to(scheme.dtype)
