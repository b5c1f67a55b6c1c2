"""Layers are left to a serving engine's own kernels unless a plan makes sure that ours pay."""

from __future__ import annotations

import pytest

from slidesparse.cli import tuning
from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan
from slidesparse.gemm.handover import RIVAL, why_theirs
from slidesparse.gemm.machine import Machine
from slidesparse.gemm.tuning import Layer
from slidesparse.measure import Timing
from slidesparse.pattern import Pattern

KEY = (256, 512, "6:8", "int8")
BOTH = ("dense:triton", RIVAL)


def measured(sparse_from: int, *routes: str, families: tuple[str, ...] = ("whole", "sums")) -> Plan:
    """A plan in which a sparse route wins from so many tokens on, in whole linears, without their epilogue, or both."""
    plan = Plan(Machine("A card", "580", "13.0", "2.11.0", "3.6.0", "0.8.0", "0"))
    for m in (1, 16, 256, 1024, 4096):
        quick, slow = Timing(m, m * 0.9, m * 1.1), Timing(m * 9, m * 8, m * 10)
        dense = dict.fromkeys(routes, slow if m >= sparse_from else quick)
        sparse_wins = dense | {"cusparselt:": quick if m >= sparse_from else slow}
        dense_wins = dict.fromkeys(routes, slow) | {"cusparselt:": Timing(m * 20, m * 19, m * 21)}
        whole, sums = (sparse_wins if family in families else dense_wins for family in ("whole", "sums"))
        plan.add(KEY, Cell(m, whole, {}, sums if "sums" in families else {}))
    return plan


def check(why: str | None, told: str | None) -> None:
    assert why is None if told is None else told in why, why


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize(
    ("plan", "largest", "told"),
    [
        (measured(256, *BOTH), 256, None),
        (measured(1, *BOTH), 250, "16 tokens take 16 µs, less than the host needs outside CUDA graphs; --max-cudagraph-capture-size 256"),
        (measured(1024, *BOTH), 512, "above 512"),
        (measured(1024, *BOTH), 1023, None),
        (measured(256, *BOTH), 0, "above 0"),
        (measured(1, *BOTH), 0, "1 tokens take 1 µs"),
        (measured(1, *BOTH), 1024, None),
        (measured(1, *BOTH), 99999, None),
        (measured(9999, *BOTH), 512, "measured to be faster"),
        (measured(256, "dense:triton"), 512, "not compared them"),
        (Plan(measured(1).machine), 512, "nothing was measured: run"),
        (None, 512, "nothing was measured: run"),
    ],
)
def test_layers_are_ours_where_that_is_sure_to_pay(plan: Plan | None, largest: int, told: str | None, sums: bool) -> None:
    check(why_theirs(plan, KEY, RIVAL, sums=sums, largest=largest), told)


def test_an_engine_without_a_kernel_of_its_own_need_not_be_compared() -> None:
    assert why_theirs(measured(256, "dense:triton"), KEY, None, sums=False, largest=256) is None


@pytest.mark.parametrize(
    ("family", "sums", "told"),
    [("whole", False, None), ("whole", True, "not compared them"), ("sums", True, None), ("sums", False, "measured to be faster")],
)
def test_what_decides_is_what_will_run(family: str, sums: bool, told: str | None) -> None:
    check(why_theirs(measured(256, *BOTH, families=(family,)), KEY, RIVAL, sums=sums, largest=256), told)


def test_who_trusts_the_host_decides_by_the_gpu_alone() -> None:
    plan = measured(1, *BOTH)
    assert why_theirs(plan, KEY, RIVAL, sums=False, largest=0, host_us=0) is None
    told = why_theirs(plan, KEY, RIVAL, sums=False, largest=0, host_us=1e9)
    assert "1 tokens take 1 µs" in told and "capture" not in told
    told = why_theirs(plan, KEY, RIVAL, sums=False, largest=1024, host_us=1500)
    assert "1024 tokens take 1024 µs" in told and told.endswith("--max-cudagraph-capture-size 4096 would change that")


def test_where_every_step_is_in_a_graph_the_host_does_not_matter() -> None:
    assert why_theirs(measured(256, *BOTH), KEY, RIVAL, sums=False, largest=512, most=512, host_us=1e9) is None
    assert "above 16" in why_theirs(measured(256, *BOTH), KEY, RIVAL, sums=False, largest=16, most=512)
    assert "measured to be faster" in why_theirs(measured(9999, *BOTH), KEY, RIVAL, sums=False, largest=512, most=512)


def test_a_layer_is_judged_by_what_would_run() -> None:
    """The quickest route in the plan is one that cannot run here."""
    plan = measured(1, *BOTH)
    for m, cell in plan.cells[KEY].items():
        cell.timings["cusparselt:alg=9"] = Timing(m * 0.5, m * 0.4, m * 0.6)
    assert "256 tokens take 128 µs" in why_theirs(plan, KEY, RIVAL, sums=False, largest=256)
    assert why_theirs(plan, KEY, RIVAL, sums=False, largest=256, without={"cusparselt:alg=9"}) is None
    assert "measured to be faster" in why_theirs(plan, KEY, RIVAL, sums=False, without={"cusparselt:alg=9", "cusparselt:"})


def test_a_plan_shown_for_vllm_says_whose_the_layers_are(capsys: pytest.CaptureFixture[str]) -> None:
    layer = Layer(256, 512, Pattern(6, 8), SCHEMES["int8"])
    for plan, told in ((measured(1, *BOTH), "256 tokens take 256 µs"), (measured(9999, *BOTH), "measured to be faster")):
        rows = tuning.plan_rows(plan, [layer], vllm=True)
        why = why_theirs(plan, KEY, RIVAL, sums=True)
        assert rows and all(row["given_back"] == why for row in rows)
        assert all("given_back" not in row for row in tuning.plan_rows(plan, [layer]))
        tuning.print_plan(plan, [layer], vllm=True)
        shown = capsys.readouterr().out
        assert ("up to 512 tokens: ours" in shown) == (why is None) and (why is None or told in shown)
        tuning.print_plan(plan, [layer])
        assert "in vLLM" not in capsys.readouterr().out
