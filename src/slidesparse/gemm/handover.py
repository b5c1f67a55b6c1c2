"""Layers that had better run on a serving engine's own dense kernels, and what of a plan the others run: told from the plan.

A layer is ours where sparse tensor cores pay, or where its input is SwiGLU's output, which our kernel computes, quantises and lifts in one
pass. Dense kernels that are quicker than the engine's are no reason by themselves: within an engine, which keeps the GPU at its power limit
and the host busy, they gained nothing (docs/serving.md).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from math import exp, fsum, log
from sys import maxsize

import torch

from ..measure import Timing
from .plan import SUMS_OF, Cell, Key, Plan, backend_of, key_of
from .problem import Problem

RIVAL = "dense:cutlass"
"""vLLM's W8A8 product among the dense routes."""

STEP = 8192
"""Most tokens in a step of vLLM's server on a card of 70 GB and more, unless it is told otherwise."""

ENOUGH = 2048
"""Tokens in a step that keep the GPU busy in models of 3B and more."""

WORTH = 1.03
"""How many times as fast a layer must be, on average, to be ours: less is hardly more than noise, and a second copy costs memory."""


def rival_of(problem: Problem) -> str | None:
    """`RIVAL` if it takes the problem; None where the quickest dense route stands for the engine's, as torch's own of 16-bit schemes."""
    takes = problem.scheme.dynamic and problem.dtype != torch.float32 and not problem.n % 16 and not problem.k % 16
    return RIVAL if takes else None


def gains(plan: Plan, key: Key, rival: str | None, *, sums: bool, without: Collection[str] = (), most: int = maxsize) -> dict[int, float]:
    """How many times as fast as the engine's own sparse tensor cores are where the plan chooses them, else 1.

    By measured number of tokens, up to ``most`` of a step. The engine's is ``rival``, the quicker of the two forms in which it was timed,
    or else the quickest dense route. Numbers at which it was not timed, or found wrong, are left out, and so are those at which nothing
    that was timed can run here.
    """
    plan = _within(plan, key, rival, without, sparse=True)
    table = plan.table(key, sums=sums)
    found = {}
    for m in [m for m in table if m <= most] or [*table][:1]:
        cell, ours = table[m], plan.route(key, m, "fast", without, sums=sums)
        theirs = _engines(cell, rival, without, sums)
        if theirs is not None and ours is not None:
            found[m] = 1.0 if backend_of(ours) == "dense" else theirs / cell.times(sums)[ours].p50
    return found


def _engines(cell: Cell, rival: str | None, without: Collection[str], sums: bool) -> float | None:
    """Microseconds of the engine's product."""
    if rival is None:
        quickest = cell.dense(without, sums=sums)
        return None if quickest is None else quickest[1].p50
    return min((times[rival].p50 for times in (cell.times(sums), cell.timings) if rival in times), default=None)


def why_theirs(
    plan: Plan | None, key: Key, rival: str | None, *, sums: bool, without: Collection[str] = (), most: int = maxsize, swiglu: bool = False
) -> str | None:
    """Why a layer had better be the engine's own, None if it had not.

    Args:
        rival: see `rival_of`; the plan must have timed it.
        sums: token scales and bias are left to the engine's compiler.
        without: routes that cannot run here.
        most: the most tokens in a step.
        swiglu: it runs in the pass that quantises the layer's input.
    """
    if plan is None or not plan.cells.get(key):
        return "nothing was measured: run `slidesparse tune --vllm`"
    if rival is not None and not plan.compares(key, rival, sums=sums):
        return "the plan has not compared them: run `slidesparse tune --vllm`"
    found = gains(plan, key, rival, sums=sums, without=without, most=most)
    mean = average(found)
    if swiglu or mean >= WORTH:
        return None
    if max(found.values(), default=1.0) <= 1:
        return "nothing was measured to be faster"
    return f"ours would be {mean:.4f} times as fast on average over {min(found)} to {max(found)} tokens, and {WORTH} is asked"


def within_engine(plan: Plan, key: Key, rival: str | None, *, sums: bool, without: Collection[str] = (), most: int = maxsize) -> Plan:
    """What of a plan a layer of ours runs: sparse routes where they are worth a copy, and of dense ones the engine's.

    Another dense route stays where it is `WORTH` times as fast, or if the engine's is not to be had. None stays where a second copy is not
    worth it: sparse routes alone pay, are nowhere slower than the engine's by more than that, and on average hardly slower than the two.
    """
    if average(gains(plan, key, rival, sums=sums, without=without, most=most)) < WORTH:
        return _within(plan, key, rival, without, sparse=False)
    both = _within(plan, key, rival, without, sparse=True)
    table = both.table(key, sums=sums)
    # The cell beyond tells, too, of what lies between.
    met = {m: table[m] for m in [*table][: bisect_left([*table], most) + 1]}
    alone = Plan(plan.machine, {key: both.cells[key] | {m: _without_dense(cell) for m, cell in met.items()}}, plan.date)
    faster, slower = {}, {}
    for m, cell in met.items():
        one, other = (found.route(key, m, "fast", without, sums=sums) for found in (alone, both))
        times, theirs = cell.times(sums), _engines(cell, rival, without, sums)
        if not {one, other} <= times.keys():
            return both
        slower[m] = times[one].p50 / times[other].p50
        if theirs is not None:
            faster[m] = theirs / times[one].p50
    pays = average(faster) >= WORTH and min(faster.values()) >= 1 / WORTH
    return alone if pays and average(slower) < WORTH else both


def _without_dense(cell: Cell) -> Cell:
    """As if no dense route had been tried."""
    whole, sums, dropped = (
        {name: one for name, one in found.items() if backend_of(name.removeprefix(SUMS_OF)) != "dense"}
        for found in (cell.timings, cell.sums, cell.dropped)
    )
    return Cell(cell.m, whole, dropped, sums)


def _within(plan: Plan, key: Key, rival: str | None, without: Collection[str], *, sparse: bool) -> Plan:
    house = None if rival in without else rival
    kept = Plan(plan.machine, {}, plan.date)
    for cell in plan.cells.get(key, {}).values():
        whole, sums = (_trimmed(times, house, sparse) or times for times in (cell.timings, cell.sums))
        kept.add(key, Cell(cell.m, whole, cell.dropped, sums))
    return kept


def _trimmed(times: Mapping[str, Timing], house: str | None, sparse: bool) -> dict[str, Timing]:
    bar = times[house].p50 / WORTH if house in times else maxsize
    dense = {name for name in times if backend_of(name) == "dense" and (name == house or times[name].p50 <= bar)}
    return {name: timing for name, timing in times.items() if name in dense or (sparse and backend_of(name) != "dense")}


def decide(
    plan: Plan | None, problem: Problem, *, sums: bool, without: Collection[str], most: int, swiglu: bool
) -> tuple[str | None, Plan | None]:
    """`why_theirs` of a layer, None if it is ours, and then the plan by which it runs, see `within_engine`."""
    key, rival = key_of(problem), rival_of(problem)
    why = why_theirs(plan, key, rival, sums=sums, without=without, most=most, swiglu=swiglu)
    return why, None if why is not None or plan is None else within_engine(plan, key, rival, sums=sums, without=without, most=most)


def follows_swiglu(name: str, activation: str | None) -> bool:
    """Whether a layer of that name, in a model of that activation, reads silu(gate) · up in the graph: experts, shared ones too, do not."""
    return activation in ("silu", "swish") and name.rpartition(".")[2] in ("down_proj", "w2") and "expert" not in name


def average(found: dict[int, float]) -> float:
    """Geometric mean; 1 of nothing."""
    return exp(fsum(map(log, found.values())) / len(found)) if found else 1.0
