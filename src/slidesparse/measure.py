"""The timer of all benchmarks: CUDA-graph replay, buffers rotated until the L2 cache is cold, median and spread.

Short calls are timed in turn, calls of 100 µs and more sustained; a `Timing` says which. Without a card the host's clock stands in.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name")

SUSTAINED = 100.0
"""Microseconds from which calls are timed sustained."""
_HELD = 50e3  # microseconds a variant runs alone in each of two passes


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 20th and 80th percentile; ``sustained`` if the variant ran alone, not in turn with others."""

    p50: float
    p20: float
    p80: float
    sustained: bool = False


def slots(bytes_per_call: int, *, least: int = 4) -> int:
    """Buffer sets to rotate so that a call finds none of its data in the L2 cache: three times the cache between two uses."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(least, -(-3 * cache // max(bytes_per_call, 1)))


def timed(variants: Mapping[Name, Sequence[Call]], *, rounds: int = 15, repeat: int = 1, held: float = _HELD) -> dict[Name, Timing]:
    """Time variants against each other; each is a sequence of calls of equal work on different buffers.

    Every variant's calls, ``repeat`` times over, are captured into one CUDA graph. Where each call takes 100 µs or more, a variant's graph
    is replayed alone for ``held`` µs, twice, in one order and the other: the power that a kernel draws sets its clock, and its neighbours'.
    Shorter calls take turns: a round replays each graph once. No replay waits for the host, which stays ahead of the device.

    Raises:
        ValueError: a variant has no calls.
    """
    if not all(variants.values()):
        raise ValueError("every variant needs at least one call")
    # One pool: what one graph's replay leaves behind nobody reads, so the next may write over it.
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: _captured(calls, repeat, pool) for name, calls in variants.items()}
    calls = {name: repeat * len(variants[name]) for name in graphs}
    for graph in graphs.values():
        graph.replay()
    first = dict(zip(graphs, _replays(list(graphs.values())), strict=True))
    sustained = min(first[name] / calls[name] for name in graphs) >= SUSTAINED
    samples = _alone(graphs, first, held) if sustained else _in_turn(graphs, rounds)
    return {name: _timing([value / calls[name] for value in values], sustained) for name, values in samples.items()}


def timed_by_clock(variants: Mapping[Name, Sequence[Call]], *, rounds: int = 15) -> dict[Name, Timing]:
    """Time variants on a CPU by the host's clock, in turn; of so many rounds those that one second, shared by all, allows, at least two.

    Raises:
        ValueError: a variant has no calls.
    """
    if not all(variants.values()):
        raise ValueError("every variant needs at least one call")
    samples: dict[Name, list[float]] = {name: [] for name in variants}
    for calls in variants.values():
        calls[0]()
    began = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - began > 1.0:
            break
        for name, calls in variants.items():
            start = time.perf_counter()
            for call in calls:
                call()
            samples[name].append((time.perf_counter() - start) * 1e6 / len(calls))
    return {name: _timing(values, False) for name, values in samples.items()}


def _in_turn(graphs: Mapping[Name, torch.cuda.CUDAGraph], rounds: int) -> dict[Name, list[float]]:
    values = iter(_replays([graph for _ in range(rounds) for graph in graphs.values()]))
    samples: dict[Name, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name in graphs:
            samples[name].append(next(values))
    return samples


def _alone(graphs: Mapping[Name, torch.cuda.CUDAGraph], first: Mapping[Name, float], held: float) -> dict[Name, list[float]]:
    """The last 60 % of the replays of each pass, by when clock and power have settled."""
    samples: dict[Name, list[float]] = {name: [] for name in graphs}
    for name in (*graphs, *reversed([*graphs])):
        values = _replays([graphs[name]] * max(5, math.ceil(held / first[name])))
        samples[name] += values[len(values) * 2 // 5 :]
    return samples


def _replays(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Microseconds of each replay, one behind the other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(graphs) + 1)]
    events[0].record()
    for graph, event in zip(graphs, events[1:], strict=True):
        graph.replay()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairwise(events)]


def copy_rate() -> float:
    """Bytes per microsecond of a copy of 1 GiB in device memory, reads and writes counted: by the faster of a memcpy and a kernel."""
    count = 1 << 28
    source = torch.randint(1 << 30, (count,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    variants = {"memcpy": [lambda: target.copy_(source)], "kernel": [lambda: torch.neg(source, out=target)]}
    return 8 * count / min(timing.p50 for timing in timed(variants, repeat=3).values())


def _captured(calls: Sequence[Call], repeat: int, pool: Any) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(repeat):
            # Results stay alive until the last call: each gets memory of its own, not what the one before left in the cache.
            kept = [call() for call in calls]
            del kept
    return graph


def _timing(values: list[float], sustained: bool) -> Timing:
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), cuts[0], cuts[3], sustained)
