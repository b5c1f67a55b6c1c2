"""Plans: measured whole linears by layer shape and number of tokens, and the choice that follows from them.

A plan keeps timings, not decisions. Dense is an ordinary candidate; another backend is chosen only where even its slow runs (80th
percentile) beat dense's quick ones (20th), or where its median does and they do so at the next smaller or larger number of tokens.
Between two measured numbers of tokens a backend other than dense runs only if both chose it. Where no dense route was tried, as in plans of
layers that are to hold no dense copy (`handover`), the quickest of the others runs. Where scales and bias are fused into whatever consumes
the output, quantisation and product without them are compared (``sums``).
"""

from __future__ import annotations

import datetime
import json
import os
from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..format import SCHEMES
from ..measure import Timing
from ..pattern import Pattern
from .machine import Machine
from .problem import Problem

VERSION = 1
FEWEST = 16
"""Rows of the smallest tiles: no product of fewer tokens is quicker."""

MEMORY = ("fast", "lean")
"""``fast`` keeps resident copies in the layouts that run best; ``lean`` keeps the packed weights only and expands them in every call."""

Key = tuple[int, int, str, str]
"""N, K, pattern, scheme."""


SUMS_OF = "sums of "
"""In front of a dropped route's name: its sums were wrong, its whole linear may be right."""


def key_of(problem: Problem) -> Key:
    """What a plan files a problem under: types of activations and bias are left out, they hardly change the times."""
    return problem.n, problem.k, str(problem.pattern), problem.scheme.name


@dataclass
class Cell:
    """One number of tokens: microseconds of every route ``backend:variant``, and the routes that were dropped, with the reason.

    ``timings`` are of whole linears, ``sums`` of linears whose scales and bias are left to the consumer of their output.
    """

    m: int
    timings: dict[str, Timing]
    dropped: dict[str, str] = field(default_factory=dict)
    sums: dict[str, Timing] = field(default_factory=dict)

    def times(self, sums: bool) -> dict[str, Timing]:
        """Those without scales and bias, or of whole linears."""
        return self.sums if sums else self.timings

    def best(self, backend: str, without: Collection[str] = (), *, sums: bool = False) -> str | None:
        """The quickest route of a backend, by its median, ``without`` some."""
        times = self.times(sums)
        names = [name for name in times if backend_of(name) == backend and name not in without]
        return min(names, key=lambda name: times[name].p50, default=None)

    def dense(self, without: Collection[str] = (), *, sums: bool = False) -> tuple[str, Timing] | None:
        """The dense route to compare with, and its time: the quickest, None if there is none.

        Where scales and bias are left to the consumer, a whole linear, which leaves it nothing, may still be the quickest.
        """
        found = [(name, self.times(family)[name]) for family in {sums, False} if (name := self.best("dense", without, sums=family))]
        return min(found, key=lambda one: one[1].p50, default=None)

    def pick(self, memory: str, without: Collection[str] = (), *, sums: bool = False) -> str | None:
        """The route that runs: the one to beat, unless another beats it by more than the spread; None where nothing was measured.

        Routes in ``without`` cannot run here; the best of the rest is the one to beat. Where no dense route was tried,
        the quickest other one runs.
        """
        times, others = self.times(sums), self.others(without, sums=sums)
        base = self.best("dense" if memory == "fast" else "restore", without, sums=sums)
        if memory == "lean":
            return base
        if base is not None:
            bar = min(times[base].p20, self.dense(without, sums=sums)[1].p20)
            others = [name for name in others if times[name].p80 < bar]
        elif any(backend_of(name.removeprefix(SUMS_OF)) == "dense" for name in (*self.timings, *self.sums, *self.dropped)):
            return None
        return min(others, key=lambda name: times[name].p50, default=base)

    def likely(self, without: Collection[str] = (), *, sums: bool = False) -> str | None:
        """The quickest route that keeps a layout of its own, by its median, if that beats dense's; None if it does not."""
        times, dense = self.times(sums), self.dense(without, sums=sums)
        other = min(self.others(without, sums=sums), key=lambda name: times[name].p50, default=None)
        return other if other is not None and dense is not None and times[other].p50 < dense[1].p50 else None

    def others(self, without: Collection[str] = (), *, sums: bool = False) -> list[str]:
        """The routes that may run instead of dense: those on packed weights would keep a third layout in memory."""
        return [name for name in self.times(sums) if backend_of(name) not in ("dense", "restore") and name not in without]


@dataclass
class Plan:
    """Cells by layer shape, and the machine on which they were measured."""

    machine: Machine
    cells: dict[Key, dict[int, Cell]] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def add(self, key: Key, cell: Cell) -> None:
        """Put a cell in; one of the same number of tokens is replaced."""
        self.cells.setdefault(key, {})[cell.m] = cell

    def table(self, key: Key, *, sums: bool = False) -> dict[int, Cell]:
        """A layer's cells that hold such times, by number of tokens in rising order."""
        cells = self.cells.get(key, {})
        return {m: cells[m] for m in sorted(cells) if cells[m].times(sums)}

    def routes(self, key: Key) -> list[str]:
        """Every route that was timed for a layer."""
        return sorted({name for cell in self.cells.get(key, {}).values() for name in cell.timings | cell.sums})

    def compares(self, key: Key, route: str, *, sums: bool = False) -> bool:
        """Whether a route was timed, or found wrong, wherever the layer was timed."""
        cells = self.table(key, sums=sums).values()
        dropped = SUMS_OF + route if sums else route
        return bool(cells) and all(route in cell.times(sums) or dropped in cell.dropped for cell in cells)

    def route(self, key: Key, m: int, memory: str, without: Collection[str] = (), *, sums: bool = False) -> str | None:
        """The route for ``m`` tokens, ``without`` those that cannot run here; None for a layer that was not measured.

        Up to `FEWEST` tokens, for which products take the same time, the fewest that were measured tell.
        """
        table = self.table(key, sums=sums)
        if not table:
            return None
        ms = list(table)
        at = bisect_left(ms, m)
        above = min(at, len(ms) - 1)
        high = self._measured(table, above, memory, without, sums)
        if ms[above] == m or at == len(ms) or (at == 0 and ms[0] <= FEWEST):
            return high
        low = self._measured(table, at - 1, memory, without, sums) if at else None
        if high is None or backend_of(high) == backend_of(low):
            return high
        return table[ms[above]].best("dense" if memory == "fast" else "restore", without, sums=sums)

    @staticmethod
    def _measured(table: dict[int, Cell], at: int, memory: str, without: Collection[str], sums: bool) -> str | None:
        """The route at the cell of that position."""
        cells = list(table.values())
        pick, likely = cells[at].pick(memory, without, sums=sums), cells[at].likely(without, sums=sums)
        if memory == "lean" or likely is None or backend_of(pick) not in (None, "dense"):
            return pick
        sure = {backend_of(near.pick(memory, without, sums=sums)) for near in cells[max(at - 1, 0) : at + 2]}
        return likely if backend_of(likely) in sure else pick

    def pays_from(self, key: Key, without: Collection[str] = (), *, sums: bool = False) -> int | None:
        """The fewest measured tokens from which every larger measured number runs on another backend than dense; None if none does."""
        first = None
        for m in reversed(self.table(key, sums=sums)):
            if backend_of(self.route(key, m, "fast", without, sums=sums)) in (None, "dense"):
                break
            first = m
        return first

    def merge(self, other: Plan) -> None:
        """Take over the other plan's cells; they win."""
        for key, table in other.cells.items():
            self.cells.setdefault(key, {}).update(table)

    def forget_algorithms(self) -> None:
        """Drop routes that name an algorithm of a library: another version numbers its own."""
        for table in self.cells.values():
            for cell in table.values():
                cell.timings, cell.sums = (
                    {name: timing for name, timing in times.items() if "alg=" not in name} for times in (cell.timings, cell.sums)
                )

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all, dated today."""
        self.date = datetime.date.today().isoformat()
        layers = [
            {"n": n, "k": k, "pattern": pattern, "scheme": scheme, "cells": [_cell_json(table[m]) for m in sorted(table)]}
            for (n, k, pattern, scheme), table in sorted(self.cells.items())
        ]
        data = {"version": VERSION, "date": self.date, "machine": asdict(self.machine), "layers": layers}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(_compact(data) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read and check a plan.

        Raises:
            CheckpointError: not a plan, a newer version, or a value that makes no sense; names file and place.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a plan: {error}") from error
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else data
            raise CheckpointError(f"{path}: plan version {found!r}, this slidesparse reads {VERSION}: run tune again")
        try:
            plan = cls(Machine(**data["machine"]), date=str(data["date"]))
            for layer in data["layers"]:
                key = _checked_key(layer)
                for cell in layer["cells"]:
                    plan.add(key, _checked_cell(cell))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}): run tune again") from error
        return plan


def backend_of(route: str | None) -> str | None:
    """The backend of a route ``backend:variant``, None of none."""
    return None if route is None else route.partition(":")[0]


def _cell_json(cell: Cell) -> dict[str, Any]:
    times, sums = (
        {name: [round(value, 2) for value in (t.p50, t.p20, t.p80)] for name, t in all_of.items()} for all_of in (cell.timings, cell.sums)
    )
    return {"m": cell.m, "us": times} | ({"sums_us": sums} if sums else {}) | ({"dropped": cell.dropped} if cell.dropped else {})


def _compact(data: dict[str, Any]) -> str:
    """One line per cell: a plan is read by people, and its changes by version control."""
    layers = []
    for layer in data["layers"]:
        head = json.dumps({name: value for name, value in layer.items() if name != "cells"}, ensure_ascii=False)[:-1]
        cells = ",\n".join("  " + json.dumps(cell, ensure_ascii=False) for cell in layer["cells"])
        layers.append(f'{head}, "cells": [\n{cells}\n ]}}')
    head = json.dumps({name: value for name, value in data.items() if name != "layers"}, ensure_ascii=False)[:-1]
    return f'{head},\n"layers": [\n' + ",\n".join(layers) + "\n]}"


def _checked_key(layer: dict[str, Any]) -> Key:
    n, k = layer["n"], layer["k"]
    if type(n) is not int or type(k) is not int or n < 1 or k < 1 or layer["scheme"] not in SCHEMES:
        raise ValueError(f"no layer: {n!r} × {k!r} {layer['scheme']!r}")
    return n, k, str(Pattern.parse(layer["pattern"])), layer["scheme"]


def _checked_cell(cell: dict[str, Any]) -> Cell:
    m = cell["m"]
    if type(m) is not int or m < 1:
        raise ValueError(f"{m!r} tokens")
    timings, sums = (
        {name: Timing(*_checked_times(name, times)) for name, times in all_of.items()} for all_of in (cell["us"], cell.get("sums_us", {}))
    )
    dropped = cell.get("dropped", {})
    return Cell(m, timings, {str(name): str(reason) for name, reason in dropped.items()}, sums)


def _checked_times(name: str, times: Iterable[Any]) -> tuple[float, float, float]:
    p50, p20, p80 = (float(value) for value in times)
    if not 0 < p20 <= p50 <= p80 < float("inf"):
        raise ValueError(f"times of {name}: {p50}, {p20}, {p80}")
    return p50, p20, p80
