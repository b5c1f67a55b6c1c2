"""Layers that had better run on a serving engine's own dense kernels: told from a plan.

The GPU's times decide; an op of ours costs the host a quarter more than the engine's product (`benchmarks/host_time.py`). The engine's
kernel is one of the dense routes, and what is ours runs it where nothing else is faster.
"""

from __future__ import annotations

from collections.abc import Collection
from math import exp, fsum, log
from sys import maxsize

import torch

from .plan import Key, Plan
from .problem import Problem

RIVAL = "dense:cutlass"
"""vLLM's W8A8 product among the dense routes."""

STEP = 8192
"""Most tokens in a step of vLLM's server on a card of 70 GB and more, unless it is told otherwise."""

WORTH = 1.03
"""How many times as fast a layer must be, on average, to be ours: less is hardly more than noise, and a second copy costs memory."""


def rival_of(problem: Problem) -> str | None:
    """`RIVAL` if it takes the problem; None where the quickest dense route stands for the engine's, as torch's own of 16-bit schemes."""
    takes = problem.scheme.dynamic and problem.dtype != torch.float32 and not problem.n % 16 and not problem.k % 16
    return RIVAL if takes else None


def gains(plan: Plan, key: Key, rival: str | None, *, sums: bool, without: Collection[str] = (), most: int = maxsize) -> dict[int, float]:
    """How many times as fast as the engine's own the plan's choice is, by measured number of tokens, up to ``most`` of a step.

    The engine's is ``rival``, the quicker of the two forms in which it was timed, or else the quickest dense route. Numbers at which it was
    not timed, or found wrong, are left out, and so are those at which nothing that was timed can run here.
    """
    table = plan.table(key, sums=sums)
    found = {}
    for m in [m for m in table if m <= most] or [*table][:1]:
        cell, ours = table[m], plan.route(key, m, "fast", without, sums=sums)
        if rival is None:
            theirs = [] if (quickest := cell.dense(without, sums=sums)) is None else [quickest[1]]
        else:
            theirs = [times[rival] for times in (cell.times(sums), cell.timings) if rival in times]
        if theirs and ours is not None:
            found[m] = min(timing.p50 for timing in theirs) / cell.times(sums)[ours].p50
    return found


def why_theirs(
    plan: Plan | None, key: Key, rival: str | None, *, sums: bool, without: Collection[str] = (), most: int = maxsize
) -> str | None:
    """Why a layer had better be the engine's own, None if it had not.

    Args:
        rival: see `rival_of`; the plan must have timed it.
        sums: scales and bias are left to the engine's compiler.
        without: routes that cannot run here.
        most: the most tokens in a step.
    """
    if plan is None or not plan.cells.get(key):
        return "nothing was measured: run `slidesparse tune --vllm`"
    if rival is not None and not plan.compares(key, rival, sums=sums):
        return "the plan has not compared them: run `slidesparse tune --vllm`"
    found = gains(plan, key, rival, sums=sums, without=without, most=most)
    mean = average(found)
    if mean >= WORTH:
        return None
    if max(found.values(), default=1.0) <= 1:
        return "nothing was measured to be faster"
    return f"ours would be {mean:.4f} times as fast on average over {min(found)} to {max(found)} tokens, and {WORTH} is asked"


def average(found: dict[int, float]) -> float:
    """Geometric mean; 1 of nothing."""
    return exp(fsum(map(log, found.values())) / len(found)) if found else 1.0
