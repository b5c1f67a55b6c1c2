"""Who runs a layer and why, as rows of data: what `inspect --plan` and `tune` print."""

from __future__ import annotations

from typing import Any

from .choose import DENSE, choice_of, quickest, route_at
from .kernels import kernels
from .layouts import LAYOUTS
from .plan import Plan, key_of
from .predict import MANY, predicted_gains, predicted_steps
from .problem import Problem
from .route import Route


def elsewhere(plan: Plan, problem: Problem) -> frozenset[Route]:
    """Routes that the plan has timed with kernels that are not registered in this process."""
    return frozenset(route for route in plan.routes(key_of(problem)) if route.kernel not in kernels())


def summary(plan: Plan, problem: Problem) -> str:
    """What stays of the layer and how many bytes that takes, in one line."""
    if not plan.times(key_of(problem), without=elsewhere(plan, problem)):
        steps = predicted_steps(problem, plan.machine.gpu)
        if not steps:
            return "not measured: dense runs"
        gains = predicted_gains(problem, plan.machine.gpu)
        least, most = (found(gains[m] for m in MANY) for found in (min, max))
        layout = steps[-1][1].layout
        return f"not measured: {layout} runs, predicted {least:.2f} to {most:.2f} times as fast as dense from {MANY[0]} tokens on"
    layouts, _ = choice_of(plan, problem, without=elsewhere(plan, problem))
    nbytes = sum(LAYOUTS[name].nbytes(problem) for name in layouts) / LAYOUTS["dense"].nbytes(problem)
    return f"keeps {' and '.join(layouts)}, {nbytes:.2f} of dense weights' bytes"


def plan_rows(plan: Plan, problem: Problem, *, fast: Plan | None = None) -> list[dict[str, Any]]:
    """One row per measured number of tokens: the best on `dense`, what runs in fast and in lean memory, the best outside `DENSE`.

    ``fast`` is the plan that chooses in fast memory, if not ``plan``.
    """
    key, without = key_of(problem), elsewhere(plan, problem)
    runs = {
        "fast": choice_of(fast or plan, problem, without=without)[1],
        "lean": choice_of(plan, problem, memory="lean", without=without)[1],
    }
    rows = []
    for m, times in plan.times(key, without=without).items():
        dense = quickest(times, ("dense",))
        if dense is None:
            continue
        picked = {name: route_at(steps, m) for name, steps in runs.items()}
        picked |= {"other": quickest(times, [layout for layout in LAYOUTS if layout not in DENSE]), "dense": dense}
        row: dict[str, Any] = {"n": problem.n, "k": problem.k, "pattern": str(problem.pattern), "scheme": problem.scheme.name, "m": m}
        for part, route in picked.items():
            us = None if route is None or route not in times else times[route].p50
            row |= {part: None if route is None else str(route), f"{part}_us": us}
        rows.append(row)
    return rows
