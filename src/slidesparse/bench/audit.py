"""bench audit: is what the plan in force makes run anywhere slower than dense on this card?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from ..errors import UnsupportedError
from ..format import SCHEMES
from ..gemm import Plan, Route
from ..gemm.choose import GUARD, choice_of, route_at
from ..gemm.kernels import refusal
from ..gemm.plan import Key
from ..gemm.tune import Bench, LinearShape
from ..pattern import Pattern
from .kernel import Progress, timed_rows
from .models import Shape
from .rows import FAILED, OK, REFUSED, WRONG, Row, Rows


def run(
    plan: Plan, table: Rows, here: Row, *, shapes: Collection[Shape] = (), schemes: Collection[str] = (), tokens: Collection[int] = (),
    sparse_only: bool = False, progress: Progress | None = None,
) -> list[Row]:  # fmt: skip
    """Time what the plan runs beside the fastest dense routes that it knows, for each of its cells, or for those that are asked for.

    With ``sparse_only`` cells in which the plan runs dense weights are left out: there is nothing to lose there.
    """
    keys = [key for key in sorted(plan.cells) if (not shapes or key[:2] in shapes) and (not schemes or key[3] in schemes)]
    tasks = [(key, m) for key in keys for m in sorted(plan.cells[key]) if not tokens or m in tokens]
    tasks = [(key, m) for key, m in tasks if not table.has(_row(here, key, m))]
    made: list[Row] = []
    bench: Bench | None = None
    for done, (key, m) in enumerate(tasks):
        if progress:
            progress(done, len(tasks), f"{key[0]}×{key[1]} {key[2]} {key[3]} M={m}")
        layer = LinearShape(key[0], key[1], Pattern.parse(key[2]), SCHEMES[key[3]])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if bench is None or bench.layer != layer:
            bench = Bench(layer, device)
        for row in _rows(plan, bench, _row(here, key, m), device, sparse_only):
            table.add(row)
            made.append(row)
    if progress:
        progress(len(tasks), len(tasks), "")
    return made


def _row(here: Row, key: Key, m: int) -> Row:
    n, k, pattern, scheme = key
    return replace(here, bench="audit", what="linear", m=m, n=n, k=k, scheme=scheme, pattern=pattern)


def _rows(plan: Plan, bench: Bench, row: Row, device: str, sparse_only: bool) -> list[Row]:
    """One row: what runs, against the fastest dense route."""
    times = plan.cells[bench.key][row.m].whole
    without = frozenset(route for route in plan.routes(bench.key) if refusal(route, bench.problem) is not None)
    runs = route_at(choice_of(plan, bench.problem, without=without)[1], row.m) or Route("dense", "exact")
    dense = [route for route in times if route.layout == "dense" and route not in without] or [Route("dense", "exact")]
    if sparse_only and runs.layout == "dense":
        return []
    row = replace(row, route=str(runs))
    try:
        cell = bench.cell(row.m, only=list(dict.fromkeys([*dense, runs])), rounds=9)
    except (RuntimeError, UnsupportedError) as error:
        return [replace(row, status=FAILED, why=(str(error).splitlines() or [type(error).__name__])[0])]
    if runs not in cell.whole:
        why = cell.dropped.get(str(runs), "it was not timed")
        return [replace(row, status=WRONG if why.startswith("max error") else REFUSED, why=why)]
    return [each for each in timed_rows(row, cell.whole, cell.errors, device) if each.route == str(runs)]


def losing(rows: Sequence[Row]) -> list[Row]:
    """Rows in which the plan's route takes longer than the fastest dense one by more than the guard."""
    return [row for row in rows if row.bench == "audit" and row.status == OK and row.ratio is not None and row.ratio * GUARD < 1]
