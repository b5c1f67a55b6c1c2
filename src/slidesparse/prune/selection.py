"""Zero the units with the smallest keys in every group, by running minima instead of a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pack.codes import integer_view, pad_to_groups
from ..pattern import Pattern

_POSITION_BITS = 6  # groups hold at most 64 units


def zero_smallest(weight: Tensor, score: Tensor, pattern: Pattern, offset: int = 0) -> Tensor:
    """Copy of ``weight [N, K]`` with, per group, the units of smallest ``score`` set to +0.0, ties to the lowest index.

    ``score`` holds a non-negative integer per unit, ``[N, K/unit]``: int32 below 2^25 - 1, or int64 below 2^57 - 1. Positions outside
    the row are taken first.
    """
    # Score and position in one integer: all keys of a group differ, so the threshold zeroes exactly `dropped` of them.
    padded = pad_to_groups(score + 1, pattern, offset)
    keys = padded.view(-1, pattern.group).t().contiguous()
    keys <<= _POSITION_BITS
    keys += torch.arange(pattern.group, dtype=keys.dtype, device=keys.device).unsqueeze(-1)
    smallest = [torch.full_like(keys[0], torch.iinfo(keys.dtype).max) for _ in range(pattern.dropped)]
    for key in keys:
        for level in range(pattern.dropped):
            smallest[level], key = torch.minimum(smallest[level], key), torch.maximum(smallest[level], key)
    keep = (keys > smallest[-1]).t().contiguous().view(padded.shape)
    keep = keep[:, offset : offset + score.shape[1]]
    codes = integer_view(weight, pattern.unit)
    return (codes * keep.to(codes.dtype)).view(weight.dtype)
