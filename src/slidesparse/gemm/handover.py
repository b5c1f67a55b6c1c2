"""Layers that had better run on a serving engine's own dense kernels: told from a plan.

An op of ours costs an engine's host no more than its own quantisation and product do (`benchmarks/host_time.py`), so that the GPU's times
decide. The engine's kernel is one of the dense routes, and what is ours runs it where nothing else is faster.
"""

from __future__ import annotations

from collections.abc import Collection
from math import exp, fsum, log
from sys import maxsize

from .plan import Key, Plan

RIVAL = "dense:cutlass"
"""vLLM's W8A8 product among the dense routes; of 16-bit schemes torch's own is."""

NATIVE = "dense:native"

STEP = 8192
"""Most tokens in a step of vLLM's server on a card of 70 GB and more, unless it is told otherwise."""

WORTH = 1.03
"""How many times as fast a layer must be, on average, to be ours: less is hardly more than noise, and a second copy costs memory."""


def gains(plan: Plan, key: Key, rival: str | None, *, sums: bool, without: Collection[str] = (), most: int = maxsize) -> dict[int, float]:
    """How many times as fast as the engine's own the plan's choice is, by measured number of tokens, up to ``most`` of a step.

    The engine's is the quicker of the two forms in which it was timed. Numbers at which it was not timed, or found wrong, are left out,
    and so are those at which nothing that was timed can run here.
    """
    table = plan.table(key, sums=sums)
    found = {}
    for m in [m for m in table if m <= most] or [*table][:1]:
        theirs = [times[rival or NATIVE].p50 for times in (table[m].times(sums), table[m].timings) if (rival or NATIVE) in times]
        ours = plan.route(key, m, "fast", without, sums=sums)
        if theirs and ours is not None:
            found[m] = min(theirs) / table[m].times(sums)[ours].p50
    return found


def why_theirs(
    plan: Plan | None, key: Key, rival: str | None, *, sums: bool, without: Collection[str] = (), most: int = maxsize
) -> str | None:
    """Why a layer had better be the engine's own, None if it had not.

    Args:
        rival: the engine's own route, which the plan must have timed; None if that is torch's.
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
    return f"ours would be {mean:.3f} times as fast on average over {min(found)} to {max(found)} tokens, and {WORTH} is asked"


def average(found: dict[int, float]) -> float:
    """Geometric mean; 1 of nothing."""
    return exp(fsum(map(log, found.values())) / len(found)) if found else 1.0
