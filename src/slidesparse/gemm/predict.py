"""What runs a layer that nobody measured, on a card whose constants come with the package: a model's times, where their lead is clear.

Sparse tensor cores run the layer only where their predicted whole linear is `WANTED` times as fast as the dense one by the same model for
many tokens, `ASKED` times on average over these, and at least as fast for few. Predictions for random layers are within 5 % for half, and
within 15 % for nine of ten; the fastest library product is up to 10 % faster than the modelled dense one. Hence the average asked for.
"""

from __future__ import annotations

from sys import maxsize

from ..ops import sm90
from .choose import Steps, geometric_mean
from .kernels import kernels
from .problem import Problem
from .route import Route

WANTED, ASKED = 1.1, 1.2
MANY = (1024, 2048, 4096, 8192, 16384)
FEW = (1, 16, 64, 256)
_DENSE, _SPARSE = "dense", "tiled"


def predicted_us(problem: Problem, route: Route, m: int, rates: sm90.Rates) -> float:
    """Microseconds of a whole linear by a route of the kernel for compute capability 9.0."""
    sparse = route.layout == _SPARSE
    width = problem.pattern.slid_k(problem.k) if sparse else problem.k
    values = str(problem.scheme.dtype).removeprefix("torch.")
    variant = sm90.Variant.parse(route.variant)
    return sm90.predicted_us(variant, problem.n, problem.k, width, m, values=values, sparse=sparse, rates=rates)


def predicted_gains(problem: Problem, card: str) -> dict[int, float]:
    """By number of tokens, how many times as fast as dense weights sparse ones are; empty for cards without constants, or no kernel."""
    rates, kernel = sm90.RATES.get(card), kernels()["sm90"]
    if rates is None or kernel.refuses(problem) is not None:
        return {}
    return {m: _best(problem, _DENSE, m, rates)[0] / _best(problem, _SPARSE, m, rates)[0] for m in (*FEW, *MANY)}


def predicted_steps(problem: Problem, card: str) -> Steps:
    """The routes of a layer that nobody measured, by number of tokens; none where dense weights should run."""
    gains = predicted_gains(problem, card)
    if not gains or min(gains[m] for m in FEW) < 1:
        return ()
    many = [gains[m] for m in MANY]
    if min(many) < WANTED or geometric_mean(many) < ASKED:
        return ()
    asked = (*FEW, *MANY)
    routes = (_best(problem, _SPARSE, m, sm90.RATES[card])[1] for m in asked)
    return tuple(zip((*asked[:-1], maxsize), routes, strict=True))


def _best(problem: Problem, layout: str, m: int, rates: sm90.Rates) -> tuple[float, Route]:
    """The variant of least predicted time, of those without a split: what a split takes is less certain."""
    kernel = kernels()["sm90"]
    routes = [Route(layout, "sm90", one) for one in kernel.variants(problem, m) if not sm90.Variant.parse(one).split]
    return min((predicted_us(problem, route, m, rates), route) for route in routes)
