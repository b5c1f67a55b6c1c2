"""The timer, on a clock of its own: which calls run alone, which in turn, and that no replay waits for the host."""

from __future__ import annotations

import pytest

from slidesparse import measure


class Device:
    """A card on which a graph takes its time, and longer behind a hungry neighbour; idle time shows if the host ever waits."""

    def __init__(self) -> None:
        self.clock, self.last, self.ran = 0.0, "", []

    def graph(self, name: str, us: float) -> object:
        device = self

        class Graph:
            def replay(self) -> None:
                device.clock += us * (1.5 if device.last == "hungry" and name != "hungry" else 1.0)
                device.last = name
                device.ran.append(name)

        return Graph()

    def event(self, enable_timing: bool) -> object:
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.clock

            def synchronize(self) -> None:
                device.clock += 1000.0  # the host wakes up late

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) / 1e3

        return Event()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(measure.torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(measure.torch.cuda, "Event", device.event)
    monkeypatch.setattr(measure, "_captured", lambda calls, repeat, pool: device.graph(calls[0](), calls[0].us * len(calls) * repeat))
    return device


class Named:
    def __init__(self, name: str, us: float) -> None:
        self.name, self.us = name, us

    def __call__(self) -> str:
        return self.name


def test_short_calls_take_turns(device: Device) -> None:
    found = measure.timed({"hungry": [Named("hungry", 20.0)] * 3, "other": [Named("other", 40.0)]}, rounds=9)
    assert found["hungry"] == measure.Timing(20.0, 20.0, 20.0) and found["other"] == measure.Timing(60.0, 60.0, 60.0)
    assert device.ran[-18:] == ["hungry", "other"] * 9


def test_long_calls_run_alone_in_both_orders(device: Device) -> None:
    found = measure.timed({"hungry": [Named("hungry", 100.0)], "other": [Named("other", 200.0)] * 2}, rounds=9)
    assert found == {"hungry": measure.Timing(100.0, 100.0, 100.0, True), "other": measure.Timing(200.0, 200.0, 200.0, True)}
    turns = [name for name, before in zip(device.ran[4:], device.ran[3:], strict=False) if name != before]
    assert turns == ["hungry", "other", "hungry"] and device.ran.count("hungry") > 2 * 400 and device.ran.count("other") > 2 * 80


def test_one_short_call_keeps_all_in_turn(device: Device) -> None:
    found = measure.timed({"hungry": [Named("hungry", 99.0)], "other": [Named("other", 900.0)]}, rounds=5)
    assert not any(timing.sustained for timing in found.values())


def test_a_variant_without_calls_is_refused(device: Device) -> None:
    with pytest.raises(ValueError, match="at least one call"):
        measure.timed({"nothing": []})


def test_a_call_is_timed_whatever_the_graph_repeats(device: Device) -> None:
    found = measure.timed({"hungry": [Named("hungry", 20.0)] * 3}, rounds=3, repeat=4)
    assert found["hungry"] == measure.Timing(20.0, 20.0, 20.0)


def test_on_a_cpu_the_hosts_clock_tells_each_call_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            clock[0] += seconds

        return run

    found = measure.timed_by_clock({"a": [call("a", 0.001)] * 2, "b": [call("b", 0.002)]}, rounds=3)
    assert found["a"].p50 == pytest.approx(1000) and found["b"].p50 == pytest.approx(2000) and not found["a"].sustained
    assert order == ["a", "b", *["a", "a", "b"] * 3], "each is called once before it counts"
    order.clear()
    measure.timed_by_clock({"slow": [call("slow", 5.0)]}, rounds=9)
    assert len(order) == 3, "two rounds of what takes longer than a second"
    with pytest.raises(ValueError, match="at least one call"):
        measure.timed_by_clock({"none": []})
