"""Plans: the choice never loses to dense, files are checked, and layers follow the plan in force."""

from __future__ import annotations

import json
from dataclasses import replace
from sys import maxsize

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidesparse import gemm
from slidesparse.errors import CheckpointError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Execution, Plan, Problem, active, execution, key_of, routes
from slidesparse.gemm.handover import within_engine
from slidesparse.gemm.machine import Machine, kernels_hash
from slidesparse.gemm.tuning import BUCKETS, Layer, merged_layers, rank_layers
from slidesparse.measure import Timing
from slidesparse.pattern import Pattern
from test_gemm import layer

KEY = (24, 64, "6:8", "int8")
HERE = Machine("NVIDIA H200", "580", "13.0", "2.11.0", "3.6.0", "0.8.0", kernels_hash())


def at(us: float, spread: float = 0.0) -> Timing:
    return Timing(us, us - spread, us + spread)


def cell(m: int, dense: float = 10.0, sparse: float = 20.0, spread: float = 0.0) -> Cell:
    times = {"dense:triton": at(dense, spread), "dense:cublaslt": at(dense * 2), "restore:triton": at(dense + 5), "restore:exact": at(0.01)}
    return Cell(m, times | {"cusparselt:": at(sparse, spread), "cusparselt:alg=7": at(1e7)})


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(0, 0.3))
def test_another_backend_runs_only_where_it_beats_dense_by_more_than_the_spread(dense, sparse, spread):
    measured = cell(16, dense, sparse, spread * min(dense, sparse))
    picked = measured.pick("fast")
    assert picked in ("dense:triton", "cusparselt:")
    if picked != "dense:triton":
        assert measured.timings[picked].p80 < measured.timings["dense:triton"].p20
    else:
        assert measured.timings["cusparselt:"].p80 >= measured.timings["dense:triton"].p20
    assert measured.pick("lean") == "restore:exact"


def test_between_measured_numbers_both_neighbours_must_agree():
    plan = Plan(HERE)
    assert plan.route(KEY, 5, "fast") is None
    for one in (cell(16), cell(256, sparse=5), cell(1024, sparse=4), cell(4096)):
        plan.add(KEY, one)
    routes = {m: plan.route(KEY, m, "fast") for m in (1, 16, 17, 255, 256, 300, 1024, 1025, 4095, 4096, 90000)}
    sparse = {m for m, route in routes.items() if route == "cusparselt:"}
    assert sparse == {256, 300, 1024} and set(routes.values()) == {"dense:triton", "cusparselt:"}
    assert {plan.route(KEY, m, "lean") for m in routes} == {"restore:exact"}
    assert plan.pays_from(KEY) is None
    plan.add(KEY, cell(4096, sparse=3))
    assert plan.pays_from(KEY) == 256 and plan.route(KEY, 90000, "fast") == "cusparselt:"


def test_a_median_is_enough_next_to_a_number_that_leaves_no_doubt():
    sure, likely, dense = cell(16, sparse=5), cell(16, sparse=9.5, spread=1), cell(16, sparse=10)
    for cells, sparse in (
        ((sure, likely, sure), {1, 2, 3, 4, 5}),
        ((likely, likely, sure), {3, 4, 5}),
        ((sure, likely, dense), {1, 2, 3}),
        ((dense, likely, dense), set()),
        ((likely, dense, sure), {5}),
        ((likely,), set()),
    ):
        plan = Plan(HERE)
        for m, one in zip((1, 3, 5), cells, strict=False):
            plan.add(KEY, replace(one, m=m))
        assert {m for m in range(1, 6) if plan.route(KEY, m, "fast") == "cusparselt:"} == sparse
        assert {plan.route(KEY, m, "lean") for m in range(1, 6)} == {"restore:exact"}
    plan.add(KEY, replace(sure, m=3))
    assert plan.route(KEY, 1, "fast", {"cusparselt:"}) == "dense:triton"


def test_fewer_tokens_than_the_smallest_tile_has_rows_take_what_was_measured_there():
    plan = Plan(HERE)
    plan.add(KEY, cell(16, sparse=5))
    plan.add(KEY, cell(64, sparse=5))
    assert {plan.route(KEY, m, "fast") for m in (1, 8, 15, 16)} == {"cusparselt:"} and plan.route(KEY, 3, "lean") == "restore:exact"
    plan.add(KEY, cell(1))
    assert {plan.route(KEY, m, "fast") for m in (1, 8, 15)} == {"dense:triton"}
    plan = Plan(HERE)
    plan.add(KEY, cell(17, sparse=5))
    assert plan.route(KEY, 16, "fast") == "dense:triton" and plan.route(KEY, 17, "fast") == "cusparselt:"


def test_routes_that_cannot_run_here_make_way_for_the_next_best():
    plan, times = (
        Plan(HERE),
        {"dense:other": at(5), "dense:triton": at(10), "cusparselt:": at(8), "cusparselt:alg=7": at(7), "restore:exact": at(30)},
    )
    plan.add(KEY, Cell(16, times))
    assert plan.routes(KEY) == sorted(times) and plan.route(KEY, 16, "fast") == "dense:other"
    assert plan.route(KEY, 16, "fast", {"dense:other"}) == "cusparselt:alg=7"
    assert plan.route(KEY, 16, "fast", {"dense:other", "cusparselt:alg=7"}) == "cusparselt:"
    assert plan.route(KEY, 16, "lean", {"restore:exact"}) is None


def test_where_a_compiler_fuses_the_rest_bare_products_decide():
    plan, whole = Plan(HERE), {"dense:triton": at(10), "cusparselt:": at(11)}
    plan.add(KEY, Cell(16, whole, {}, {"dense:triton": at(8), "cusparselt:": at(7), "restore:exact": at(20)}))
    assert plan.route(KEY, 16, "fast") == "dense:triton"
    assert plan.route(KEY, 16, "fast", sums=True) == "cusparselt:" and plan.route(KEY, 16, "lean", sums=True) == "restore:exact"
    assert "restore:exact" in plan.routes(KEY)
    assert plan.cells[KEY][16].dense() == ("dense:triton", at(10)) and plan.cells[KEY][16].dense(sums=True) == ("dense:triton", at(8))
    quick = Cell(16, whole | {"dense:rowwise": at(6)}, {}, {"dense:triton": at(8), "cusparselt:": at(7)})
    assert quick.dense(sums=True) == ("dense:rowwise", at(6)), "a whole linear leaves the consumer nothing to do"
    assert quick.pick("fast", sums=True) == "dense:triton" and quick.pick("fast", {"dense:rowwise"}, sums=True) == "cusparselt:"
    assert Cell(16, {"cusparselt:": at(1)}).dense() is None
    plan.add(KEY, Cell(256, whole | {"dense:other": at(9)}))
    assert plan.compares(KEY, "dense:triton") and plan.compares(KEY, "dense:triton", sums=True)
    assert not plan.compares(KEY, "dense:other") and not plan.compares((1, 1, "6:8", "int8"), "dense:triton")
    assert list(plan.table(KEY)) == [16, 256] and list(plan.table(KEY, sums=True)) == [16]
    assert plan.route(KEY, 4096, "fast", sums=True) == "cusparselt:" and plan.pays_from(KEY, sums=True) == 16


def test_a_rival_found_wrong_was_compared():
    plan, times = Plan(HERE), {"dense:triton": at(10)}
    plan.add(KEY, Cell(16, times, {"sums of dense:other": "max error 5 (allowed 4)"}, times))
    assert plan.compares(KEY, "dense:other", sums=True) and not plan.compares(KEY, "dense:other")
    plan.add(KEY, Cell(256, times, {"dense:other": "max error 5 (allowed 4)"}))
    assert plan.compares(KEY, "dense:other", sums=True) and not plan.compares(KEY, "dense:other")


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan, path = Plan(HERE), tmp_path / "deep" / "plan.json"
    plan.add(KEY, Cell(16, {"dense:triton": at(10.5, 0.25)}, {"cusparselt:": "max error 3 (allowed 1)"}, {"dense:triton": at(9)}))
    plan.add(KEY, cell(1))
    plan.save(path)
    again = Plan.load(path)
    assert again == plan and [file.name for file in path.parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.update(version=2), "version 2"),
        (lambda data: data.pop("machine"), "machine"),
        (lambda data: data["machine"].update(colour="red"), "colour"),
        (lambda data: data["layers"][0].update(pattern="6:9"), "6:9"),
        (lambda data: data["layers"][0].update(n=-1), "-1"),
        (lambda data: data["layers"][0].update(scheme="int3"), "int3"),
        (lambda data: data["layers"][0]["cells"][0].update(m=0), "0 tokens"),
        (lambda data: data["layers"][0]["cells"][0]["us"].update({"dense:triton": [1, 2, 3]}), "dense:triton"),
        (lambda data: data["layers"][0]["cells"][0]["us"].update({"dense:triton": [float("nan")] * 3}), "nan"),
        (lambda data: data["layers"][0]["cells"][0]["us"].update({"dense:triton": [1, 1]}), "unpack"),
        (lambda data: data["layers"][0]["cells"][0].update(sums_us={"dense:triton": [1, 2, 3]}), "dense:triton"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path, damage, message):
    plan, path = Plan(HERE), tmp_path / "plan.json"
    plan.add(KEY, cell(16))
    plan.save(path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        Plan.load(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is not a plan"):
        Plan.load(path)


def test_a_layer_follows_the_plan_by_number_of_tokens(monkeypatch):
    weights, _ = layer(24, 64, "int8")
    problem = Problem(24, 64, Pattern(6, 8), SCHEMES["int8"], "cpu", torch.bfloat16)
    assert key_of(problem) == KEY
    plan = Plan(HERE)
    for m, other in ((1, "reference:float64"), (16, "reference:float64"), (64, "cusparselt:quick"), (128, "restore:rowwise")):
        plan.add(KEY, Cell(m, {"dense:exact": at(10), other: at(5)}))
    monkeypatch.setattr(execution, "active_plan", lambda: active.Active(plan, ()))
    run = Execution(weights)
    steps = run.planned_steps(replace(problem, device="cuda"))
    monkeypatch.undo()
    chosen = [(most, str(choice)) for most, choice in steps]
    # Routes that cannot run here, or that neighbours do not share, give way to dense.
    assert chosen[0] == (16, "reference:float64") and all(name.startswith("dense:") for _, name in chosen[1:])
    assert [str(choice) for _, choice in run.planned_steps(problem)] == ["dense:exact"], "a CPU has no plan"


@pytest.mark.parametrize(
    ("most", "backends"), [(1, "d"), (15, "d"), (16, "dr"), (17, "dr"), (64, "dr"), (65, "drd"), (99, "drd"), (128, "drd"), (999, "drd")]
)
def test_what_only_more_tokens_than_a_call_has_would_run_is_left_out(most, backends, monkeypatch):
    weights, _ = layer(24, 64, "int8")
    plan = Plan(HERE)
    for m, other in ((1, at(20)), (16, at(5)), (64, at(5)), (128, at(20))):
        plan.add(KEY, Cell(m, {"dense:exact": at(10), "reference:float64": other}))
    monkeypatch.setattr(execution, "active_plan", lambda: active.Active(plan, ()))
    steps = Execution(weights, most=most).planned_steps(Problem(24, 64, Pattern(6, 8), SCHEMES["int8"], "cuda", torch.bfloat16))
    assert "".join(str(choice)[0] for _, choice in steps) == backends and steps[-1][0] == maxsize


@pytest.mark.parametrize(("slow", "backends"), [(10.2, "r"), (11, "rd")])
@pytest.mark.parametrize("most", [64, 99, 128])
def test_within_an_engine_a_layer_may_need_no_dense_copy(slow, backends, most):
    weights, _ = layer(24, 64, "int8")
    plan = Plan(HERE)
    for m, other in ((1, 5), (16, 5), (64, slow), (128, slow), (256, 20)):
        plan.add(KEY, Cell(m, {"dense:exact": at(10), "reference:float64": at(other)}))
    chosen = within_engine(plan, KEY, "dense:exact", sums=False, most=most)
    problem = Problem(24, 64, Pattern(6, 8), SCHEMES["int8"], "cuda", torch.bfloat16)
    steps = Execution(weights, most=most, plan=chosen).planned_steps(problem)
    assert "".join(str(choice)[0] for _, choice in steps) == backends


def test_plans_of_other_machines_stay_unused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIDESPARSE_CACHE", str(tmp_path))
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(active, "this_machine", lambda: HERE)
    monkeypatch.setattr(active, "_shipped", lambda gpu: shipped)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: HERE.gpu)

    def gathered(mine: Machine | None, theirs: Machine | None) -> active.Active:
        for machine, path, sparse in ((mine, active.user_plan_path(), 1.0), (theirs, shipped, 2.0)):
            path.unlink(missing_ok=True)
            if machine is not None:
                plan = Plan(machine)
                plan.add(KEY, cell(16, sparse=sparse))
                plan.save(path)
        active._gather.cache_clear()
        return active._gather(0)

    assert gathered(None, None).plan is None
    assert gathered(None, HERE).plan.cells[KEY][16].timings["cusparselt:"].p50 == 2.0
    assert gathered(HERE, HERE).plan.cells[KEY][16].timings["cusparselt:"].p50 == 1.0
    other = gathered(replace(HERE, driver="600"), replace(HERE, driver="600"))
    assert other.plan.cells[KEY][16].timings["cusparselt:"].p50 == 2.0, "shipped plans survive another driver, the user's do not"
    assert any("unverified here (driver" in line for line in other.sources) and any("'580' here" in line for line in other.sources)
    library = gathered(None, replace(HERE, cusparselt="0.9.0"))
    assert "cusparselt:alg=7" not in library.plan.cells[KEY][16].timings, "another version numbers its algorithms anew"
    assert "cusparselt:alg=7" in gathered(None, HERE).plan.cells[KEY][16].timings
    assert gathered(None, replace(HERE, kernels="0")).plan is None
    user = active.user_plan_path()
    user.write_text("broken")
    active._gather.cache_clear()
    assert "is not a plan" in active._gather(0).sources[1]
    active._gather.cache_clear()


def test_a_plan_chosen_by_the_program_holds(tmp_path):
    plan, path = Plan(HERE), tmp_path / "plan.json"
    plan.add(KEY, cell(16))
    plan.save(path)
    gemm.use_plan(path)
    try:
        assert gemm.active_plan().plan == plan
    finally:
        gemm.use_plan(None)
    with pytest.raises(CheckpointError):
        gemm.use_plan(tmp_path / "missing.json")


def test_merged_layers_are_those_of_serving_engines():
    def one(n: int, scheme: str = "int8") -> Layer:
        return Layer(n, 64, Pattern(6, 8), SCHEMES[scheme])

    layers = {f"layers.{i}.attn.{name}": one(n) for i in range(2) for name, n in (("q_proj", 64), ("k_proj", 16), ("v_proj", 16))}
    layers |= {"layers.0.mlp.gate_proj": one(96), "layers.0.mlp.up_proj": one(96), "layers.1.mlp.gate_proj": one(96)}
    layers |= {"layers.1.mlp.up_proj": one(96, "fp8"), "layers.0.mlp.down_proj": one(64)}
    merged = merged_layers(layers)
    assert merged == {
        "layers.0.attn.qkv_proj": one(96), "layers.1.attn.qkv_proj": one(96), "layers.0.mlp.gate_up_proj": one(192),
        "layers.1.mlp.gate_proj": one(96), "layers.1.mlp.up_proj": one(96, "fp8"), "layers.0.mlp.down_proj": one(64),
    }  # fmt: skip
    assert rank_layers(merged, 1) == list(dict.fromkeys(merged.values()))
    assert one(8).buckets == BUCKETS and len(replace(one(8), pattern=Pattern(2, 4)).buckets) == 5


def test_ranks_hold_rows_or_columns_widened_where_a_group_is_cut():
    layer = Layer(64, 3584, Pattern(4, 6), SCHEMES["int8"])
    found = rank_layers({"a.qkv_proj": layer, "a.o_proj": layer, "b.odd_proj": replace(layer, n=63)}, 2)
    # The second rank begins at column 1792, 4 past the start of a group: 4 zeros to its left, 28 to its right make 57 · 32 columns.
    assert found == [replace(layer, n=32), replace(layer, k=1792), replace(layer, k=1824)]


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_the_shipped_plan_is_of_these_kernels(gpu):
    """Whoever changes what linears run measures again, or takes the plan away: layers then run dense."""
    plan = Plan.load(active._shipped(gpu))
    assert plan.machine.gpu == gpu and plan.machine.kernels == kernels_hash()
    for key, table in plan.cells.items():
        for m, measured in table.items():
            assert measured.best("dense") and measured.best("restore"), (key, m)


def test_what_another_library_timed_is_told_apart(monkeypatch):
    timed = set(Plan.load(active._shipped("NVIDIA H100 80GB HBM3")).routes((37888, 3584, "6:8", "int8")))
    monkeypatch.setattr(routes, "_ROUTES", {name: route for name, route in routes._ROUTES.items() if name != "cutlass"})
    assert {route for route in timed if not routes.is_known(route)} == {"dense:cutlass", "restore:cutlass"}
