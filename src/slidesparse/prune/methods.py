"""The methods by name, and the one door to them that checks its input."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from ..errors import WeightError
from ..pattern import Pattern
from ..quant import check_finite
from .magnitude import magnitude
from .random import random

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8)


class Method(StrEnum):
    """How the weights that go are chosen."""

    MAGNITUDE = "magnitude"
    RANDOM = "random"


METHODS = tuple(method.value for method in Method)


def prune(
    weight: Tensor, pattern: Pattern, method: str = "magnitude", *, offset: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Copy of ``weight [N, K]`` that obeys the pattern: exactly ``dropped`` units per group zeroed, as +0.0.

    Args:
        method: one of `METHODS`.
        offset: units by which the row starts inside its first group.
        generator: source of randomness for ``random``; a fixed one (seed 0) when not given.

    Raises:
        ValueError: unknown method, or K is not a whole number of units.
        WeightError: a dtype that cannot be pruned, NaN or Inf.
    """
    if weight.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise WeightError(f"cannot prune {weight.dtype} weights: cast to one of {known}")
    pattern.units(weight.shape[1])
    check_finite(weight)
    match Method(method):
        case Method.MAGNITUDE:
            return magnitude(weight, pattern, offset)
        case Method.RANDOM:
            return random(weight, pattern, offset, generator=generator or torch.Generator().manual_seed(0))
