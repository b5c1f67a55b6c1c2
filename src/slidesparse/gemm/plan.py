"""Plans: measured times by layer shape and number of tokens, and the JSON that holds them; `choose` says what follows from the times."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..format import SCHEMES
from ..measure import Timing
from ..pattern import Pattern
from .machine import Machine
from .problem import Problem
from .route import Route

VERSION = 2

Key = tuple[int, int, str, str]
"""N, K, pattern, scheme."""


def key_of(problem: Problem) -> Key:
    """The key of a problem in a plan: the types of activations and bias are left out, since they hardly change the times."""
    return problem.n, problem.k, str(problem.pattern), problem.scheme.name


def problem_of(key: Key, capability: tuple[int, int]) -> Problem:
    """A problem of this key, with the activations that its scheme is used with, no bias."""
    n, k, pattern, name = key
    scheme = SCHEMES[name]
    return Problem(n, k, Pattern.parse(pattern), scheme, capability, torch.bfloat16 if scheme.dynamic else scheme.dtype)


@dataclass
class Cell:
    """One number of tokens: times of whole linears by route, and what was dropped, routes and kernels, with the reason.

    ``versions`` are the versions of the kernels that were tried. ``errors`` are largest errors against the oracle; files leave them out.
    ``brief`` cells hold a choice of routes: advice is made of them, and nothing else.
    """

    m: int
    times: dict[Route, Timing] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[Route, float] = field(default_factory=dict, compare=False)
    brief: bool = False

    @property
    def tried(self) -> frozenset[str]:
        """The kernels of the routes that were timed, or dropped with a reason."""
        return frozenset(route.kernel for route in (*self.times, *(Route.parse(name) for name in self.dropped if ":" in name)))

    @property
    def met(self) -> frozenset[str]:
        """The same, and the kernels that were refused."""
        return self.tried | {name for name in self.dropped if ":" not in name}


@dataclass
class Plan:
    """Cells by layer shape, and the machine on which they were measured."""

    machine: Machine
    cells: dict[Key, dict[int, Cell]] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def add(self, key: Key, cell: Cell) -> None:
        """Put a cell in; one of the same number of tokens is replaced."""
        self.cells.setdefault(key, {})[cell.m] = cell

    def times(self, key: Key, *, without: Collection[Route] = ()) -> dict[int, dict[Route, Timing]]:
        """A layer's times by number of tokens in rising order, ``without`` some routes; cells that hold none are left out."""
        found = {}
        for m, cell in sorted(self.cells.get(key, {}).items()):
            times = {route: timing for route, timing in cell.times.items() if route not in without}
            if times:
                found[m] = times
        return found

    def routes(self, key: Key) -> list[Route]:
        """Every route that was timed for a layer."""
        return sorted({route for cell in self.cells.get(key, {}).values() for route in cell.times})

    def merge(self, other: Plan, able: Callable[[Key], Collection[str]]) -> frozenset[str]:
        """Take over the other plan's cells, and return the kernels for whose sake some of them were left out.

        A cell wins over one of the same number of tokens. Cells of one layer must compare: left out are the other plan's cells that have
        not met a kernel which was timed for the layer here, and then the cells here that have not met one of those taken over. Kernels
        count that are ``able`` to run the layer.
        """
        lacking: set[str] = set()
        for key, table in other.cells.items():
            own, can = self.cells.get(key, {}), {*able(key)}
            unmet = {m: can & _timed(own) - cell.met for m, cell in table.items()}
            taken = {m: cell for m, cell in table.items() if not unmet[m] and (cell.times or m not in own)}
            lacking |= set().union(*unmet.values())
            self.cells[key] = {m: cell for m, cell in own.items() if can & _timed(taken) <= cell.met} | taken
        return frozenset(lacking)

    def without_brief(self) -> Plan:
        """The plan that decides what runs: brief cells are left out."""
        tables = {key: {m: cell for m, cell in table.items() if not cell.brief} for key, table in self.cells.items()}
        return Plan(self.machine, {key: table for key, table in tables.items() if table}, self.date)

    def keep(self, versions: Mapping[str, str], algorithms: bool) -> frozenset[str]:
        """Drop times of kernels whose version is not that in ``versions``, and return these kernels.

        What these kernels were dropped for is forgotten, too. Without ``algorithms`` so are times of variants that name a library's
        algorithm.
        """
        stale = set()
        for table in self.cells.values():
            for cell in table.values():
                changed = {name for name, version in cell.versions.items() if versions.get(name, version) != version}
                stale |= changed
                for route in [r for r in cell.times if r.kernel in changed or (not algorithms and "alg=" in r.variant)]:
                    del cell.times[route]
                for name in [name for name in cell.dropped if ":" in name and Route.parse(name).kernel in changed]:
                    del cell.dropped[name]
        return frozenset(stale)

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all, dated today."""
        self.date = datetime.date.today().isoformat()
        versions: list[Mapping[str, str]] = []
        layers = [
            {"n": n, "k": k, "pattern": pattern, "scheme": scheme, "cells": [_cell_json(table[m], versions) for m in sorted(table)]}
            for (n, k, pattern, scheme), table in sorted(self.cells.items())
        ]
        data = {"version": VERSION, "date": self.date, "machine": asdict(self.machine), "kernels": versions, "layers": layers}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(_compact(data) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, *, brief: bool = False) -> Plan:
        """Read and check a plan; with its ``brief`` cells, too, if asked.

        Raises:
            CheckpointError: not a plan, another version, or a value that makes no sense; names file and place.
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
            versions = [{str(name): str(version) for name, version in found.items()} for found in data["kernels"]]
            for layer in data["layers"]:
                key = _checked_key(layer)
                for cell in layer["cells"]:
                    plan.add(key, _checked_cell(cell, versions))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}): run tune again") from error
        return plan if brief else plan.without_brief()


def _timed(cells: Mapping[int, Cell]) -> set[str]:
    return {route.kernel for cell in cells.values() for route in cell.times}


def _cell_json(cell: Cell, versions: list[Mapping[str, str]]) -> dict[str, Any]:
    tried = cell.tried
    own = {name: version for name, version in sorted(cell.versions.items()) if name in tried}
    if own not in versions:
        versions.append(own)
    times = {str(route): _timing_json(timing) for route, timing in cell.times.items()}
    found: dict[str, Any] = {"m": cell.m, "kernels": versions.index(own), "us": times}
    return found | ({"dropped": cell.dropped} if cell.dropped else {}) | ({"brief": True} if cell.brief else {})


def _timing_json(timing: Timing) -> list[float | str]:
    return [*(round(value, 2) for value in (timing.p50, timing.p20, timing.p80)), *(["sustained"] if timing.sustained else [])]


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


def _checked_cell(cell: dict[str, Any], versions: list[dict[str, str]]) -> Cell:
    m, at = cell["m"], cell["kernels"]
    if type(m) is not int or m < 1 or type(at) is not int or at < 0:
        raise ValueError(f"{m!r} tokens, kernels {at!r}")
    times = {Route.parse(name): Timing(*_checked_times(name, timing)) for name, timing in cell["us"].items()}
    dropped = {str(name): str(reason) for name, reason in cell.get("dropped", {}).items()}
    return Cell(m, times, dropped, versions[at], brief=bool(cell.get("brief")))


def _checked_times(name: str, times: Sequence[Any]) -> tuple[float, float, float, bool]:
    p50, p20, p80 = (float(value) for value in times[:3])
    if not 0 < p20 <= p50 <= p80 < float("inf") or times[3:] not in ([], ["sustained"]):
        raise ValueError(f"times of {name}: {times}")
    return p50, p20, p80, bool(times[3:])
