"""Plans on disk: files come back as they were, are checked, merged and freed of what is stale; and which plan is in force."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from plans import HERE, at, plan_of, problem_of, times
from slidesparse import gemm
from slidesparse.errors import CheckpointError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan, Route, kernels, key_of, plans
from slidesparse.gemm.explain import elsewhere
from slidesparse.gemm.machine import Machine
from slidesparse.gemm.tune import LinearShape
from slidesparse.gemm.versions import kernel_versions
from slidesparse.measure import Timing
from slidesparse.pattern import Pattern

KEY = (24, 64, "6:8", "int8")
SLID = Route("slid", "cusparselt", "alg=7")
DEFAULT = Route("slid", "cusparselt", "default")


def cell(m: int, slid: float = 20.0, versions: dict[str, str] | None = None) -> Cell:
    found = times(dense=10, packed=15) | {SLID: at(slid), DEFAULT: at(slid + 1)}
    return Cell(m, found, {}, versions or {"cusparselt": "1-a", "triton": "1-b"})


def saved(path: Path, *cells: Cell, machine: Machine = HERE) -> Path:
    plan = Plan(machine)
    for one in cells:
        plan.add(KEY, one)
    plan.save(path)
    return path


@pytest.mark.parametrize("text", ["dense:triton", "slid:cusparselt:alg=2,split_k=-1,mode=1", "slid:cusparselt:default", "packed:exact64"])
def test_a_route_is_read_as_it_is_written(text: str) -> None:
    assert str(Route.parse(text)) == text and Route.parse(str(Route.parse(text))) == Route.parse(text)


@pytest.mark.parametrize("text", ["dense", "dense:", ":triton", ""])
def test_what_names_no_kernel_is_no_route(text: str) -> None:
    with pytest.raises(ValueError, match="is not a route: write layout:kernel"):
        Route.parse(text)


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.json"
    dropped = {"cusparselt": "runs on CUDA", "dense:cublaslt": "max error 3 (allowed 1)"}
    plan = plan_of(KEY, {1: times(dense=10.25, slid_2=7)})
    plan.add(KEY, Cell(16, {Route("dense", "triton"): at(10.5, 0.25)}, dropped, {"triton": "1-b"}))
    plan.add(KEY, cell(64))
    plan.add((64, 64, "2:4", "bf16"), Cell(16, {Route("dense", "native"): Timing(300, 299, 301, True)}, {}, {"native": "1-c"}))
    plan.save(path)
    assert Plan.load(path) == plan and [file.name for file in path.parent.iterdir()] == ["plan.json"]
    plan.save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["version"] == 2 and len(data["kernels"]) == 4, "cells of the same kernels share their versions"


def test_a_file_names_the_versions_of_the_kernels_that_were_tried(tmp_path: Path) -> None:
    versions = {"cusparselt": "1-a", "triton": "1-b", "native": "1-c", "sm90": "1-d"}
    tried = replace(cell(16, versions=versions), dropped={"dense:sm90:64 1x1": "wrong", "native": "not here"})
    path = saved(tmp_path / "plan.json", tried)
    assert json.loads(path.read_text())["kernels"] == [{name: versions[name] for name in ("cusparselt", "sm90", "triton")}]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.update(version=3), "plan version 3, this slidesparse reads 2: run tune again"),
        (lambda data: data.pop("machine"), "machine"),
        (lambda data: data["machine"].update(colour="red"), "colour"),
        (lambda data: data.pop("kernels"), "kernels"),
        (lambda data: data["layers"][0].update(pattern="6:9"), "6:9"),
        (lambda data: data["layers"][0].update(n=-1), "-1"),
        (lambda data: data["layers"][0].update(k=True), "True"),
        (lambda data: data["layers"][0].update(scheme="int3"), "int3"),
        (lambda data: data["layers"][0]["cells"][0].update(m=0), "0 tokens"),
        (lambda data: data["layers"][0]["cells"][0].update(kernels=1), "out of range"),
        (lambda data: data["layers"][0]["cells"][0].update(kernels=-1), "kernels -1"),
        (lambda data: data["layers"][0]["cells"][0].pop("us"), "us"),
        (lambda data: data["layers"][0]["cells"][0]["us"].update({"triton": [1, 1, 1]}), "'triton' is not a route"),
        (lambda data: data["layers"][0]["cells"][0]["us"].update({"dense:triton": [1, 2, 3]}), "dense:triton"),
        (lambda data: data["layers"][0]["cells"][0]["us"].update({"dense:triton": [float("nan")] * 3}), "nan"),
        (lambda data: data["layers"][0]["cells"][0]["us"].update({"dense:triton": [0, 0, 0]}), "dense:triton"),
        (lambda data: data["layers"][0]["cells"][0]["us"].update({"dense:triton": [1, 1]}), "unpack"),
        (lambda data: data["layers"][0]["cells"][0]["us"].update({"dense:triton": [1, 1, 1, "cold"]}), "cold"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, damage, message: str) -> None:
    path = saved(tmp_path / "plan.json", cell(16))
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000])
def test_what_is_no_json_is_no_plan(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="is not a plan"):
        Plan.load(path)


def test_cells_of_another_plan_win() -> None:
    plan, other = plan_of(KEY, {1: times(dense=1), 16: times(dense=2)}), plan_of(KEY, {16: times(dense=3), 64: times(dense=4)})
    other.add((64, 64, "2:4", "bf16"), Cell(1, times(dense_native=5)))
    assert plan.merge(other, lambda key: {"triton"}) == frozenset()
    assert {m: one[Route("dense", "triton")].p50 for m, one in plan.times(KEY).items()} == {1: 1, 16: 3, 64: 4}
    assert list(plan.times((64, 64, "2:4", "bf16"))) == [1]
    before = plan.times(KEY)
    wrong = {"dense:triton": "wrong"}
    plan.merge(Plan(HERE, {KEY: {1: Cell(1, dropped=wrong), 128: Cell(128, dropped=wrong)}}), lambda key: {"triton"})
    assert plan.times(KEY) == before and plan.cells[KEY][128].dropped, "a cell without times hides none"


def test_cells_that_have_not_met_a_kernel_take_no_part() -> None:
    lower, upper = {16: times(dense=3, slid=1), 64: times(dense=6, slid=2)}, {16: times(dense=4), 1024: times(dense=8)}
    for able, lacking in (({"triton", "cusparselt"}, {"cusparselt"}), ({"triton"}, set())):
        plan = plan_of(KEY, lower)
        assert plan.merge(plan_of(KEY, upper), lambda key, able=able: able) == lacking
        assert plan.times(KEY) == (lower if lacking else lower | upper), "a layout without a time at 1024 tokens could never be chosen"
    refused = plan_of(KEY, {16: times(dense=4)})
    refused.cells[KEY][16].dropped["cusparselt"] = "is not installed"
    plan = plan_of(KEY, lower)
    assert plan.merge(refused, lambda key: {"triton", "cusparselt"}) == frozenset() and plan.times(KEY)[16] == times(dense=4)
    plan = plan_of(KEY, {16: times(dense=3), 64: times(dense=6)})
    assert plan.merge(plan_of(KEY, {16: times(dense=4, slid=1)}), lambda key: {"triton", "cusparselt"}) == frozenset()
    assert list(plan.times(KEY)) == [16], "nor do those that lie beneath"


def test_times_of_changed_kernels_go() -> None:
    plan = Plan(HERE, {KEY: {16: cell(16)}})
    plan.cells[KEY][16].dropped |= {"slid:cusparselt:alg=9": "wrong", "dense:triton": "wrong", "cublaslt": "not here"}
    assert plan.keep({"cusparselt": "1-a", "triton": "1-b", "new": "1-z"}, algorithms=True) == frozenset() and len(plan.routes(KEY)) == 4
    assert plan.keep({"cusparselt": "1-other"}, algorithms=True) == {"cusparselt"}, "a kernel that this process has not is no other one"
    assert [str(route) for route in plan.routes(KEY)] == ["dense:triton", "packed:triton"]
    assert list(plan.times(KEY)) == [16] and list(plan.cells[KEY][16].dropped) == ["dense:triton", "cublaslt"]


def test_of_another_version_of_the_library_the_numbers_of_algorithms_go() -> None:
    plan = Plan(HERE, {KEY: {16: cell(16)}})
    assert plan.keep({}, algorithms=False) == frozenset()
    assert [str(route) for route in plan.routes(KEY)] == ["dense:triton", "packed:triton", str(DEFAULT)]


def test_times_are_told_in_rising_order_without_what_is_left_out() -> None:
    plan = plan_of(KEY, {64: times(dense=1, slid=2), 1: times(slid=3)})
    slid = Route("slid", "cusparselt", "alg=1")
    assert list(plan.times(KEY)) == [1, 64] and plan.times(KEY, without={slid}) == {64: times(dense=1)}
    assert plan.times((1, 1, "6:8", "int8")) == {} and plan.routes((1, 1, "6:8", "int8")) == []


@pytest.fixture
def gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is in force on a card, by the files ``mine`` and ``shipped`` that a function is given to write."""
    shipped = tmp_path / "shipped.json"
    monkeypatch.setenv("SLIDESPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(plans, "this_machine", lambda: HERE)
    monkeypatch.setattr(plans, "_shipped", lambda gpu: shipped)
    monkeypatch.setattr(plans, "_able", lambda key: set(kernels.kernels()))
    monkeypatch.setattr(plans, "kernel_versions", lambda: {"cusparselt": "1-a", "triton": "1-b"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: HERE.gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def gather(mine: Plan | str | None, theirs: Plan | str | None) -> plans.Active:
        for content, path in ((mine, plans.user_plan_path()), (theirs, shipped)):
            path.unlink(missing_ok=True)
            if isinstance(content, Plan):
                content.save(path)
            elif content is not None:
                path.write_text(content)
        gemm.plans.forget_plans()
        return gemm.active_plan()

    yield gather
    plans.forget_plans()


def one(machine: Machine = HERE, slid: float = 1.0, m: int = 16, versions: dict[str, str] | None = None) -> Plan:
    return Plan(machine, {KEY: {m: cell(m, slid, versions)}})


def told(active: plans.Active) -> dict[int, float]:
    return {m: found[SLID].p50 for m, found in active.plan.times(KEY).items() if SLID in found}


def test_the_users_plan_lies_over_the_shipped_one(gathered) -> None:
    assert gathered(None, None).plan is None and gathered(None, None).sources == (
        "shipped plan: none for NVIDIA H200",
        "your plan: none for NVIDIA H200",
    )
    assert told(gathered(None, one(slid=2))) == {16: 2} and told(gathered(one(), None)) == {16: 1}
    assert told(gathered(one(), one(slid=2))) == {16: 1} and told(gathered(one(m=64), one(slid=2))) == {16: 2, 64: 1}


def test_plans_of_other_software_and_cards(gathered) -> None:
    newer = replace(HERE, driver="600")
    other = gathered(one(newer), one(newer, slid=2))
    assert told(other) == {16: 2}, "shipped plans survive another driver, the user's do not"
    assert "unverified here (driver differ)" in other.sources[0] and "not used, driver is '580' here, '600' there" in other.sources[1]
    assert gathered(None, one(replace(HERE, gpu="Another"))).plan is None
    library = gathered(None, one(replace(HERE, cusparselt="0.9.0")))
    assert SLID not in library.plan.cells[KEY][16].times, "another version numbers its algorithms anew"
    assert DEFAULT in library.plan.cells[KEY][16].times


def test_times_of_a_kernel_that_has_changed_are_not_used_and_that_is_said(gathered, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = gathered(None, one(versions={"cusparselt": "1-old", "triton": "1-b"}))
    assert told(found) == {} and Route("dense", "triton") in found.plan.cells[KEY][16].times
    assert "kernel cusparselt" in found.sources[0]
    (line,) = caplog.messages
    assert "times of cusparselt are not used, their code has changed; run `slidesparse tune`" in line


def test_a_users_plan_of_an_older_kernel_leaves_the_layer_to_the_shipped_one(gathered, caplog: pytest.LogCaptureFixture) -> None:
    old = {"cusparselt": "1-old", "triton": "1-b"}
    with caplog.at_level(logging.WARNING):
        found = gathered(one(m=64, versions=old), one(slid=2))
    assert told(found) == {16: 2} and list(found.plan.times(KEY)) == [16]
    assert found.sources[1].endswith("where cusparselt took part")
    assert caplog.messages[-1].endswith("what was not timed with cusparselt is not used; run `slidesparse tune`, for vLLM with --vllm")


def test_kernels_that_cannot_run_a_layer_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "capability", lambda: (0, 0))
    able = plans._able(KEY)
    assert "exact" in able and not able & {"sm90", "native", "triton"}


def test_a_kernel_that_registers_later_decides_which_cells_compare(gathered, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = one(slid=1), one(slid=2)
    theirs.cells[KEY][16].times[Route("dense", "engine")] = at(9)
    assert told(gathered(mine, theirs)) == {16: 1}
    monkeypatch.setattr(kernels, "_KERNELS", {**kernels._KERNELS, "engine": kernels._KERNELS["exact"]})
    assert told(gemm.active_plan()) == {16: 2}, "of the user's plan nothing compares with that kernel"


def test_a_plan_of_the_first_version_is_discarded_with_one_sentence(gathered, caplog: pytest.LogCaptureFixture) -> None:
    first = {"version": 1, "date": "2026-01-01", "machine": asdict(HERE) | {"kernels": "0123"}, "layers": []}
    with caplog.at_level(logging.WARNING):
        found = gathered(json.dumps(first), one(slid=2))
    assert told(found) == {16: 2}
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
    assert caplog.messages[0].endswith("plan version 1, this slidesparse reads 2: run tune again")


def test_a_damaged_plan_of_the_users_does_not_stop_anything(gathered) -> None:
    found = gathered("broken", one(slid=2))
    assert told(found) == {16: 2} and "is not a plan" in found.sources[1]


def test_a_plan_chosen_by_the_program_holds(tmp_path: Path) -> None:
    path = saved(tmp_path / "plan.json", cell(16))
    gemm.use_plan(path)
    try:
        assert gemm.active_plan().plan == Plan.load(path) and gemm.active_plan().sources == ("chosen by the program",)
        with pytest.raises(CheckpointError):
            gemm.use_plan(tmp_path / "missing.json")
        assert gemm.active_plan().plan == Plan.load(path)
    finally:
        gemm.use_plan(None)
    assert gemm.active_plan().sources != ("chosen by the program",)


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_a_shipped_plan_is_of_its_card_and_times_every_layout_in_which_a_layer_always_runs(gpu: str) -> None:
    plan = Plan.load(plans._shipped(gpu))
    assert plan.machine.gpu == gpu and plan.cells
    for key, table in plan.cells.items():
        for m, measured in table.items():
            assert {"dense", "packed"} <= {route.layout for route in measured.times}, (key, m)
            assert measured.versions.keys() == {route.kernel for route in measured.times}, (key, m)


def test_what_another_library_timed_is_told_apart() -> None:
    plan = plan_of(KEY, {16: times(dense=1, dense_elsewhere=1, packed_elsewhere=2, slid=3)})
    assert set(map(str, elsewhere(plan, problem_of(KEY)))) == {"dense:elsewhere", "packed:elsewhere"}
    assert "elsewhere" not in kernel_versions()


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_a_layer_is_the_same_problem_wherever_its_plan_is_shown(scheme: str) -> None:
    """A plan of a card is shown, and chooses, on machines without one: bytes of dense weights are those on the card."""
    shape = LinearShape(24, 64, Pattern(6, 8), SCHEMES[scheme])
    problem = problem_of((24, 64, "6:8", scheme))
    assert key_of(shape.problem) == key_of(problem) and shape.problem.compute_dtype == problem.compute_dtype


def test_a_users_plan_is_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA X 1")
    for name in ("SLIDESPARSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in (("HOME", ".cache/slidesparse"), ("XDG_CACHE_HOME", "xdg/slidesparse"), ("SLIDESPARSE_CACHE", "own")):
        monkeypatch.setenv(name, str(tmp_path if name == "HOME" else tmp_path / folder.partition("/")[0]))
        assert plans.user_plan_path() == tmp_path / folder / "plan-nvidia-x-1.json"
