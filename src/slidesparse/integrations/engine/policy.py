"""Who runs a layer inside a serving engine, decided from a plan: the engine's own dense kernels, or this package's.

This package's kernels run a layer where a kernel that reads no dense weights pays, or where the layer's input is SwiGLU's output, which one
kernel computes, quantises and lifts in one pass. Dense kernels that are quicker than the engine's are no reason by themselves: within an
engine, which keeps the GPU at its power limit and the host busy, they gained nothing (docs/dev/notes.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from sys import maxsize

from ...gemm import Cell, Plan, Problem, Route, key_of
from ...gemm.choose import DENSE, Intervals, Times, choice_of, geometric_mean, quickest, route_at
from ...measure import Timing

WORTH = 1.03
"""How many times as fast this package's kernels must be, on average, to run a layer: less is hardly more than noise."""


@dataclass(frozen=True)
class EngineFacts:
    """What the decision needs to know of an engine.

    ``name`` is that of the option of ``tune``; ``kernel`` names the engine's dense kernel in plans, None where torch's stands for it;
    ``most`` is the most tokens in a step; ``swiglu`` says whether SwiGLU runs in the pass that quantises the layer's input.
    """

    name: str
    kernel: str | None
    most: int = maxsize
    swiglu: bool = False


@dataclass(frozen=True)
class Decision:
    """Who runs a layer: the engine, for the reason ``why``; or, if that is None, this package by ``plan``, in these layouts."""

    why: str | None
    plan: Plan | None = None
    layouts: tuple[str, ...] = ()
    steps: Intervals = ()


def decide(problem: Problem, plan: Plan | None, facts: EngineFacts, without: Collection[Route] = ()) -> Decision:
    """Who runs a layer; ``without`` are routes that cannot run here."""
    key, tune = key_of(problem), f"run `slidesparse tune --{facts.name}`"
    if plan is None or not plan.cells.get(key):
        return Decision(f"nothing was measured: {tune}")
    if not any(_met(cell, facts) for cell in plan.cells[key].values()):
        return Decision(f"the plan has not compared them: {tune}")
    own = _within(plan, problem, facts, without)
    layouts, steps = choice_of(own, problem)
    gains = _gains(own, plan, problem, steps, facts, without)
    mean = geometric_mean(gains.values())
    if mean >= WORTH:
        return Decision(None, own, layouts, steps)
    if facts.swiglu:
        dense = _within(plan, problem, facts, without, ("dense",))
        return Decision(None, dense, *choice_of(dense, problem))
    if max(gains.values(), default=1.0) <= 1:
        return Decision("nothing was measured to be faster")
    return Decision(f"ours would be {mean:.4f} times as fast on average over {min(gains)} to {max(gains)} tokens, and {WORTH} is asked")


def _met(cell: Cell, facts: EngineFacts) -> bool:
    """Whether a cell compares with the engine: its kernel was timed, or found wrong.

    Where the engine uses torch's kernel, every cell compares.
    """
    route = None if facts.kernel is None else Route("dense", facts.kernel)
    return route is None or route in cell.times or str(route) in cell.dropped


def _within(plan: Plan, problem: Problem, facts: EngineFacts, without: Collection[Route], layouts: Collection[str] | None = None) -> Plan:
    """The part of a plan that a layer in the engine may run, up to ``most`` tokens, in these layouts only if any are named.

    Cells that do not compare with the engine take no part. Dense kernels are the engine's, and those that are `WORTH` times as fast.
    """
    key = key_of(problem)
    met = {m: cell for m, cell in plan.cells[key].items() if _met(cell, facts)}
    kept = Plan(plan.machine, {}, plan.date)
    for m in [m for m in met if m <= facts.most] or [min(met)]:
        kept.add(key, Cell(m, _trimmed(met[m].times, facts, without, layouts), met[m].dropped, met[m].versions))
    return kept


def _trimmed(times: Times, facts: EngineFacts, without: Collection[Route], layouts: Collection[str] | None) -> dict[Route, Timing]:
    can = {route: timing for route, timing in times.items() if route not in without and (layouts is None or route.layout in layouts)}
    own = can.get(Route("dense", facts.kernel)) if facts.kernel is not None else None
    bar = maxsize if own is None else own.p50 / WORTH
    return {
        route: timing for route, timing in can.items()
        if route.layout not in DENSE or route.kernel == facts.kernel or timing.p50 <= bar
    }  # fmt: skip


def _gains(
    own: Plan, plan: Plan, problem: Problem, steps: Intervals, facts: EngineFacts, without: Collection[Route]
) -> Mapping[int, float]:
    """By measured number of tokens, how many times as fast as the engine the layer is: 1 where its route reads the dense layout.

    The engine's time is that of its kernel, or else of the quickest dense one.
    """
    key, found = key_of(problem), {}
    for m, times in own.times(key).items():
        can, route = plan.cells[key][m].times, route_at(steps, m)
        if facts.kernel is None:
            engine = quickest({one: timing for one, timing in can.items() if one not in without}, ("dense",))
        else:
            engine = Route("dense", facts.kernel)
        if engine in can and route is not None:
            found[m] = 1.0 if route.layout == "dense" else can[engine].p50 / times[route].p50
    return found
