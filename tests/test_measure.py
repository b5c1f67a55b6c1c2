"""The timer, on a device that is played: what it gives is the device's own time of a call, whatever the host takes to launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch

from slidesparse import measure


class Device:
    """A stream and its host, in microseconds: an operation starts when those before have ended, and not before the host has queued it."""

    def __init__(self, launch: float) -> None:
        self.launch, self.host, self.free = launch, 0.0, 0.0
        self.captured: list[float] | None = None

    def queue(self, duration: float, cost: float = 1.0) -> float:
        """When the operation ends."""
        self.host += cost
        self.free = max(self.free, self.host) + duration
        return self.free

    def work(self, duration: float) -> Callable[[], None]:
        def call() -> None:
            if self.captured is None:
                self.queue(duration)
            else:
                self.captured.append(duration)

        return call


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.queue(0.0)

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) / 1e3


class Graph:
    def __init__(self, device: Device) -> None:
        self.device, self.durations = device, []

    def replay(self) -> None:
        self.device.queue(sum(self.durations), self.device.launch)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        """There is only one."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    played = Device(launch=20.0)

    @contextmanager
    def capture(graph: Graph, pool: object = None):
        played.captured = graph.durations
        yield
        played.captured = None

    for name, stand_in in {
        "Event": lambda enable_timing: Event(played),
        "CUDAGraph": lambda: Graph(played),
        "graph": capture,
        "graph_pool_handle": lambda: (0, 0),
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextmanager(lambda: (yield))(),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: played.queue(cycles / 2000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return played


@pytest.mark.parametrize("repeat", [1, 3])
def test_launching_is_not_measured(device: Device, repeat: int) -> None:
    variants = {"short": [device.work(2.0), device.work(4.0)], "long": [device.work(40.0)]}
    found = measure.interleaved(variants, rounds=5, repeat=repeat)
    for name, expected in (("short", 3.0), ("long", 40.0)):
        timing = found[name]
        assert [timing.p20, timing.p50, timing.p80] == pytest.approx([expected] * 3, abs=1.0 / repeat), "an event takes the host 1 µs"


def test_variants_take_turns_and_quantiles_are_over_rounds(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    order, plain = [], Graph.replay

    def replay(graph: Graph) -> None:
        order.append(sum(graph.durations))
        graph.durations[0] += 1.0  # every round is slower
        plain(graph)

    monkeypatch.setattr(Graph, "replay", replay)
    found = measure.interleaved({"a": [device.work(10.0)], "b": [device.work(100.0)]}, rounds=6)
    assert [one > 50 for one in order] == [False, True] * 7
    assert [found["a"].p20, found["a"].p50, found["a"].p80] == pytest.approx([13.0, 14.5, 16.0])


def test_a_variant_without_calls_is_refused(device: Device) -> None:
    with pytest.raises(ValueError, match="at least one call"):
        measure.interleaved({"a": []})
