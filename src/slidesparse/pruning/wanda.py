"""Wanda: per group the smallest |w| · ‖x‖₂ go, and what stays is not changed (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern
from .selection import keep_largest, masked
from .statistics import Statistics


def wanda(weight: Tensor, pattern: Pattern, statistics: Statistics) -> Tensor:
    """Pruned copy of ``weight [N, K]``, in its dtype; a unit of two weights scores the sum of both. Needs the inputs' norms only."""
    score = weight.float().abs() * statistics.norms.to(weight.device, torch.float32)
    return masked(weight, keep_largest(score, pattern))
