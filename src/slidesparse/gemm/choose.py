"""The choice, as pure functions of measured times: which layouts of a layer's weights stay, and which route runs how many tokens.

One layout stays: the one with the lowest geometric mean of times over the asked numbers of tokens, and of those within `TIE` of it the one
of the fewest bytes. A second one stays only where it is `SECOND` times as fast for at least a quarter of the asked numbers, and both
together take at most `BUDGET` of the dense weights' bytes. A layout without a time at one of the asked numbers does not take part. Within
the layouts that stay the fastest measured route runs; one outside `DENSE` runs only where it is more than `GUARD` times as fast as the
fastest one in `DENSE`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from math import exp, fsum, isqrt, log
from sys import maxsize
from typing import TypeVar

from ..measure import Timing
from .layouts import LAYOUTS
from .plan import Plan, key_of
from .problem import Problem
from .route import Route

Times = Mapping[Route, Timing]
Steps = tuple[tuple[int, Route], ...]
"""Pairs (most tokens, route) in rising order; the last takes any number."""

Intervals = tuple[tuple[int, Route | None], ...]
"""The same, None where no route was measured."""

_Perhaps = TypeVar("_Perhaps", Route, Route | None)

GUARD = 1.02
"""The larger of 2 % and twice the spread. The spread is the median by which a route's time, over the best dense one's, moved between two
tunings of one card: 0.71 % (H200, 3071 routes) and 0.77 % (H100, 336)."""

APART = 16
"""How many times the smaller of two neighbouring measured numbers the larger one is, at least; a smaller one below 16 counts as 16.

Of 85 tables on an H200 with 16 and 256 tokens, the tile that is best at 256 takes 1.3 to 1.4 times as long as the best one at 32 and 64
tokens, by the model of times, and the one that is best at 16 takes 1.00 to 1.03 times as long. At 2 and 4 tokens, those of 1 and 16 take
1.00 to 1.01 times as long."""

TIE = 1.02
SECOND = 1.03
BUDGET = 1.25


def fastest(times: Times, layouts: Collection[str]) -> Route | None:
    """The fastest route in these layouts, one outside `DENSE` only if it is more than `GUARD` times as fast; None if none is timed."""
    dense, other = (quickest(times, [name for name in layouts if (name in DENSE) == kind]) for kind in (True, False))
    if dense is None or other is None:
        return dense or other
    return other if times[other].p50 * GUARD < times[dense].p50 else dense


DENSE = ("dense", "packed")
"""Layouts whose kernels multiply by dense weights."""


def quickest(times: Times, layouts: Collection[str]) -> Route | None:
    """The route of these layouts with the lowest median; None if none is timed."""
    return min((route for route in times if route.layout in layouts), key=lambda route: times[route].p50, default=None)


def kept_layouts(cells: Mapping[int, Times], nbytes: Mapping[str, int], tokens: Collection[int] | None = None) -> tuple[str, ...]:
    """The layouts that stay, the first one first; none where nothing was measured.

    Args:
        cells: times by number of tokens.
        nbytes: bytes of every layout that may stay.
        tokens: the asked numbers of tokens, for each of which the cell of `cell_of` stands; by default all that were measured.
    """
    asked = [cells[at] for at in ([cell_of(cells, m) for m in tokens] if tokens and cells else sorted(cells))]
    found = {name: [times[r].p50 for times in asked if (r := quickest(times, (name,))) is not None] for name in nbytes}
    us = {name: times for name, times in found.items() if len(times) == len(asked)}
    if not asked or not us:
        return ()
    means = {name: geometric_mean(times) for name, times in us.items()}
    near = [name for name, mean in means.items() if mean <= min(means.values()) * TIE]
    first = min(near, key=lambda name: (nbytes[name], means[name]))
    for second in sorted(us.keys() - {first}, key=means.__getitem__):
        gains = sum(one > SECOND * other for one, other in zip(us[first], us[second], strict=True))
        if 4 * gains >= len(asked) and nbytes[first] + nbytes[second] <= BUDGET * nbytes.get("dense", 0):
            return first, second
    return (first,)


def intervals(cells: Mapping[int, Times], layouts: Collection[str]) -> Intervals:
    """Which route runs how many tokens: pairs (most tokens, route); None where no route of these layouts was measured.

    A number of tokens between two measured ones runs what the larger of them runs; where they lie `APART`, the lower half of them, up to
    the geometric mean, runs what the smaller runs.
    """
    ends = [isqrt(m * after) if after >= APART * max(m, 16) else m for m, after in pairwise([*sorted(cells), 0])]
    steps = merged((end, fastest(cells[m], layouts)) for end, m in zip(ends, sorted(cells), strict=True))
    return (*steps[:-1], (maxsize, steps[-1][1])) if steps else ()


def merged(steps: Iterable[tuple[int, _Perhaps]]) -> tuple[tuple[int, _Perhaps], ...]:
    """One step instead of neighbours with the same route, and none that ends where an earlier one does, or before."""
    kept: list[tuple[int, _Perhaps]] = []
    for most, route in steps:
        if kept and most <= kept[-1][0]:
            continue
        if kept and kept[-1][1] == route:
            kept.pop()
        kept.append((most, route))
    return tuple(kept)


def route_at(steps: Iterable[tuple[int, Route | None]], m: int) -> Route | None:
    """What runs ``m`` tokens; None if there are no steps."""
    return next((route for most, route in steps if m <= most), None)


def choice_of(
    plan: Plan, problem: Problem, *, memory: str = "fast", tokens: Collection[int] | None = None, without: Collection[Route] = (),
) -> tuple[tuple[str, ...], Intervals]:  # fmt: skip
    """The layouts that stay for a problem and their intervals, by a plan's times.

    ``lean`` memory keeps the packed weights alone; ``without`` are routes that cannot run.
    """
    cells = plan.times(key_of(problem), without=without)
    timed = {route.layout for times in cells.values() for route in times}
    layouts: tuple[str, ...] = ("packed",)
    if memory != "lean":
        layouts = kept_layouts(cells, {name: LAYOUTS[name].nbytes(problem) for name in timed | {"dense"}}, tokens) or ("dense",)
    return layouts, intervals(cells, layouts)


def cell_of(cells: Collection[int], m: int) -> int:
    """The measured number of tokens that stands for ``m``: the same or the next larger one, or else the largest."""
    return min((at for at in cells if at >= m), default=max(cells))


def geometric_mean(values: Collection[float]) -> float:
    """1 of nothing."""
    return exp(fsum(map(log, values)) / len(values)) if values else 1.0
