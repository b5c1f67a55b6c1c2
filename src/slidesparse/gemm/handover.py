"""Layers that had better run on a serving engine's own dense kernels: told from a plan, for engines that replay CUDA graphs.

Up to some number of tokens such an engine replays a graph, which costs the host nothing whatever runs in it. Beyond, an op of ours costs
the host more than the engine's own, and a step that waits for the host is no quicker for a faster kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from sys import maxsize

from .plan import Key, Plan, backend_of

RIVAL = "dense:cutlass"
"""vLLM's W8A8 product among the dense routes."""

GRAPHS = 512
"""Most tokens in a CUDA graph of vLLM, unless it is told otherwise."""

HOST_US = 250.0
"""Outside CUDA graphs a layer must keep the GPU busy for so long, or a step waits for the host.

On the host of an H100 vLLM took 160 µs a linear layer, with all that stands between two of them, and 90 more with an op of ours.
"""

_DENSE = (None, "dense")  # nothing that was timed can run: then dense does


def why_theirs(
    plan: Plan | None,
    key: Key,
    rival: str | None,
    *,
    sums: bool,
    without: Collection[str] = (),
    largest: int = GRAPHS,
    most: int = maxsize,
    host_us: float = HOST_US,
) -> str | None:
    """Why a layer had better be the engine's own, None if it had not.

    Args:
        rival: the engine's own route, which the plan must have timed; None if that is one of ours.
        sums: scales and bias are left to the engine's compiler.
        without: routes that cannot run here.
        largest: the most tokens in a CUDA graph.
        most: the most tokens in a step.
        host_us: microseconds that the layer must take outside CUDA graphs.
    """
    if plan is None or not plan.cells.get(key):
        return "nothing was measured: run `slidesparse tune --vllm`"
    if rival is not None and not plan.compares(key, rival, sums=sums):
        return "the plan has not compared them: run `slidesparse tune --vllm`"
    runs = {m: plan.route(key, m, "fast", without, sums=sums) for m in plan.table(key, sums=sums)}
    if all(backend_of(route) in _DENSE for route in runs.values()):
        return "nothing was measured to be faster"
    if most <= largest:
        return None
    beyond = [plan.route(key, largest + 1, "fast", without, sums=sums), *(route for m, route in runs.items() if m > largest)]
    if any(backend_of(route) in _DENSE for route in beyond):
        return f"sparse does not pay for all numbers of tokens above {largest}, the most that is captured in a CUDA graph"
    took = {m: plan.cells[key][m].times(sums)[route].p50 for m, route in runs.items() if route is not None}
    return _host_bound(took, largest, host_us)


def _host_bound(took: Mapping[int, float], largest: int, host_us: float) -> str | None:
    """Why the host would be what a step waits for, just beyond the largest number of tokens in a CUDA graph; microseconds by tokens."""
    m = max((m for m in took if m <= largest + 1), default=min(took))
    us = took[m]
    if us >= host_us:
        return None
    enough = min((m for m, us in took.items() if m > largest and us >= host_us), default=None)
    way_out = "" if enough is None else f"; --max-cudagraph-capture-size {enough} would change that"
    return f"{m} tokens take {us:.0f} µs, less than the host needs outside CUDA graphs{way_out}"
