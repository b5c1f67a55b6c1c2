"""Random pruning: the floor any method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern
from .selection import zero_smallest


def random(weight: Tensor, pattern: Pattern, offset: int = 0, *, generator: torch.Generator) -> Tensor:
    """Pruned copy of ``weight [N, K]``: per group a uniformly random choice goes; zeros that are already there go first."""
    units = weight.shape[0], pattern.units(weight.shape[1])
    score = torch.randint(1, 1 << 24, units, dtype=torch.int32, generator=generator, device=generator.device).to(weight.device)
    nonzero = (weight.float() != 0).unflatten(-1, (-1, pattern.unit)).any(-1)
    return zero_smallest(weight, score * nonzero, pattern, offset)
