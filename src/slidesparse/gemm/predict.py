"""What runs a layer that nobody measured, on a card whose constants come with the package: a model's times, where their lead is clear.

Sparse tensor cores run the layer only where their predicted whole linear is `WANTED` times as fast as the dense one by the same model for
many tokens, `ASKED` times on average over these, and no slower for few. Predictions for other layers of more than 64 tokens are within 3 %
for half, and within 10 % for nine of ten; of 8 bits the fastest library product is up to 12 % faster than the modelled dense one. Hence the
average asked for. For 16 tokens the four layers of Qwen2.5-7B gained 1.03 to 1.41 over the fastest dense product (fp8, int8), where the
model says 1.01 to 1.51.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from sys import maxsize

from ..ops import sm90
from .choose import Steps, cell_of, geometric_mean
from .kernels import kernels
from .kernels.sm90 import Sm90
from .problem import Problem
from .route import Route

EVEN, WANTED, ASKED = 1.0, 1.1, 1.2
MANY = (1024, 2048, 4096, 8192, 16384)
FEW = (1, 16, 64, 256)


def predicted_gains(problem: Problem, card: str) -> dict[int, float]:
    """By number of tokens, how many times as fast as dense weights sparse ones are; empty for cards without constants, or no kernel."""
    if card not in sm90.RATES or kernels()[Sm90.name].refuses(problem) is not None:
        return {}
    return {m: _gain(problem, card, m) for m in (*FEW, *MANY)}


def predicted_steps(problem: Problem, card: str, tokens: Collection[int] | None = None) -> Steps:
    """The routes of a layer that nobody measured, by number of tokens; none where dense weights should run.

    Args:
        tokens: the numbers of tokens that count, for each of which the next larger one of `FEW` and `MANY` stands; by default all of these.
    """
    known = predicted_gains(problem, card)
    if not known:
        return ()
    asked = {cell_of(known, m) for m in tokens} if tokens else known.keys()
    few, many = ([known[m] for m in asked & {*group}] for group in (FEW, MANY))
    if min(few, default=EVEN) < EVEN or min(many, default=WANTED) < WANTED or geometric_mean(many or few) < ASKED:
        return ()
    numbers = (*FEW, *MANY)
    routes = (Route("tiled", Sm90.name, str(_best(problem, card, m, sparse=True)[1])) for m in numbers)
    return tuple(zip((*numbers[:-1], maxsize), routes, strict=True))


def _gain(problem: Problem, card: str, m: int) -> float:
    dense, sparse = (_best(problem, card, m, sparse=sparse)[0] for sparse in (False, True))
    return dense / sparse


@lru_cache(maxsize=4096)
def _best(problem: Problem, card: str, m: int, *, sparse: bool) -> tuple[float, sm90.Variant]:
    """The variant of least predicted time, of those without a split: what a split takes is less certain."""
    found = Sm90.predicted(problem, m, sparse=sparse, rates=sm90.RATES[card])
    return min(((us, variant) for us, variant in found if not variant.split), key=lambda timed: (timed[0], str(timed[1])))
