"""The methods by name, and the one door to them that checks its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WeightError
from ..pattern import Pattern
from ..quantization import check_finite
from .admm import admm
from .magnitude import magnitude
from .random import random
from .sparsegpt import sparsegpt
from .statistics import Statistics
from .wanda import wanda

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8)


@dataclass(frozen=True)
class Method:
    """A pruning method.

    ``calibrated`` says that ``run(weight [N, K], pattern, statistics)`` prunes and needs statistics; the others take ``offset`` and
    ``generator`` instead, see `prune`. ``corrects``: weights that stay are changed too, and the result is float32.
    """

    run: Callable[..., Tensor]
    calibrated: bool = False
    corrects: bool = False


METHODS = {
    "magnitude": Method(lambda weight, pattern, offset, generator: magnitude(weight, pattern, offset)),
    "random": Method(lambda weight, pattern, offset, generator: random(weight, pattern, offset, generator=generator)),
    "wanda": Method(wanda, calibrated=True),
    "sparsegpt": Method(sparsegpt, calibrated=True, corrects=True),
    "admm": Method(admm, calibrated=True, corrects=True),
}


def method_named(name: str) -> Method:
    """Look a method up.

    Raises:
        ValueError: unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"unknown pruning method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def prune(
    weight: Tensor,
    pattern: Pattern | str,
    method: str = "magnitude",
    *,
    statistics: Statistics | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Copy of ``weight [N, K]`` that obeys the pattern: exactly ``dropped`` units per group zeroed, as +0.0.

    Args:
        method: one of `METHODS`.
        statistics: of the layer's inputs, for the calibrated methods.
        offset: units by which the row starts inside its first group; not for the calibrated methods.
        generator: source of randomness for ``random``; a fixed one (seed 0) when not given.

    Raises:
        ValueError: unknown method or pattern, K is not a whole number of units, or statistics or an offset that the method cannot use.
        WeightError: a dtype that cannot be pruned, NaN or Inf, statistics that do not fit, or numbers too large to correct in float32.
    """
    pattern, chosen = Pattern.parse(pattern), method_named(method)
    if weight.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise WeightError(f"cannot prune {weight.dtype} weights: cast to one of {known}")
    pattern.units(weight.shape[1])
    check_finite(weight)
    if not chosen.calibrated:
        if statistics is not None:
            raise ValueError(f"{method} takes no statistics: leave them out, or choose a calibrated method")
        return chosen.run(weight, pattern, offset, generator or torch.Generator().manual_seed(0))
    if statistics is None:
        raise ValueError(f"{method} needs statistics of the layer's inputs (slidesparse.pruning.Statistics)")
    if offset:
        raise ValueError(f"{method} prunes rows that start with a group, got offset {offset}: prune whole rows")
    if weight.dtype.itemsize == 1:
        raise WeightError(f"{method} cannot prune {weight.dtype} weights: prune the 16-bit ones")
    statistics.check(weight.shape[1], hessian=chosen.corrects)
    pruned = chosen.run(weight, pattern, statistics)
    if chosen.corrects:
        check_finite(pruned, f"pruned by {method}, weight")
    return pruned
