"""Which weights of a group go: the units with the smallest scores, ties to the lowest index."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing.codes import by_group, by_position, integer_view, pad_to_groups
from ..pattern import Pattern

_POSITION_BITS = 6  # groups hold at most 64 units


def zero_smallest(weight: Tensor, score: Tensor, pattern: Pattern, offset: int = 0) -> Tensor:
    """Copy of ``weight [N, K]`` with, per group, the units of smallest ``score`` set to +0.0, ties to the lowest index.

    ``score`` holds a non-negative integer per unit, ``[N, K/unit]``: int32 below 2^25 - 1, or int64 below 2^57 - 1. Positions outside
    the row are taken first. Running minima take the place of a sort.
    """
    # Score and position in one integer: all keys of a group differ, so the threshold zeroes exactly `dropped` of them.
    padded = pad_to_groups(score + 1, pattern, offset)
    keys = by_position(padded.view(-1, pattern.group))
    keys <<= _POSITION_BITS
    keys += torch.arange(pattern.group, dtype=keys.dtype, device=keys.device).unsqueeze(-1)
    keep = by_group(keys > threshold(keys, pattern)).view(padded.shape)
    keep = keep[:, offset : offset + score.shape[1]]
    codes = integer_view(weight, pattern.unit)
    return (codes * keep.to(codes.dtype)).view(weight.dtype)


def threshold(scores: Tensor, pattern: Pattern) -> Tensor:
    """The largest score that goes: the ``dropped``-th smallest along the first dimension, ``[group, ...]`` → ``[...]``."""
    top = torch.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).max
    smallest = [torch.full_like(scores[0], top) for _ in range(pattern.dropped)]
    for score in scores:
        for level in range(pattern.dropped):
            lower = torch.minimum(smallest[level], score)
            if level + 1 < pattern.dropped:
                score = torch.maximum(smallest[level], score)
            smallest[level] = lower
    return smallest[-1]


def keep_largest(score: Tensor, pattern: Pattern) -> Tensor:
    """Which weights stay, bool ``[N, K]``, for non-negative float scores ``[N, K]``; a unit's score is the sum of its weights'.

    Exactly ``dropped`` units of every full group go. Positions outside a ragged last group go first.
    """
    n, k = score.shape
    units = score.view(n, pattern.units(k), pattern.unit).sum(-1) if pattern.unit > 1 else score
    padded = torch.nn.functional.pad(units, (0, -units.shape[1] % pattern.group), value=-1.0).unflatten(1, (-1, pattern.group))
    gone = padded.sort(dim=-1, stable=True).indices[..., : pattern.dropped]
    keep = torch.ones_like(padded, dtype=torch.bool).scatter_(-1, gone, False).flatten(1)[:, : units.shape[1]]
    return keep.repeat_interleave(pattern.unit, dim=1) if pattern.unit > 1 else keep


def masked(weight: Tensor, keep: Tensor) -> Tensor:
    """Copy of ``weight [N, K]`` with +0.0 where ``keep`` is false, and where a kept weight is −0.0."""
    return torch.where(keep & (weight != 0), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
