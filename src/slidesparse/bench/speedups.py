"""What rows say together: sums over layers, speed-ups, and how much of what 2:4 gains a pattern keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..pattern import Pattern
from .kernel import CONTROL
from .models import Shape
from .rows import OK, Row

FORMULA = "efficiency = (S of the pattern ÷ S of 2:4) ÷ (0.5 ÷ density), S: times as fast as dense"
CAVEAT = "It flatters a pattern where 2:4 itself gains little: read it beside the speed-up, never alone."
_OURS = ("slid", "tiled")
"""Layouts of this package on sparse tensor cores; rivals have rows of their own."""


@dataclass
class Curve:
    """One pattern and scheme: summed times of layers by number of tokens, on sparse tensor cores and dense."""

    scheme: str
    pattern: str
    sparse: dict[int, float] = field(default_factory=dict)
    dense: dict[int, float] = field(default_factory=dict)

    def speedups(self) -> dict[int, float]:
        """Dense over sparse."""
        return {m: self.dense[m] / us for m, us in sorted(self.sparse.items()) if m in self.dense}

    @property
    def bound(self) -> float:
        """What sparse tensor cores of twice the rate allow."""
        return 1.0 if self.pattern == CONTROL else Pattern.parse(self.pattern).bound


def curves(rows: Sequence[Row], shapes: Collection[Shape] | None = None, what: str = "linear") -> list[Curve]:
    """Curves of the given shapes summed, or of all that there are; a number of tokens counts where every shape has it."""
    cells: dict[tuple[str, str], dict[int, dict[Shape, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.status != OK or row.what != what or row.us is None or row.bench != "kernel":
            continue
        pair = cells[row.scheme, row.pattern][row.m].setdefault((row.n, row.k), [float("inf"), float("inf")])
        layout = row.route.partition(":")[0]
        at = 1 if layout == "dense" else 0 if layout in _OURS else None
        if at is not None:
            pair[at] = min(pair[at], row.us)
    wanted = set(shapes) if shapes is not None else {shape for table in cells.values() for cell in table.values() for shape in cell}
    found = []
    for (scheme, pattern), table in sorted(cells.items(), key=lambda item: (item[0][0], _density(item[0][1]))):
        curve = Curve(scheme, pattern)
        for m, cell in sorted(table.items()):
            sparse, dense = (sum(cell.get(shape, [float("inf")] * 2)[at] for shape in wanted) for at in (0, 1))
            if dense < float("inf"):
                curve.dense[m] = dense
            if sparse < float("inf"):
                curve.sparse[m] = sparse
        found.append(curve)
    return found


def efficiencies(found: Sequence[Curve]) -> dict[tuple[str, str], dict[int, float]]:
    """By scheme and pattern: the share of 2:4's gain that is left, each measured against its own bound."""
    halves = {curve.scheme: curve.speedups() for curve in found if curve.pattern == "2:4"}
    return {
        (curve.scheme, curve.pattern): _shares(curve.speedups(), halves.get(curve.scheme, {}), _density(curve.pattern))
        for curve in found
        if curve.pattern not in (CONTROL, "2:4")
    }


def _shares(gains: Mapping[int, float], halves: Mapping[int, float], density: float) -> dict[int, float]:
    return {m: gain / halves[m] / (0.5 / density) for m, gain in gains.items() if m in halves}


def _density(pattern: str) -> float:
    return 1.0 if pattern in (CONTROL, "") else Pattern.parse(pattern).density
