"""Times of one layer: those of a plan, or where it has none those of a model of bytes and rates that is fitted to the plan.

The model has two steps. At one number of tokens a kernel takes ``a + b · N · K``, fitted to the plan's other layers. Between patterns
on sparse tensor cores the slid width K' = γ · K is all that changes, and bytes and products both grow with it: the time is
``c + d · γ``, through the times of 2:4 (γ = 1) and 6:8 (γ = 1.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..gemm.choose import DENSE, quickest
from ..gemm.layouts import LAYOUTS
from ..gemm.plan import Key, Plan
from ..gemm.route import Route
from ..measure import Timing
from ..pattern import Pattern

MEASURED = "measured"
MODEL = "model"
UNPRUNED = "dense"
"""Stands for a pattern where dense weights are meant."""
FEW = 16
"""So many tokens take hardly longer than one."""
DECODE = 64
"""Up to so many tokens in a step advice calls it decode, beyond it prefill."""
_ENDS = ("2:4", "6:8")


def phase(m: int) -> str:
    """What so many tokens in a step are, mostly."""
    return "decode" if m <= DECODE else "prefill"


@dataclass(frozen=True)
class Estimate:
    """Microseconds of a layer, where they come from, and the number of tokens that was measured: the asked one, or the next larger."""

    us: float
    source: str
    at: int


class Estimates:
    """What a plan tells of layers, and of those that it does not hold."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._fits: dict[tuple[str, str, int], tuple[tuple[float, float] | None, float]] = {}

    def of(self, n: int, k: int, scheme: str, pattern: str, m: int) -> Estimate | None:
        """The fastest whole linear on sparse tensor cores, or of `UNPRUNED` weights; None where nothing tells."""
        found = self._measured(n, k, scheme, pattern, m)
        if found is not None or pattern == UNPRUNED or pattern in _ENDS:
            return found or self._fitted(n, k, scheme, pattern, m)
        ends = [self._measured(n, k, scheme, end, m) for end in _ENDS]
        return self._between(pattern, ends) or self._fitted(n, k, scheme, pattern, m) or self._between(
            pattern, [self._fitted(n, k, scheme, end, m) for end in _ENDS]
        )  # fmt: skip

    def _measured(self, n: int, k: int, scheme: str, pattern: str, m: int) -> Estimate | None:
        """Dense weights were timed beside every pattern: the quickest counts, of those measured closest to ``m``.

        Runs differ by several per cent, so a pattern's time is what it is beside the dense time of its own run.
        """
        patterns = self._patterns if pattern == UNPRUNED else (pattern,)
        layouts = ["dense"] if pattern == UNPRUNED else [name for name in LAYOUTS if name not in DENSE]
        found: list[tuple[int, float]] = []
        for each in patterns:
            # More than twice as many tokens take other times.
            near = {at: times for at, times in self._tables.get((n, k, each, scheme), {}).items() if m <= at <= max(FEW, 2 * m)}
            routes = {at: quickest(times, layouts) for at, times in near.items()}
            found += [(at, near[at][route].p50 * self._run(n, k, scheme, each, at)) for at, route in routes.items() if route is not None]
        if not found:
            return None
        at, us = min(found)
        return Estimate(us, MEASURED, at)

    def _run(self, n: int, k: int, scheme: str, pattern: str, m: int) -> float:
        """The quickest dense time of all runs by kernels that this pattern's run timed, over its own; 1 where it timed none."""

        def dense(of: str) -> dict[str, float]:
            times = self._tables.get((n, k, of, scheme), {}).get(m, {})
            found: dict[str, float] = {}
            for route, timing in times.items():
                if route.layout == "dense":
                    found[route.kernel] = min(timing.p50, found.get(route.kernel, timing.p50))
            return found

        own = dense(pattern)
        everywhere = (us for each in self._patterns for kernel, us in dense(each).items() if kernel in own)
        return min(everywhere) / min(own.values()) if own else 1.0

    def _fitted(self, n: int, k: int, scheme: str, pattern: str, m: int) -> Estimate | None:
        key = scheme, pattern, m
        if key not in self._fits:
            points = list(self._points(*key))
            self._fits[key] = _line(points), min((size for size, _ in points), default=0.0)
        fit, smallest = self._fits[key]
        # Launches, which the line does not know, are most of a small layer's time.
        return None if fit is None or n * k < smallest / 2 else Estimate(fit[0] + fit[1] * n * k, MODEL, m)

    def _points(self, scheme: str, pattern: str, m: int) -> Iterator[tuple[float, float]]:
        for n, k in {key[:2] for key in self._tables if key[3] == scheme}:
            found = self._measured(n, k, scheme, pattern, m)
            if found is not None:
                yield float(n * k), found.us

    def _between(self, pattern: str, ends: list[Estimate | None]) -> Estimate | None:
        first, last = ends
        if first is None or last is None:
            return None
        low, high, gamma = (Pattern.parse(each).gamma for each in (*_ENDS, pattern))
        us = first.us + (last.us - first.us) * (gamma - low) / (high - low)
        return Estimate(us, MODEL, max(first.at, last.at))

    @cached_property
    def _tables(self) -> Mapping[Key, Mapping[int, Mapping[Route, Timing]]]:
        return {key: self.plan.times(key) for key in self.plan.cells}

    @cached_property
    def _patterns(self) -> tuple[str, ...]:
        return tuple(sorted({key[2] for key in self._tables}))


def _line(points: list[tuple[float, float]]) -> tuple[float, float] | None:
    """a and b of ``a + b · x`` with the least squares of relative errors, neither negative; None of fewer than three points."""
    if len(points) < 3:
        return None
    w = [1 / y**2 for _, y in points]
    total, x1, x2 = (sum(each * x**power for each, (x, _) in zip(w, points, strict=True)) for power in (0, 1, 2))
    y1, xy = (sum(each * x**power * y for each, (x, y) in zip(w, points, strict=True)) for power in (0, 1))
    spread = total * x2 - x1 * x1
    if spread <= 0:
        return None
    a, b = (y1 * x2 - x1 * xy) / spread, (total * xy - x1 * y1) / spread
    if a < 0:
        a, b = 0.0, xy / x2
    return (a, b) if b > 0 else (y1 / total, 0.0)
