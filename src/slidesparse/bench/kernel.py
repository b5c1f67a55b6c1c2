"""bench kernel: whole linears and products alone, every pattern, scheme and kernel, against the fastest dense one in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .. import measure
from ..errors import UnsupportedError, first_line
from ..format import SCHEMES
from ..gemm import Cell, Route
from ..gemm.choose import DENSE, quickest
from ..gemm.kernels import kernels
from ..gemm.tune import Bench, LinearShape
from ..measure import Timing
from ..ops import capability
from ..pattern import Pattern
from .models import Shape
from .rivals import give_up
from .rows import FAILED, OK, REFUSED, Row, Rows, device, status_of, timed

CONTROL = "control"
"""γ = 2: a 2:4 product of twice the width, which is what sliding would cost if it saved nothing."""
SCHEME_NAMES = ("int8", "fp8", "bf16", "fp16", "fp4")
EVERY = "every variant has a row"
"""Stands in rows of cells that were measured with ``every``."""
_ROUNDS = 7
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Work:
    """One cell: a shape, a scheme, a pattern or `CONTROL`, a number of tokens."""

    shape: Shape
    scheme: str
    pattern: str
    m: int

    def row(self, here: Row) -> Row:
        """What all rows of the cell share."""
        n, k = self.shape
        return replace(here, bench="kernel", what="linear", m=self.m, n=n, k=k, scheme=self.scheme, pattern=self.pattern)

    def __str__(self) -> str:
        return f"{self.shape[0]}×{self.shape[1]} {self.pattern} {self.scheme} M={self.m}"


def works(shapes: Iterable[Shape], schemes: Sequence[str], patterns: Sequence[str], tokens: Sequence[int]) -> list[Work]:
    """All cells, those of one layer behind each other."""
    distinct = dict.fromkeys(shapes)
    return [Work(shape, scheme, pattern, m) for shape in distinct for scheme in schemes for pattern in patterns for m in tokens]


def run(cells: Sequence[Work], table: Rows, here: Row, *, every: bool = False, progress: Progress | None = None) -> list[Row]:
    """Measure the cells that the table lacks, and return the new rows.

    With ``every`` each variant of a kernel gets a row, not the fastest alone; cells that were measured without are measured anew.
    Their rows stay where that fails, beside those that say why.
    """
    where, made, held = device(), [], _Held()
    told = {_refusal(row) for row in table.rows}
    lacking = [work for work in cells if not table.has(work.row(here)) or (every and _coarse(table, work.row(here)))]
    for done, work in enumerate(lacking):
        if progress:
            progress(done, len(lacking), str(work))
        found, cell = list(_rows(work, held, here, where, every)), work.row(here)
        anew = table.has(cell) and any(row.what == "linear" and row.status == OK for row in found)
        if anew:
            told = {_refusal(row) for row in table.rows if row.cell != cell.cell}
        new = []
        for row in found:
            if row.status == REFUSED and row.route and _refusal(row) in told:
                continue  # a kernel is not for this scheme or card, whatever the shape
            told.add(_refusal(row))
            new.append(row)
        if anew:
            table.replace(cell, new)
        else:
            for row in new:
                table.add(row)
        made += new
    if progress:
        progress(len(lacking), len(lacking), "")
    return made


def _coarse(table: Rows, cell: Row) -> bool:
    """Whether only the fastest variants of the cell's kernels have rows."""
    found = [row for row in table.rows if row.cell == cell.cell and row.what == "linear" and row.status == OK]
    return bool(found) and all(row.why != EVERY for row in found)


def _refusal(row: Row) -> tuple[str, ...]:
    return row.bench, row.scheme, row.route, row.why, row.card


class _Held:
    """The bench of the layer that is being measured; another layer's frees its memory."""

    def __init__(self) -> None:
        self._layers: dict[LinearShape, Bench] = {}

    def benches(self, layers: Sequence[LinearShape], device: str) -> list[Bench]:
        kept = {layer: bench for layer, bench in self._layers.items() if layer in layers}
        if len(kept) < len(self._layers):
            self._layers = kept
            if device == "cuda":
                torch.cuda.empty_cache()
        for layer in layers:
            if layer not in self._layers:
                self._layers[layer] = Bench(layer, device)
        return [self._layers[layer] for layer in layers]


def _rows(work: Work, held: _Held, here: Row, device: str, every: bool) -> Iterator[Row]:
    row, refused = work.row(here), cannot(work.scheme, device)
    if refused is not None:
        yield replace(row, status=REFUSED, why=refused)
        return
    try:
        try:
            found = _measured(work, held, row, device, every)
        except (RuntimeError, UnsupportedError) as error:
            if not give_up(first_line(error)):
                raise
            found = _measured(work, held, row, device, every)
        yield from found
    except (RuntimeError, UnsupportedError) as error:
        # Memory, a library, the card itself: the next cell may do better.
        yield replace(row, status=FAILED, why=f"{type(error).__name__}: {first_line(error)}")


def _measured(work: Work, held: _Held, row: Row, device: str, every: bool) -> list[Row]:
    return _control(work, held, row, device) if work.pattern == CONTROL else _cell(work, held, row, device, every)


def cannot(scheme: str, device: str) -> str | None:
    """Why a scheme is not timed here; None if it is."""
    if scheme == "fp4":
        return "fp4 needs compute capability 10.0" if device == "cpu" or capability() < (10, 0) else "there is no fp4 product here yet"
    if device == "cuda" and scheme == "fp8" and capability() < (8, 9):
        return "fp8 needs compute capability 8.9"
    return None


def _cell(work: Work, held: _Held, row: Row, device: str, every: bool) -> list[Row]:
    (bench,) = held.benches([LinearShape(*work.shape, Pattern.parse(work.pattern), SCHEMES[work.scheme])], device)
    cell = bench.cell(work.m, rounds=_ROUNDS)
    best = fastest_of_each(cell.times)
    dropped: dict[str, str] = {}
    alone = bench.timed(bench.products(best, work.m), dropped, _ROUNDS)
    shown = cell.times if every else {route: cell.times[route] for route in best}
    found = timed_rows(replace(row, why=EVERY if every else ""), shown, cell.errors, device)
    found += timed_rows(replace(row, what="product"), alone, {}, device)
    failed = [replace(row, what="product", route=each, status=FAILED, why=why) for each, why in dropped.items()]
    return [*found, *_dropped_rows(row, cell), *failed]


def _control(work: Work, held: _Held, row: Row, device: str) -> list[Row]:
    """Products alone, dense ones of K and sparse ones of 2 K in one run: a lift makes no activations that wide."""
    (n, k), scheme, pattern = work.shape, SCHEMES[work.scheme], Pattern(2, 4)
    narrow, wide = held.benches([LinearShape(n, k, pattern, scheme), LinearShape(n, 2 * k, pattern, scheme)], device)
    row, cell = replace(row, what="product"), wide.cell(work.m, rounds=3)
    sparse = [route for route in fastest_of_each(cell.times) if route.layout not in DENSE]
    if not sparse:
        return [replace(row, status=REFUSED, why="no kernel on sparse tensor cores runs here")]
    able = [each for each in kernels().values() if each.worth_timing and "dense" in each.layouts and each.refuses(narrow.problem) is None]
    routes = [Route("dense", each.name, each.variants(narrow.problem, work.m)[0]) for each in able]
    dense = fastest_of_each(narrow.cell(work.m, rounds=3, only=routes).times)
    dropped: dict[str, str] = {}
    times = narrow.timed(narrow.products(dense, work.m) | wide.products(sparse, work.m), dropped, _ROUNDS)
    if dropped:
        return [replace(row, route=route, status=FAILED, why=why) for route, why in dropped.items()]
    return timed_rows(row, times, {}, device)


def fastest_of_each(times: Mapping[Route, Timing]) -> list[Route]:
    """The fastest variant of each kernel on each layout, the fastest kernel first."""
    found: dict[tuple[str, str], Route] = {}
    for route in sorted(times, key=lambda each: times[each].p50):
        found.setdefault((route.layout, route.kernel), route)
    return list(found.values())


def timed_rows(row: Row, times: Mapping[Route, Timing], errors: Mapping[Route, float], device: str) -> list[Row]:
    """A row for each route, against the fastest dense one."""
    rival = quickest(times, ("dense",))
    rows = []
    for route, timing in times.items():
        ratio = None if rival is None else times[rival].p50 / timing.p50
        rows.append(replace(timed(row, timing, device), route=str(route), rival=str(rival or ""), ratio=ratio, error=errors.get(route)))
    return rows


def _dropped_rows(row: Row, cell: Cell) -> list[Row]:
    """What did not run, and why."""
    return [replace(row, route=name, status=status_of(why), why=why) for name, why in cell.dropped.items()]


def roof(here: Row) -> Row:
    """How fast this device's memory copies: a gigabyte, reads and writes counted."""
    row = replace(here, bench="kernel", what="roof", route="copy", gigabytes=2.0)
    if torch.cuda.is_available():
        return replace(row, us=2e9 / measure.copy_rate(), timer="in turn")
    source = torch.ones(1 << 26, dtype=torch.uint8)
    target = torch.empty_like(source)
    timing = measure.timed_by_clock({"copy": [lambda: target.copy_(source)]}, rounds=5)["copy"]
    return replace(row, us=timing.p50 * 1e9 / source.numel(), timer="host clock")
