"""The rule of choice, on times made by hand: which layouts of a layer stay, and which route runs how many tokens."""

from __future__ import annotations

from math import log
from sys import maxsize

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plans import HERE, at, plan_of, problem_of, times
from slidesparse import ops
from slidesparse.format import SCHEMES
from slidesparse.gemm import Plan, Problem, Route, Runner, Weights, plans, use_plan
from slidesparse.gemm.choose import BUDGET, GUARD, SECOND, TIE, cell_of, choice_of, fastest, geometric_mean, intervals, kept_layouts
from slidesparse.gemm.explain import plan_rows, summary
from slidesparse.gemm.layouts import LAYOUTS
from slidesparse.ops import cusparselt
from slidesparse.packing import pack
from slidesparse.pattern import Pattern
from slidesparse.pruning import prune
from slidesparse.quantization import quantize_weight
from slidesparse.tolerance import check_bitwise

KEY = (24, 64, "6:8", "int8")
BYTES = {"packed": 88, "dense": 100, "slid": 94}
SMALL = {"packed": 59, "dense": 100, "slid": 60}
ALL = tuple(BYTES)
SHAPES = {
    "Qwen2.5-7B": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "Llama-3.2-1B": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
}
"""N and K of layers as serving engines merge them."""


def names(steps: tuple[tuple[int, Route | None], ...]) -> list[tuple[int, str | None]]:
    return [(most, None if route is None else str(route)) for most, route in steps]


@given(st.floats(1, 1e6), st.floats(0.9, 1.1), st.floats(0.9, 1.1))
def test_a_route_that_reads_no_dense_weights_runs_only_where_it_wins_by_the_guard(dense: float, packed: float, slid: float) -> None:
    measured = times(dense=dense, dense_native=dense * 2, packed=dense * packed, slid=dense * slid, slid_2=dense * slid * 1.5)
    best = min(dense, dense * packed)
    runs = fastest(measured, ALL)
    if runs.layout == "slid":
        assert runs.variant == "alg=1" and measured[runs].p50 * GUARD < best
    else:
        assert measured[runs].p50 == best and dense * slid * GUARD >= best
    assert fastest(measured, ("dense",)) == Route("dense", "triton") and fastest(measured, ("packed",)) == Route("packed", "triton")


def test_within_one_layout_the_quickest_runs_and_nothing_where_nothing_was_measured() -> None:
    measured = times(slid=5, slid_2=4.99, dense_native=6)
    assert str(fastest(measured, ("slid",))) == "slid:cusparselt:alg=2"
    assert fastest(measured, ("packed",)) is None and fastest({}, ALL) is None
    assert fastest(measured, ("packed", "slid")).variant == "alg=2", "the guard is against dense weights that are there"


@pytest.mark.parametrize(
    ("cells", "nbytes", "kept"),
    [
        # The lowest geometric mean, not the lowest sum: 2 · 1/1.5 against 1000 · 1.2.
        ({1: times(dense=2, slid=1), 64: times(dense=1000, slid=1200)}, BYTES, ("slid",)),
        ({1: times(dense=1, slid=2), 64: times(dense=1000, slid=900)}, BYTES, ("dense",)),
        # Of those within a fiftieth the one of the fewest bytes.
        ({1: times(dense=100, packed=101.9, slid=101)}, BYTES, ("packed",)),
        ({1: times(dense=100, packed=102.1, slid=101)}, BYTES, ("slid",)),
        ({1: times(dense=100, packed=103, slid=102.5)}, BYTES, ("dense",)),
        # Of the same bytes the quicker one.
        ({1: times(dense=100, slid=101)}, {"dense": 94, "slid": 94}, ("dense",)),
        # The quickest route of a layout stands for it.
        ({1: times(dense=100, dense_native=70, slid=80)}, BYTES, ("dense",)),
        # A layout that a cell lacks cannot stay, however fast it is in the others.
        ({1: times(dense=10, packed=20, slid=1), 64: times(dense=10, packed=20)}, BYTES, ("dense",)),
        ({1: times(packed=20), 64: times(dense=10, packed=20, slid=1)}, BYTES, ("packed",)),
        ({1: times(dense=10), 64: times(slid=10)}, BYTES, ()),
        # Nor can one whose bytes were not given.
        ({1: times(dense=10, slid=1)}, {"dense": 100}, ("dense",)),
        ({}, BYTES, ()),
    ],
)
def test_one_layout_stays(cells, nbytes, kept) -> None:
    assert kept_layouts(cells, nbytes) == kept


FOUR = {m: times(dense=100, slid=60) for m in (16, 64, 256)}


@pytest.mark.parametrize(
    ("gain", "many", "nbytes", "kept"),
    [
        (1.031, 1, SMALL | {"dense": 65}, ("slid",)),  # 60 + 65 of at most 1.25 · 65 = 81.25
        (1.031, 1, SMALL | {"packed": 65}, ("slid", "packed")),  # 60 + 65 = 125 of at most 125
        (1.031, 1, SMALL | {"packed": 66}, ("slid",)),
        (1.029, 1, SMALL, ("slid",)),  # too little
        (1.031, 2, SMALL, ("slid",)),  # in one of five cells
    ],
)
def test_a_second_layout_stays_where_it_is_faster_for_a_quarter_and_both_are_within_the_budget(gain, many, nbytes, kept) -> None:
    cells = {m: found | times(packed=90) for m, found in FOUR.items()} | {1: times(dense=100, packed=100 / gain, slid=100)}
    if many == 2:
        cells |= {1024: FOUR[16] | times(packed=90)}
    assert kept_layouts(cells, nbytes) == kept


def test_of_two_that_could_be_second_the_quicker_one_stays() -> None:
    cells = {m: times(dense=100, packed=100, slid=50) for m in (1, 2, 3)} | {4: times(dense=70, packed=60, slid=100)}
    sizes = {"packed": 60, "dense": 100, "slid": 60}
    assert kept_layouts(cells, sizes) == ("slid", "packed")
    assert kept_layouts(cells, sizes | {"packed": 66}) == ("slid",), "dense weights would be beyond the budget"
    assert kept_layouts(cells, {"packed": 66, "dense": 100, "slid": 25}) == ("slid", "packed")
    assert kept_layouts({m: found | times(packed=200) for m, found in cells.items()}, {"packed": 66, "dense": 100, "slid": 25}) == (
        "slid",
        "dense",
    )


def test_the_asked_numbers_of_tokens_choose() -> None:
    cells = {1: times(dense=1, slid=2), 64: times(dense=1, slid=2), 4096: times(dense=2, slid=1)}
    assert kept_layouts(cells, BYTES) == ("dense",)
    assert kept_layouts(cells, BYTES, [4096]) == ("slid",)
    assert kept_layouts(cells, BYTES, [65, 90_000]) == ("slid",), "a larger cell tells of fewer tokens, the largest of all beyond"
    assert kept_layouts(cells, BYTES, [2, 64, 65]) == ("dense",)
    assert kept_layouts(cells, BYTES, []) == ("dense",) and kept_layouts({}, BYTES, [1]) == ()
    # A layout that only an unasked cell lacks may stay.
    assert kept_layouts(cells | {8: times(dense=1)}, BYTES, [4096]) == ("slid",)


def test_an_asked_number_counts_as_often_as_it_is_asked() -> None:
    cells = {1: times(dense=10, slid=14), 64: times(dense=14, slid=9)}
    assert kept_layouts(cells, BYTES, [1, 64]) == ("slid",) and kept_layouts(cells, BYTES, [1, 1, 64]) == ("dense",)


@pytest.mark.parametrize(("m", "cell"), [(1, 1), (2, 16), (16, 16), (17, 64), (64, 64), (65, 64), (10**9, 64)])
def test_the_next_larger_cell_tells_of_a_number_of_tokens(m: int, cell: int) -> None:
    assert cell_of([16, 1, 64], m) == cell


def test_between_measured_numbers_the_larger_one_tells() -> None:
    cells = {1: times(dense=1, slid=2), 16: times(dense=2, slid=1), 64: times(dense=2, slid=1), 256: times(dense=1, slid=2)}
    assert names(intervals(cells, ("dense", "slid"))) == [(1, "dense:triton"), (64, "slid:cusparselt:alg=1"), (maxsize, "dense:triton")]
    assert names(intervals(cells, ("dense",))) == [(maxsize, "dense:triton")]
    assert names(intervals(cells, ("packed",))) == [(maxsize, None)] and intervals({}, ALL) == ()
    lacking = {1: times(dense=1), 16: times(slid=1), 64: times(dense=1)}
    assert names(intervals(lacking, ("dense",))) == [(1, "dense:triton"), (16, None), (maxsize, "dense:triton")]


def test_between_numbers_far_apart_the_smaller_one_tells_as_far_as_it_is_near() -> None:
    cells = {16: times(dense=2, slid=1), 256: times(dense=1, slid=2), 4095: times(dense=2, slid=1)}
    steps = [(64, "slid:cusparselt:alg=1"), (256, "dense:triton"), (maxsize, "slid:cusparselt:alg=1")]
    assert names(intervals(cells, ("dense", "slid"))) == steps


@given(
    st.dictionaries(st.integers(1, 10_000), st.tuples(*[st.floats(1, 100)] * 3), min_size=1, max_size=8),
    st.lists(st.integers(1, 20_000), max_size=4),
)
def test_whatever_was_measured_the_rule_holds(table: dict[int, tuple[float, float, float]], asked: list[int]) -> None:
    """Against the rule written down once more: means by hand, the budget, and that intervals never leave the layouts that stay."""
    cells = {m: times(dense=dense, packed=packed, slid=slid) for m, (dense, packed, slid) in table.items()}
    kept = kept_layouts(cells, SMALL, asked)
    told = [cells[cell_of(cells, m)] for m in asked] or [*cells.values()]
    means = {name: sum(log(one[fastest(one, (name,))].p50) for one in told) for name in SMALL}
    assert means[kept[0]] <= min(means.values()) + len(told) * log(TIE) + 1e-6
    assert 1 <= len(kept) <= 2 and sum(SMALL[name] for name in kept) <= BUDGET * SMALL["dense"]
    if len(kept) == 2:
        gains = [one[fastest(one, kept[:1])].p50 / one[fastest(one, kept[1:])].p50 for one in told]
        assert sum(gain > SECOND - 1e-9 for gain in gains) >= len(told) / 4
    steps = intervals(cells, kept)
    assert [most for most, _ in steps] == sorted({most for most, _ in steps}) and steps[-1][0] == maxsize
    for m in cells:
        runs = next(route for most, route in steps if m <= most)
        assert runs == fastest(cells[m], kept) and runs.layout in kept


def test_geometric_means() -> None:
    assert geometric_mean([]) == 1 and geometric_mean([2.0, 8.0]) == pytest.approx(4) and geometric_mean([0.5, 2.0]) == pytest.approx(1)


def test_a_plan_chooses_by_its_times() -> None:
    for slid, layout, runs in ((11, "dense", "dense:triton"), (7, "slid", "slid:cusparselt:alg=1")):
        layouts, steps = choice_of(plan_of(KEY, {16: times(dense=10, slid=slid, packed=12)}), problem_of(KEY))
        assert layouts == (layout,) and names(steps) == [(maxsize, runs)]


def test_lean_keeps_the_packed_weights_whatever_is_faster() -> None:
    plan = plan_of(KEY, {1: times(dense=1, slid=1), 16: times(dense=10, packed=100, packed_native=90)})
    layouts, steps = choice_of(plan, problem_of(KEY), memory="lean")
    assert layouts == ("packed",) and names(steps) == [(1, None), (maxsize, "packed:native")]


def test_routes_that_cannot_run_make_way_and_take_their_layout_with_them() -> None:
    plan = plan_of(KEY, {16: times(dense=10, dense_other=5, slid_1=4, slid_2=3)})
    problem, slid = problem_of(KEY), [Route("slid", "cusparselt", f"alg={number}") for number in (1, 2)]
    for without, runs in (((), slid[1]), (slid[1:], slid[0]), (slid, Route("dense", "other"))):
        layouts, steps = choice_of(plan, problem, without=without)
        assert layouts == (runs.layout,) and steps == ((maxsize, runs),)
    assert choice_of(plan, problem, without=plan.routes(KEY)) == (("dense",), ())
    assert choice_of(Plan(HERE), problem) == (("dense",), ())


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("pattern", ["2:4", "6:8", "8:10", "14:16"])
def test_bytes_are_known_before_a_layout_is_made(scheme: str, pattern: str) -> None:
    """Slid weights are the library's matter, see `test_cusparselt`: here they are held against what 2:4 needs at least."""
    for n, k in ((64, 640), (33, 100)):
        problem = problem_of((n, k, pattern, scheme), capability=(0, 0) if scheme != "fp8" else (9, 0))
        stored, scale = quantize_weight(prune(torch.randn(n, k), Pattern.parse(pattern)), SCHEMES[scheme])
        packed = pack(stored, Pattern.parse(pattern))
        copy = LAYOUTS["packed"].prepare(problem, Weights(packed, SCHEMES[scheme], scale))
        assert LAYOUTS["packed"].nbytes(problem) == sum(tensor.nbytes for tensor in copy[:2])
        assert LAYOUTS["dense"].nbytes(problem) == stored.nbytes
        values = n * Pattern.parse(pattern).slid_k(k) * stored.itemsize // 2
        assert values < LAYOUTS["slid"].nbytes(problem), (n, k)


@pytest.mark.parametrize("model", SHAPES)
def test_the_shipped_plans_keep_at_most_the_budget(model: str) -> None:
    found = set()
    for gpu in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        plan = Plan.load(plans._shipped(gpu))
        for key in plan.cells:
            if key[:2] not in SHAPES[model]:
                continue
            problem = problem_of(key)
            dense = LAYOUTS["dense"].nbytes(problem)
            for tokens in (None, [1], [16, 64], [4096, 8192]):
                kept, steps = choice_of(plan, problem, tokens=tokens)
                assert sum(LAYOUTS[name].nbytes(problem) for name in kept) <= BUDGET * dense, (key, kept)
                assert all(route is None or route.layout in kept for _, route in steps)
                found.add((len(kept), kept[0]))
            assert choice_of(plan, problem, memory="lean")[0] == ("packed",)
    assert "dense" in {kept for _, kept in found}


@pytest.mark.parametrize("key", [(n, k, pattern, "int8") for n, k in SHAPES["Qwen2.5-7B"] for pattern in ("6:8", "14:16")])
def test_dense_weights_never_stand_beside_slid_ones_of_wide_patterns(key) -> None:
    """A decode that dense weights would speed up is no reason for twice the memory."""
    problem = problem_of(key)
    cells = {m: times(dense=1 if m < 64 else 9, slid=9 if m < 64 else 1, packed=20) for m in (1, 4, 16, 64, 256, 1024)}
    kept, _ = choice_of(plan_of(key, cells), problem)
    assert len(kept) == 1
    assert LAYOUTS["dense"].nbytes(problem) + LAYOUTS["slid"].nbytes(problem) > BUDGET * LAYOUTS["dense"].nbytes(problem)


def test_a_plan_is_told_in_rows_and_one_line() -> None:
    key = (4096, 4096, "6:8", "int8")
    plan = plan_of(key, {16: times(dense=10, packed=15, slid=20), 64: times(dense=30, packed=35, slid=10), 256: times(packed=1, slid=1)})
    shown = {"n": 4096, "k": 4096, "pattern": "6:8", "scheme": "int8"}
    first, second = plan_rows(plan, problem_of(key))
    slid, dense, packed = "slid:cusparselt:alg=1", "dense:triton", "packed:triton"
    assert first == shown | {
        "m": 16, "dense": dense, "dense_us": 10, "fast": slid, "fast_us": 20, "lean": packed, "lean_us": 15, "other": slid, "other_us": 20,
    }  # fmt: skip
    assert (second["m"], second["fast_us"], second["lean_us"]) == (64, 10, 35)
    nbytes = LAYOUTS["slid"].nbytes(problem_of(key)) / LAYOUTS["dense"].nbytes(problem_of(key))
    assert summary(plan, problem_of(key)) == f"keeps slid, {nbytes:.2f} of dense weights' bytes"
    assert summary(Plan(HERE), problem_of(key)) == "not measured: dense runs"


def layer() -> tuple[Weights, torch.Tensor]:
    stored, scale = quantize_weight(prune(torch.randn(24, 64), Pattern(6, 8)), SCHEMES["int8"])
    return Weights(pack(stored, Pattern(6, 8)), SCHEMES["int8"], scale), torch.randn(40, 64).bfloat16()


def test_a_runner_follows_the_plan_by_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card without cuSPARSELt, with kernels that run anywhere."""
    monkeypatch.setattr(Problem, "cuda", property(lambda problem: True))
    monkeypatch.setattr(cusparselt, "unavailable", lambda device, dtype: "not installed")
    weights, x = layer()
    exact = Runner(weights, route="dense:exact")(x)
    cells = {1: times(packed_exact=3, packed_exact64=2, dense_exact=9), 16: times(packed_exact=3, packed_exact64=9, dense_exact=9)}
    plan = plan_of(KEY, {m: found | times(slid=1, dense_elsewhere=1) for m, found in cells.items()})
    runner = Runner(weights, plan=plan)
    check_bitwise(runner(x), exact)
    # cuSPARSELt and a kernel of another library, which the plan prefers, do not run here.
    assert names(runner.routes) == [(1, "packed:exact64"), (maxsize, "packed:exact")] and runner.resident_bytes == 0
    check_bitwise(runner(x[:1]), exact[:1])
    use_plan(plan)
    try:
        found = Runner(weights, tokens=[1])
        found.prepare(x.dtype, x.device)
        lean = Runner(weights, memory="lean")
        lean.prepare(x.dtype, x.device)
    finally:
        use_plan(None)
    assert found.routes == runner.routes == lean.routes


def test_a_cpu_has_no_plan() -> None:
    weights, x = layer()
    runner = Runner(weights, plan=plan_of(KEY, {1: times(packed_exact64=1)}))
    runner(x)
    assert names(runner.routes) == [(maxsize, "dense:exact")] and ops.capability(x.device) == (0, 0)


def test_spreads_do_not_choose() -> None:
    cells = {16: {Route("dense", "triton"): at(10, 9), Route("slid", "cusparselt", "alg=1"): at(9, 8)}}
    assert kept_layouts(cells, BYTES) == ("slid",)
