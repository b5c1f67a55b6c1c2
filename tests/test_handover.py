"""Layers are left to a serving engine's own kernels unless a plan says that ours pay."""

from __future__ import annotations

import pytest
import torch

from slidesparse.cli import tuning
from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan, Problem
from slidesparse.gemm.handover import RIVAL, average, gains, rival_of, why_theirs, within_engine
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
    ("plan", "most", "told"),
    [
        (measured(256, *BOTH), 4096, None),
        (measured(1, *BOTH), 4096, None),
        (measured(4096, *BOTH), 4096, None),
        (measured(4096, *BOTH), 4095, "measured to be faster"),  # no step has so many tokens
        (measured(16, *BOTH), 1, "measured to be faster"),
        (measured(16, *BOTH), 0, "measured to be faster"),  # fewer than any that was measured: the fewest tells
        (measured(1, *BOTH), 0, None),
        (measured(9999, *BOTH), 4096, "measured to be faster"),
        (measured(256, "dense:triton"), 4096, "not compared them"),
        (Plan(measured(1).machine), 4096, "nothing was measured: run"),
        (None, 4096, "nothing was measured: run"),
    ],
)
def test_layers_are_ours_where_that_pays(plan: Plan | None, most: int, told: str | None, sums: bool) -> None:
    check(why_theirs(plan, KEY, RIVAL, sums=sums, most=most), told)


@pytest.mark.parametrize(("faster", "told"), [(1.031, None), (1.029, "1.0290 times as fast on average over 1 to 4096 tokens, and 1.03")])
def test_it_must_be_worth_a_copy(faster: float, told: str | None) -> None:
    plan = Plan(measured(1).machine)
    for m in (1, 16, 4096):
        theirs, ours = Timing(100.0, 100.0, 100.0), Timing(100 / faster, 100 / faster, 100 / faster)
        plan.add(KEY, Cell(m, {RIVAL: theirs, "cusparselt:": ours}))
    check(why_theirs(plan, KEY, RIVAL, sums=False), told)


def flat(us: float) -> Timing:
    return Timing(us, us, us)


def test_dense_kernels_that_beat_the_engines_are_no_gain() -> None:
    plan = Plan(measured(1).machine)
    for m, us in ((1, 50.0), (16, 100.0), (256, 200.0)):
        plan.add(KEY, Cell(m, {RIVAL: flat(100.0), "dense:triton": flat(us)}))
    assert gains(plan, KEY, RIVAL, sums=False) == {1: 1, 16: 1, 256: 1}
    assert "nothing was measured to be faster" in why_theirs(plan, KEY, RIVAL, sums=False)
    assert average({1: 2.0, 16: 1.0, 256: 0.5}) == pytest.approx(1) and average({}) == 1


def test_behind_swiglu_layers_are_ours_without_sparse_copies_that_pay_little() -> None:
    for us, kept in ((95.0, "dense:cutlass"), (50.0, "cusparselt:")):
        plan = Plan(measured(1).machine)
        for m in (16, 256):
            plan.add(KEY, Cell(m, {RIVAL: flat(100.0), "dense:triton": flat(98.0), "cusparselt:": flat(us if m == 16 else 110.0)}))
        assert (why_theirs(plan, KEY, RIVAL, sums=False) is None) == (us == 50.0)
        assert why_theirs(plan, KEY, RIVAL, sums=False, swiglu=True) is None
        within = within_engine(plan, KEY, RIVAL, sums=False)
        assert within.route(KEY, 16, "fast") == kept and within.route(KEY, 256, "fast") == RIVAL
    assert "not compared them" in why_theirs(measured(1, "dense:triton"), KEY, RIVAL, sums=False, swiglu=True)
    assert "nothing was measured: run" in why_theirs(None, KEY, RIVAL, sums=False, swiglu=True)


@pytest.mark.parametrize(
    ("sparse", "dense", "alone"),
    [
        ({16: 50.0, 256: 102.0}, {}, True),  # hardly slower where dense would run
        ({16: 50.0, 256: 104.0}, {}, False),  # slower than the engine's
        ({16: 50.0, 64: 50.0, 256: 90.0}, {256: 80.0}, False),  # much slower than another dense kernel
        ({16: 50.0, 64: 50.0, 256: 90.0}, {256: 85.0}, True),  # a little
        ({16: 50.0, 256: 50.0, 512: 200.0}, {}, True),  # no step has so many tokens
        ({16: 50.0, 512: 200.0}, {}, False),  # it tells what runs 256
        ({16: 99.0, 256: 99.0}, {}, False),  # sparse pays too little
        ({16: 94.5, 32: 94.5, 64: 102.9, 256: 102.9}, {}, False),  # by itself
    ],
)
def test_a_dense_copy_must_be_worth_it_too(sparse: dict[int, float], dense: dict[int, float], alone: bool) -> None:
    plan = Plan(measured(1).machine)
    for m, us in sparse.items():
        plan.add(KEY, Cell(m, {}, {}, {RIVAL: flat(100.0), "dense:triton": flat(dense.get(m, 100.0)), "cusparselt:": flat(us)}))
    within = within_engine(plan, KEY, RIVAL, sums=True, most=256)
    found = [within.route(KEY, m, "fast", sums=True) for m in (1, 16, 100, 256)]
    assert (found == ["cusparselt:"] * 4) == alone, found
    assert within.table(KEY, sums=True).keys() == sparse.keys()


def test_what_cannot_run_here_is_no_dense_copys_reason() -> None:
    plan = Plan(measured(1).machine)
    for m, us in ((16, 50.0), (256, 90.0)):
        sparse = {"cusparselt:": flat(us), "cusparselt:alg=1": flat(us - 5)}
        plan.add(KEY, Cell(m, {}, {}, {RIVAL: flat(100.0), "dense:triton": flat(60.0)} | sparse))
    for without, runs in (
        (set(), "dense:triton"),
        ({"dense:triton"}, "cusparselt:alg=1"),
        ({"dense:triton", "cusparselt:alg=1"}, "cusparselt:"),
    ):
        assert within_engine(plan, KEY, RIVAL, sums=True, without=without).route(KEY, 256, "fast", without, sums=True) == runs


def test_what_fell_does_not_stand_for_dense() -> None:
    plan = Plan(measured(1).machine)
    for m in (16, 256):
        dropped = {"sums of dense:tensorwise": "wrong"}
        plan.add(KEY, Cell(m, {}, dropped, {RIVAL: flat(100.0), "cusparselt:": flat(50.0 if m == 16 else 101.0)}))
    assert within_engine(plan, KEY, RIVAL, sums=True).route(KEY, 256, "fast", sums=True) == "cusparselt:"


def test_sparse_alone_needs_a_sparse_product_wherever_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    plan, dense = Plan(measured(1).machine), {RIVAL: flat(100.0), "dense:triton": flat(120.0)}
    for m in (16, 8192):
        plan.add(KEY, Cell(m, {}, {}, dense | {"cusparselt:alg=7": flat(50.0)}))
    plan.add(KEY, Cell(16384, {}, {"sums of cusparselt:alg=7": "out of memory"}, dense))
    for most, kept in ((8192, []), (8193, [16, 8192])):
        within = within_engine(plan, KEY, RIVAL, sums=True, most=most)
        assert [within.route(KEY, m, "fast", sums=True) for m in (16, 8192, 16384)] == ["cusparselt:alg=7", "cusparselt:alg=7", RIVAL]
        assert [m for m in (16, 8192) if RIVAL in within.cells[KEY][m].sums] == kept
    tuning.print_plan(plan, [Layer(256, 512, Pattern(6, 8), SCHEMES["int8"])], vllm=True)
    assert "in a step: ours" in " ".join(capsys.readouterr().out.split())


def test_what_was_found_wrong_does_not_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    """The engine's product is wrong for few tokens, where sparse alone was right but is not worth a copy: nothing was measured."""
    plan = Plan(measured(1).machine)
    whole = {RIVAL: flat(100.0), "dense:triton": flat(120.0)}
    plan.add(KEY, Cell(16, whole, {f"sums of {RIVAL}": "wrong"}, {"cusparselt:": flat(100.0)}))
    plan.add(KEY, Cell(256, whole, {}, {RIVAL: flat(100.0), "cusparselt:": flat(100.0)}))
    within = within_engine(plan, KEY, RIVAL, sums=True)
    assert [within.route(KEY, m, "fast", sums=True) for m in (16, 256)] == [None, RIVAL]
    layer = Layer(256, 512, Pattern(6, 8), SCHEMES["int8"])
    for swiglu in ((), (layer,)):
        tuning.print_plan(plan, [layer], vllm=True, swiglu=swiglu)
        assert ("in a step: ours" in " ".join(capsys.readouterr().out.split())) == (layer in swiglu)


def test_a_dense_kernel_that_would_not_run_does_not_hide_a_gain() -> None:
    plan = Plan(measured(1).machine)
    sparse = Timing(95.0, 94.0, 97.6)
    plan.add(KEY, Cell(16, {RIVAL: flat(100.0), "dense:triton": flat(97.5), "cusparselt:": sparse}))
    assert gains(plan, KEY, RIVAL, sums=False) == {16: pytest.approx(100 / 95)}
    assert (
        why_theirs(plan, KEY, RIVAL, sums=False) is None
        and within_engine(plan, KEY, RIVAL, sums=False).route(KEY, 16, "fast") == "cusparselt:"
    )


def test_within_an_engine_another_dense_kernel_must_be_worth_it() -> None:
    plan = Plan(measured(1).machine)
    for m, us in ((16, 96.0), (256, 98.0)):
        plan.add(KEY, Cell(m, {}, {}, {RIVAL: flat(100.0), "dense:triton": flat(us)}))
    within = within_engine(plan, KEY, RIVAL, sums=True)
    assert [within.route(KEY, m, "fast", sums=True) for m in (16, 256)] == ["dense:triton", RIVAL]
    for rival, without in ((None, set()), (RIVAL, {RIVAL})):
        within = within_engine(plan, KEY, rival, sums=True, without=without)
        assert within.route(KEY, 256, "fast", without, sums=True) == "dense:triton"


def test_the_engine_is_taken_at_its_quickest() -> None:
    """Its whole linear leaves nothing to the compiler, whatever its bare product takes."""
    cell = Cell(16, {RIVAL: Timing(90.0, 90.0, 90.0)}, {}, {RIVAL: Timing(100.0, 100.0, 100.0), "cusparselt:": Timing(45.0, 45.0, 45.0)})
    plan = Plan(measured(1).machine)
    plan.add(KEY, cell)
    assert gains(plan, KEY, RIVAL, sums=True) == {16: 2}
    plan.add(KEY, Cell(64, {}, {f"sums of {RIVAL}": "wrong", RIVAL: "wrong"}, {"cusparselt:": Timing(45.0, 45.0, 45.0)}))
    assert gains(plan, KEY, RIVAL, sums=True) == {16: 2} and why_theirs(plan, KEY, RIVAL, sums=True) is None


def test_of_16_bit_layers_the_engines_kernel_is_torchs() -> None:
    assert why_theirs(measured(256, "dense:native"), KEY, None, sums=False) is None
    assert gains(measured(1024, "dense:native"), KEY, None, sums=False) == {1: 1, 16: 1, 256: 1, 1024: 9, 4096: 9}


@pytest.mark.parametrize(
    ("n", "k", "scheme", "dtype", "rival"),
    [
        (64, 128, "int8", torch.bfloat16, RIVAL),
        (64, 128, "fp8", torch.float16, RIVAL),
        (60, 128, "int8", torch.bfloat16, None),
        (64, 120, "fp8", torch.bfloat16, None),
        (64, 128, "int8", torch.float32, None),
        (64, 128, "bf16", torch.bfloat16, None),
    ],
)
def test_whose_kernel_the_engine_runs(n: int, k: int, scheme: str, dtype: torch.dtype, rival: str | None) -> None:
    assert rival_of(Problem(n, k, Pattern(6, 8), SCHEMES[scheme], "cuda", dtype)) == rival


@pytest.mark.parametrize(
    ("family", "sums", "told"),
    [("whole", False, None), ("whole", True, "not compared them"), ("sums", True, None), ("sums", False, "measured to be faster")],
)
def test_what_decides_is_what_will_run(family: str, sums: bool, told: str | None) -> None:
    check(why_theirs(measured(256, *BOTH, families=(family,)), KEY, RIVAL, sums=sums), told)


def test_a_layer_is_judged_by_what_would_run() -> None:
    """The quickest route in the plan is one that cannot run here."""
    plan = measured(1, *BOTH)
    for m, cell in plan.cells[KEY].items():
        cell.timings["cusparselt:alg=9"] = Timing(m * 0.5, m * 0.4, m * 0.6)
    assert gains(plan, KEY, RIVAL, sums=False) == dict.fromkeys((1, 16, 256, 1024, 4096), 18)
    assert gains(plan, KEY, RIVAL, sums=False, without={"cusparselt:alg=9"}) == dict.fromkeys((1, 16, 256, 1024, 4096), 9)
    assert "measured to be faster" in why_theirs(plan, KEY, RIVAL, sums=False, without={"cusparselt:alg=9", "cusparselt:"})


def test_a_plan_shown_for_vllm_tells_which_layers_swiglu_makes_ours(capsys: pytest.CaptureFixture[str]) -> None:
    layer, plan = Layer(256, 512, Pattern(6, 8), SCHEMES["int8"]), Plan(measured(1).machine)
    for m in (16, 4096):
        times = {RIVAL: flat(100.0), "dense:triton": flat(50.0), "cusparselt:": flat(99.0)}
        plan.add(KEY, Cell(m, times, {}, times))
    joined = "ours, with SiLU in the pass that quantises, on dense kernels"
    for swiglu, told in (((), "in a step: its own kernels"), ((layer,), joined)):
        tuning.print_plan(plan, [layer], vllm=True, swiglu=swiglu)
        assert told in " ".join(capsys.readouterr().out.split())


def test_a_plan_shown_for_vllm_says_whose_the_layers_are(capsys: pytest.CaptureFixture[str]) -> None:
    layer = Layer(256, 512, Pattern(6, 8), SCHEMES["int8"])
    for plan, told in ((measured(1, *BOTH), None), (measured(9999, *BOTH), "measured to be faster")):
        rows = tuning.plan_rows(plan, [layer], vllm=True)
        why = why_theirs(plan, KEY, RIVAL, sums=True)
        assert rows and all(row["given_back"] == why for row in rows)
        assert all("given_back" not in row for row in tuning.plan_rows(plan, [layer]))
        tuning.print_plan(plan, [layer], vllm=True)
        shown = capsys.readouterr().out
        assert "up to 8192 tokens in a step: " + ("ours" if told is None else "its own kernels: ") in shown and (told or "") in shown
        tuning.print_plan(plan, [layer])
        assert "in vLLM" not in capsys.readouterr().out
