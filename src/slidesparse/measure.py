"""The timer of all benchmarks: CUDA-graph replay, buffers rotated until the L2 cache is cold, variants interleaved, median and spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

_HEAD_START = 400_000
"""Cycles that the device waits before a graph: 0.2 ms, many times what a host takes to launch one."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 20th and 80th percentile over the rounds."""

    p50: float
    p20: float
    p80: float


def slots(bytes_per_call: int, *, least: int = 4) -> int:
    """Buffer sets to rotate so that a call finds none of its data in the L2 cache: three times the cache between two uses."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(least, -(-3 * cache // max(bytes_per_call, 1)))


def interleaved(variants: Mapping[str, Sequence[Call]], *, rounds: int = 15, repeat: int = 1) -> dict[str, Timing]:
    """Time variants against each other; each is a sequence of calls of equal work on different buffers.

    Every variant's calls, ``repeat`` times over, are captured into one CUDA graph; a round replays each graph once, in turn, between
    two events. Microseconds per call. The device is kept busy until the host has queued a graph and both its events: on an idle device
    the first event would pass while the host still launches, and the launch would be measured, too.

    Raises:
        ValueError: a variant has no calls.
    """
    if not all(variants.values()):
        raise ValueError("every variant needs at least one call")
    # One pool: what one graph's replay leaves behind nobody reads, so the next may write over it.
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: _captured(calls, repeat, pool) for name, calls in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for graph in graphs.values():
        graph.replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(_HEAD_START)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / (repeat * len(variants[name])))
    return {name: _timing(values) for name, values in samples.items()}


def copy_rate(gigabytes: float = 1.0) -> float:
    """Bytes per microsecond of a large copy in device memory, reads and writes counted: by the faster of a memcpy and a kernel."""
    count = int(gigabytes * (1 << 28))
    source = torch.randint(1 << 30, (count,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    variants = {"memcpy": [lambda: target.copy_(source)], "kernel": [lambda: torch.neg(source, out=target)]}
    return 8 * count / min(timing.p50 for timing in interleaved(variants, repeat=3).values())


def _captured(calls: Sequence[Call], repeat: int, pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
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


def _timing(values: list[float]) -> Timing:
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), cuts[0], cuts[3])
