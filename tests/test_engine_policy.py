"""Whose a layer is inside a serving engine: its own kernels run unless a plan says that ours pay."""

from __future__ import annotations

from sys import maxsize

import pytest
import torch

from plans import HERE, plan_of, problem_of, times
from slidesparse.cli import tuning
from slidesparse.format import SCHEMES
from slidesparse.gemm import Plan, Route
from slidesparse.gemm.choose import Times
from slidesparse.gemm.tune import LinearShape
from slidesparse.integrations.engine.policy import WORTH, Decision, EngineFacts, decide
from slidesparse.integrations.vllm_facts import KERNEL, STEP, facts
from slidesparse.pattern import Pattern

KEY = (256, 512, "6:8", "int8")
SLID, SECOND, OURS, THEIRS = "slid:cusparselt:alg=1", "slid:cusparselt:alg=2", "dense:triton", "dense:theirs"
NOTHING, UNCOMPARED, NO_GAIN = "nothing was measured: run `slidesparse tune --other`", "the plan has not compared them", "to be faster"


def decided(
    cells: dict[int, Times], *, kernel: str | None = "theirs", most: int = maxsize, swiglu: bool = False, without: tuple[str, ...] = (),
    dropped: dict[int, str] | None = None,
) -> Decision:  # fmt: skip
    """By a plan of these times."""
    plan = plan_of(KEY, cells)
    for m, name in (dropped or {}).items():
        plan.cells[KEY][m].dropped[name] = "wrong"
    known = EngineFacts("other", kernel, most, swiglu)
    return decide(problem_of(KEY), plan, known, frozenset(map(Route.parse, without)))


def both(theirs: dict[int, float], slid: dict[int, float], **more: float) -> dict[int, Times]:
    return {m: times(dense_theirs=us, **more) | times(slid=slid[m]) for m, us in theirs.items()}


def runs(found: Decision) -> list[tuple[int, str]]:
    assert found.why is None, found.why
    return [(most, str(route)) for most, route in found.steps]


HUNDRED = {1: 100.0, 16: 100.0, 256: 100.0}


@pytest.mark.parametrize(
    ("slid", "how", "told"),
    [
        ({1: 50, 16: 50, 256: 50}, {}, None),
        ({1: 97, 16: 97, 256: 97}, {}, None),
        # Slower for few tokens, and still faster on average; at 4 tokens a step it is not.
        ({1: 110, 16: 90, 256: 60}, {}, None),
        ({1: 110, 16: 90, 256: 60}, {"most": 4}, NO_GAIN),
        ({1: 110, 16: 90, 256: 60}, {"most": 16}, "1.0050 times as fast on average over 1 to 16 tokens"),
        ({1: 110, 16: 80, 256: 120}, {"most": 16}, None),
        # Fewer tokens in a step than any that was measured: the fewest tells.
        ({1: 50, 16: 200, 256: 200}, {"most": 0}, None),
        ({1: 200, 16: 50, 256: 50}, {"most": 0}, NO_GAIN),
        ({1: 99, 16: 99, 256: 99}, {}, "1.0101 times as fast on average over 1 to 256 tokens"),
        ({1: 200, 16: 200, 256: 200}, {}, NO_GAIN),
        ({1: 50, 16: 50, 256: 50}, {"kernel": "absent"}, UNCOMPARED),
        ({1: 50, 16: 50, 256: 50}, {"without": (SLID,)}, NO_GAIN),
    ],
)
def test_layers_are_ours_where_that_pays(slid: dict[int, float], how: dict, told: str | None) -> None:
    found = decided(both(HUNDRED, slid), **how)
    if told is None:
        assert found.layouts == ("slid",) and runs(found) == [(maxsize, SLID)]
    else:
        assert told in found.why and found == Decision(found.why), found.why


@pytest.mark.parametrize("plan", [None, Plan(HERE), plan_of((1, 2, "6:8", "int8"), {1: times(dense=1)})])
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_layer_that_was_not_measured_is_theirs(plan: Plan | None, swiglu: bool) -> None:
    assert decide(problem_of(KEY), plan, EngineFacts("other", "theirs", swiglu=swiglu)) == Decision(NOTHING)


@pytest.mark.parametrize(("faster", "ours"), [(WORTH + 0.001, True), (WORTH - 0.001, False)])
def test_it_must_be_worth_a_copy(faster: float, ours: bool) -> None:
    found = decided(both(HUNDRED, dict.fromkeys(HUNDRED, 100 / faster)))
    assert (found.why is None) == ours
    if not ours:
        assert found.why == f"ours would be {faster:.4f} times as fast on average over 1 to 256 tokens, and {WORTH} is asked"


def test_times_of_every_measured_number_count_the_same() -> None:
    """Geometric means: a half weighs as much as twice the time."""
    assert "1.0000 times as fast" in decided(both({1: 100, 16: 100}, {1: 50, 16: 200})).why
    assert decided(both({1: 100, 16: 1000}, {1: 50, 16: 1800})).why is None


def test_dense_kernels_that_beat_the_engines_are_no_gain() -> None:
    cells = {m: times(dense_theirs=100, dense=us) for m, us in ((1, 50), (16, 100), (256, 40))}
    assert NO_GAIN in decided(cells).why


def test_within_an_engine_another_dense_kernel_must_be_worth_it() -> None:
    """One that is faster than the engine's by the margin takes part, and may then keep a layer from being slid."""
    assert runs(decided({16: times(dense_theirs=100, dense=98, slid=96.5)})) == [(maxsize, SLID)]
    assert NO_GAIN in decided({16: times(dense_theirs=100, dense=90, slid=96.5)}).why
    assert runs(decided({16: times(dense_theirs=100, dense=90, slid=96.5)}, without=(OURS,))) == [(maxsize, SLID)]


def test_of_a_kernel_that_was_found_wrong_no_time_is_missed() -> None:
    cells = {16: times(dense=100, slid=50), 256: times(dense=100, dense_theirs=100, slid=50)}
    assert list(decided(cells).plan.times(KEY)) == [256] == list(decided(cells, dropped={16: OURS}).plan.times(KEY))
    assert list(decided(cells, dropped={16: THEIRS}).plan.times(KEY)) == [16, 256]


def test_cells_without_the_engines_kernel_take_no_part() -> None:
    """They tell nothing of the engine, and neither keep a layer from being slid nor choose a kernel."""
    cells = {2: times(dense=1, packed=1), 4: times(dense=1, slid=9), 16: times(dense_theirs=100, slid=50)}
    assert runs(decided(cells)) == [(maxsize, SLID)] and list(decided(cells).plan.times(KEY)) == [16]
    assert UNCOMPARED in decided({m: cells[m] for m in (2, 4)}).why
    assert runs(decided({2: cells[2], 16: times(dense_theirs=100, slid=200)}, swiglu=True)) == [(maxsize, THEIRS)]


def test_where_nothing_of_the_engines_was_right_nothing_is_gained() -> None:
    found = decided({16: times(dense=100, slid=50)}, dropped={16: THEIRS})
    assert NO_GAIN in found.why


def test_of_16_bit_layers_the_engines_kernel_is_the_quickest_dense_one() -> None:
    cells = {16: times(dense_native=100, dense_other=80, slid=79), 256: times(dense_native=100, slid=50)}
    assert decided(cells, kernel=None).why is None
    assert NO_GAIN in decided({16: cells[16] | times(slid=81)}, kernel=None).why
    assert decided({16: cells[16] | times(slid=81)}, kernel=None, without=("dense:other",)).why is None


def test_packed_weights_may_pay_too() -> None:
    found = decided({1: times(dense_theirs=100, packed=50), 16: times(dense_theirs=100, packed=97)})
    assert runs(found) == [(maxsize, "packed:triton")] and found.layouts == ("packed",)
    # But as another dense kernel, which must be worth it everywhere.
    assert NO_GAIN in decided({1: times(dense_theirs=100, packed=50), 16: times(dense_theirs=100, packed=98)}).why


def test_a_layer_is_judged_by_what_would_run() -> None:
    cells = {m: times(dense_theirs=100, slid=90, slid_2=50) for m in (1, 16)}
    assert runs(decided(cells)) == [(maxsize, SECOND)]
    assert runs(decided(cells, without=(SECOND,))) == [(maxsize, SLID)]
    assert NO_GAIN in decided(cells, without=(SECOND, SLID)).why


def test_behind_swiglu_layers_are_ours_on_dense_weights_where_others_pay_too_little() -> None:
    for slid, kept in ((50.0, "slid"), (98.0, "dense")):
        cells = both(HUNDRED, dict.fromkeys(HUNDRED, slid), dense=99)
        assert (decided(cells).why is None) == (kept == "slid")
        found = decided(cells, swiglu=True)
        assert found.layouts == (kept,) and {route.layout for _, route in found.steps} == {kept}
        if kept == "dense":
            assert runs(found) == [(maxsize, THEIRS)]
            assert {route.layout for route in found.plan.routes(KEY)} == {"dense"}, "what runs the layer cannot choose anew"
    assert UNCOMPARED in decided({16: times(dense=100, slid=50)}, swiglu=True).why


def test_the_plan_that_comes_with_a_decision_chooses_the_same_again() -> None:
    """Layers are made ready by it, so it holds what was left: neither larger steps nor dense kernels that are hardly faster."""
    cells = both({1: 100, 16: 100, 256: 100}, {1: 50, 16: 60, 256: 500}, dense=99)
    found = decided(cells, most=16)
    assert found.layouts == ("slid",) and list(found.plan.times(KEY)) == [1, 16]
    assert set(map(str, found.plan.routes(KEY))) == {THEIRS, SLID}
    assert decided(cells).why is not None


@pytest.mark.parametrize(
    ("n", "k", "scheme", "dtype", "kernel"),
    [
        (64, 128, "int8", torch.bfloat16, KERNEL),
        (64, 128, "fp8", torch.float16, KERNEL),
        (60, 128, "int8", torch.bfloat16, None),
        (64, 120, "fp8", torch.bfloat16, None),
        (64, 128, "int8", torch.float32, None),
        (64, 128, "bf16", torch.bfloat16, None),
    ],
)
def test_whose_kernel_vllm_runs(n: int, k: int, scheme: str, dtype: torch.dtype, kernel: str | None) -> None:
    found = facts(problem_of((n, k, "6:8", scheme), dtype=dtype), most=77, swiglu=False)
    assert found == EngineFacts("vllm", kernel, 77, False)


SHAPE = LinearShape(256, 512, Pattern(6, 8), SCHEMES["int8"])


def vllms(slid: float, dense: float = 120.0) -> Plan:
    cells = {m: times(dense_cutlass=100, dense=dense, slid=slid) for m in (16, 4096)}
    return plan_of(KEY, cells)


@pytest.mark.parametrize(("slid", "told"), [(50.0, None), (200.0, NO_GAIN), (98.0, "1.0204 times as fast")])
def test_a_plan_shown_for_vllm_says_whose_the_layers_are(slid: float, told: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    plan = vllms(slid)
    rows = tuning.plan_rows(plan, [SHAPE], vllm=True)
    assert [row["m"] for row in rows] == [16, 4096]
    assert all(row["given_back"] is None if told is None else told in row["given_back"] for row in rows)
    assert all("given_back" not in row for row in tuning.plan_rows(plan, [SHAPE]))
    tuning.print_plan(plan, [SHAPE], vllm=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"up to {STEP} tokens in a step: " + ("ours, keeps slid" if told is None else "vLLM's own kernels, ") in shown
        and (told or "") in shown
    )
    tuning.print_plan(plan, [SHAPE])
    assert "in vLLM" not in capsys.readouterr().out


def test_a_plan_shown_for_vllm_tells_which_layers_swiglu_makes_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for swiglu, told in (((), "in a step: vLLM's own kernels"), ((SHAPE,), "in a step: ours, keeps dense")):
        tuning.print_plan(vllms(200.0, 50.0), [SHAPE], vllm=True, swiglu=swiglu)
        assert told in " ".join(capsys.readouterr().out.split())


def test_without_vllm_its_kernels_do_not_run_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(KEY, {16: times(dense_elsewhere=10, dense=120, slid=60)})
    (row,) = tuning.plan_rows(plan, [SHAPE])
    assert (row["dense"], row["fast"], row["fast_us"]) == (OURS, SLID, 60)
    tuning.print_plan(plan, [SHAPE])
    assert "also timed, but not to be had here without --vllm: dense:elsewhere" in " ".join(capsys.readouterr().out.split())


def test_a_layer_without_a_plan_is_shown_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    tuning.print_plan(Plan(HERE, {KEY: {}}), [SHAPE])
    tuning.print_plan(Plan(HERE), [SHAPE], vllm=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "tune --vllm" in lines[1]
