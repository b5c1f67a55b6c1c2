"""bench audit: is what the plan in force makes run anywhere slower than dense on this card?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ..errors import UnsupportedError, first_line
from ..format import SCHEMES
from ..gemm import Plan, Problem, Route
from ..gemm.choose import GUARD, choice_of, route_at
from ..gemm.plan import Key
from ..gemm.runner import cannot_run
from ..gemm.tune import Bench, LinearShape
from ..pattern import Pattern
from .kernel import Progress, timed_rows
from .models import Shape
from .rows import FAILED, OK, Row, Rows, device, status_of


def tasks(
    plan: Plan, here: Row, *, shapes: Collection[Shape] = (), schemes: Collection[str] = (), tokens: Collection[int] = (),
    sparse_only: bool = False,
) -> list[Row]:  # fmt: skip
    """A row without times for each of the plan's cells, or for those that are asked for, with the route that the plan makes run.

    With ``sparse_only`` cells in which the plan runs dense weights are left out: there is nothing to lose there.
    """
    keys = [key for key in sorted(plan.cells) if (not shapes or key[:2] in shapes) and (not schemes or key[3] in schemes)]
    steps = {key: choice_of(plan, _problem(key), without=cannot_run(plan, _problem(key)))[1] for key in keys}
    found = [
        (key, m, route_at(steps[key], m) or Route("dense", "exact"))
        for key in keys
        for m in sorted(plan.cells[key])
        if not tokens or m in tokens
    ]
    base = replace(here, bench="audit", what="linear")
    return [
        replace(base, m=m, n=key[0], k=key[1], pattern=key[2], scheme=key[3], route=str(runs))
        for key, m, runs in found
        if not sparse_only or runs.layout != "dense"
    ]


def run(plan: Plan, asked: Sequence[Row], table: Rows, progress: Progress | None = None) -> list[Row]:
    """Time these tasks beside the fastest dense routes that the plan knows, those aside whose route the table has in their cell."""
    left = [task for task in asked if not _found(task, table)]
    made: list[Row] = []
    bench: Bench | None = None
    for done, task in enumerate(left):
        if progress:
            progress(done, len(left), f"{task.n}×{task.k} {task.pattern} {task.scheme} M={task.m}")
        layer = _layer(_key(task))
        if bench is None or bench.layer != layer:
            bench = Bench(layer, device())
        made.append(_row(plan, bench, task))
        table.add(made[-1])
    if progress:
        progress(len(left), len(left), "")
    return made


def standing(asked: Sequence[Row], table: Rows) -> list[Row]:
    """The newest row of each task: what another plan made run does not count."""
    return [found[-1] for task in asked if (found := _found(task, table))]


def _found(task: Row, table: Rows) -> list[Row]:
    return [row for row in table.rows if row.cell == task.cell and row.route == task.route]


def _key(task: Row) -> Key:
    return task.n, task.k, task.pattern, task.scheme


def _layer(key: Key) -> LinearShape:
    return LinearShape(key[0], key[1], Pattern.parse(key[2]), SCHEMES[key[3]])


def _problem(key: Key) -> Problem:
    problem = _layer(key).problem
    return problem if device() == "cuda" else replace(problem, capability=(0, 0))


def _row(plan: Plan, bench: Bench, task: Row) -> Row:
    """What runs, against the fastest dense route."""
    key, runs = _key(task), Route.parse(task.route)
    without = cannot_run(plan, _problem(key))
    dense = [route for route in plan.cells[key][task.m].times if route.layout == "dense" and route not in without]
    try:
        cell = bench.cell(task.m, only=list(dict.fromkeys([*(dense or [Route("dense", "exact")]), runs])), rounds=9)
    except (RuntimeError, UnsupportedError) as error:
        return replace(task, status=FAILED, why=first_line(error))
    if runs not in cell.times:
        why = cell.dropped.get(str(runs), "it was not timed")
        return replace(task, status=status_of(why), why=why)
    return next(each for each in timed_rows(task, cell.times, cell.errors, device()) if each.route == task.route)


def losing(rows: Sequence[Row]) -> list[Row]:
    """Rows in which the plan's route takes longer than the fastest dense one by more than the guard."""
    return [row for row in rows if row.status == OK and row.ratio is not None and row.ratio * GUARD < 1]
