"""Magnitude pruning: per group the smallest |w| go, ties to the lowest index (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing.codes import integer_view
from ..pattern import Pattern
from .selection import zero_smallest

_MAGNITUDE_BITS = {torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF, torch.float8_e4m3fn: 0x7F, torch.float32: 0x7FFFFFFF}


def magnitude(weight: Tensor, pattern: Pattern, offset: int = 0) -> Tensor:
    """Pruned copy of ``weight [N, K]``: bfloat16, float16, float32, float8_e4m3fn or int8; a pair's magnitude is the
    float32 sum of its two."""
    return zero_smallest(weight, _scores(weight, pattern), pattern, offset)


def _scores(weight: Tensor, pattern: Pattern) -> Tensor:
    """Integers in the order of the magnitudes: the bits of a non-negative float sort as the float does."""
    if pattern.unit > 1:
        sums = weight.float().abs().unflatten(-1, (-1, pattern.unit)).sum(-1)
        return sums.view(torch.int32).long()
    if weight.dtype == torch.int8:
        return weight.int().abs()
    codes = integer_view(weight)
    return (codes.long() if weight.dtype == torch.float32 else codes.int()) & _MAGNITUDE_BITS[weight.dtype]
