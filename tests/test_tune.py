"""What tuning keeps, drops and resumes, on the CPU: the timer is replaced, everything else is real. A GPU is timed in test_gpu.py."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from plans import HERE, at
from slidesparse.errors import CheckpointError, UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan, Problem, Route, kernels, key_of, plans, register, tune
from slidesparse.gemm.kernels.base import Pipeline
from slidesparse.gemm.kernels.cusparselt import CuSparseLt
from slidesparse.gemm.kernels.dense import DENSE_KERNELS, DenseKernel
from slidesparse.gemm.layouts import LAYOUTS
from slidesparse.gemm.tune import BUCKETS, LinearShape
from slidesparse.pattern import Pattern

EXACT = next(kernel for kernel in DENSE_KERNELS if kernel.name == "exact")
BOTH = {"dense:exact", "packed:exact"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Tuning on the CPU; returns the list of what was timed."""
    timed, draw = [], torch.randn

    def in_turn(variants, rounds, held=None):
        timed.append(tuple(map(str, variants)))
        return {name: at(10.0 + i, 1.0) for i, name in enumerate(variants)}

    monkeypatch.setenv("SLIDESPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "this_machine", lambda: HERE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: HERE.gpu)
    monkeypatch.setattr(tune.measure, "slots", lambda *_, **__: 2)
    monkeypatch.setattr(tune.measure, "timed", in_turn)
    monkeypatch.setattr(tune.torch, "randn", lambda *size, device=None, **kinds: draw(*size, **kinds))
    on_cpu = property(lambda layer: Problem(layer.n, layer.k, layer.pattern, layer.scheme, (0, 0), torch.bfloat16))
    monkeypatch.setattr(LinearShape, "problem", on_cpu)
    monkeypatch.setattr(kernels, "_KERNELS", dict(kernels._KERNELS))
    return timed


def shapes(*kinds: str) -> list[LinearShape]:
    return [LinearShape(64, 128, Pattern.parse(pattern), SCHEMES[scheme]) for pattern, scheme in (kind.split() for kind in kinds)]


def cell_of(plan: Plan, shape: LinearShape, m: int) -> Cell:
    return plan.cells[key_of(shape.problem)][m]


def names(routes) -> set[str]:
    return set(map(str, routes))


def test_every_cell_is_checked_timed_saved_and_not_measured_twice(bench, tmp_path: Path) -> None:
    path, seen = tmp_path / "plan.json", []
    wanted = shapes("6:8 int8", "2:4 bf16", "6:8 fp8")
    plan = tune.tune(wanted, path, ms=(1, 100), progress=lambda *step: seen.append(step[:2]))
    assert len(bench) == 6 and seen[-1] == (6, 6)
    for shape in wanted:
        for m in (1, 100):
            cell = cell_of(plan, shape, m)
            native = {"dense:native", "packed:native"} if shape.scheme.name == "bf16" else BOTH
            assert names(cell.times) == native and cell.dropped["cusparselt"] == "runs on CUDA"
            assert cell.versions.items() <= tune.kernel_versions().items() and {route.kernel for route in cell.times} <= set(cell.versions)
    again = Plan.load(path)
    assert {key: list(table) for key, table in again.cells.items()} == {key: list(table) for key, table in plan.cells.items()}
    assert all(again.times(key) == plan.times(key) for key in plan.cells)
    tune.tune(wanted, path, ms=(1, 100))
    assert len(bench) == 6, "what a file says is enough to know that nothing is lacking"
    tune.tune(wanted[:1], path, ms=(1,), again=True)
    assert len(bench) == 7


def test_cells_that_lack_a_kernel_that_there_is_now_are_measured_again(bench, tmp_path: Path) -> None:
    path, (shape,) = tmp_path / "plan.json", shapes("6:8 int8")
    tune.tune([shape], path, ms=(1,))
    assert len(bench) == 1
    register(dataclasses.replace(EXACT, name="other", worth_timing=True))
    plan = tune.tune([shape], path, ms=(1,))
    assert len(bench) == 2 and {"dense:other", "packed:other"} <= names(cell_of(plan, shape, 1).times)
    tune.tune([shape], path, ms=(1,))
    assert len(bench) == 2


def test_a_kernel_that_cannot_run_here_is_not_missed(bench, tmp_path: Path) -> None:
    path, (shape,) = tmp_path / "plan.json", shapes("6:8 int8")
    tune.tune([shape], path, ms=(1,))
    register(dataclasses.replace(EXACT, name="other", worth_timing=True, refusal=lambda problem: "not here"))
    tune.tune([shape], path, ms=(1,))
    assert len(bench) == 1


def test_a_kernel_that_could_not_run_then_and_can_now_is_measured(bench, tmp_path: Path) -> None:
    path, (shape,) = tmp_path / "plan.json", shapes("6:8 int8")
    register(dataclasses.replace(EXACT, name="other", worth_timing=True, refusal=lambda problem: "there is no compiler"))
    assert cell_of(tune.tune([shape], path, ms=(1,)), shape, 1).dropped["other"] == "there is no compiler"
    register(dataclasses.replace(EXACT, name="other", worth_timing=True))
    assert "dense:other" in names(cell_of(tune.tune([shape], path, ms=(1,)), shape, 1).times) and len(bench) == 2


def test_cells_of_a_kernel_that_has_changed_are_measured_again(bench, tmp_path: Path) -> None:
    path, wanted = tmp_path / "plan.json", shapes("6:8 int8", "2:4 bf16")
    tune.tune(wanted, path, ms=(1,))
    assert len(bench) == 2
    kernels._KERNELS["native"] = dataclasses.replace(kernels._KERNELS["native"], version=2)
    plan = tune.tune(wanted, path, ms=(1,))
    assert len(bench) == 3 and cell_of(plan, wanted[1], 1).versions["native"].startswith("2-")


def test_routes_without_memory_for_their_timing_are_dropped(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shape,), asked = shapes("6:8 int8"), []

    def in_turn(variants, **rest):
        asked.append(variants)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(tune.measure, "timed", in_turn)
    path = tmp_path / "plan.json"
    cell = cell_of(tune.tune([shape], path, ms=(1,)), shape, 1)
    assert not cell.times and {name for name, why in cell.dropped.items() if "memory" in why} == BOTH
    tune.tune([shape], path, ms=(1,))
    assert len(asked) == 1, "what was dropped is not measured again"


def test_a_kernel_that_finds_nothing_right_is_named_and_not_asked_again(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, (shape,) = tmp_path / "plan.json", shapes("6:8 int8")
    monkeypatch.setattr(CuSparseLt, "refuses", lambda *_: None)
    monkeypatch.setattr(CuSparseLt, "search", lambda *_: ())
    monkeypatch.setattr(LAYOUTS["slid"], "prepare", lambda problem, weights: (torch.empty(0),), raising=False)
    plan = tune.tune([shape], path, ms=(1,))
    assert cell_of(plan, shape, 1).dropped["slid:cusparselt"] == "none of its variants gave right results"
    tune.tune([shape], path, ms=(1,))
    assert len(bench) == 1


def test_cells_that_another_process_measured_meanwhile_stay(bench, tmp_path: Path) -> None:
    path, (mine, other) = tmp_path / "plan.json", shapes("6:8 int8", "2:4 int8")

    def interfere(done: int, total: int, what: str) -> None:
        if done == 1:
            meanwhile = Plan.load(path)
            meanwhile.add(key_of(other.problem), cell_of(meanwhile, mine, 1))
            meanwhile.save(path)

    plan = tune.tune([mine], path, ms=(1, 2), progress=interfere)
    for found in (plan, Plan.load(path)):
        assert {key: set(cells) for key, cells in found.cells.items()} == {key_of(mine.problem): {1, 2}, key_of(other.problem): {1}}


def test_a_cell_that_another_process_measured_again_is_not_put_back(bench, tmp_path: Path) -> None:
    path, (mine,) = tmp_path / "plan.json", shapes("6:8 int8")
    tune.tune([mine], path, ms=(1,))
    newer = {route: at(777.0) for route in cell_of(Plan.load(path), mine, 1).times}

    def interfere(done: int, total: int, what: str) -> None:
        if done == 0:
            meanwhile = Plan.load(path)
            meanwhile.add(key_of(mine.problem), dataclasses.replace(cell_of(meanwhile, mine, 1), times=newer))
            meanwhile.save(path)

    for found in (tune.tune([mine], path, ms=(1, 2), progress=interfere), Plan.load(path)):
        assert cell_of(found, mine, 1).times == newer and cell_of(found, mine, 2).times


def test_a_plan_that_became_another_machines_meanwhile_is_not_overwritten(bench, tmp_path: Path) -> None:
    path, (mine,) = tmp_path / "plan.json", shapes("6:8 int8")
    other = Plan(dataclasses.replace(HERE, driver="600"))
    with pytest.raises(ValueError, match="driver is '580' here, '600' there"):
        tune.tune([mine], path, ms=(1, 2), progress=lambda done, *_: other.save(path) if done == 1 else None)
    assert Plan.load(path).machine.driver == "600"


def stores(path: Path, shape: LinearShape, ms: range) -> None:
    """Another process that tunes, without its timings."""
    plan = Plan(HERE)
    for m in ms:
        tune._store(plan, path, key_of(shape.problem), Cell(m, {Route("dense", "exact"): at(1.0)}))


def test_processes_that_write_one_plan_lose_nothing(bench, tmp_path: Path) -> None:
    path, (mine, other) = tmp_path / "plan.json", shapes("6:8 int8", "2:4 int8")
    forked = multiprocessing.get_context("fork")
    processes = [forked.Process(target=stores, args=(path, shape, range(1, 41))) for shape in (mine, other)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert {key: set(cells) for key, cells in Plan.load(path).cells.items()} == {
        key_of(one.problem): set(range(1, 41)) for one in (mine, other)
    }
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@dataclasses.dataclass(frozen=True)
class Unlucky(DenseKernel):
    """Wrong for every other draw of activations."""

    def bind(self, problem: Problem, layout: str, variant: str, x: torch.Tensor, *, direct: bool) -> Pipeline:
        steps = super().bind(problem, layout, variant, x, direct=direct)
        DRAWS[layout] = DRAWS.get(layout, 0) + 1
        unlucky, last = DRAWS[layout] % 2, "multiply" if steps.epilogue is None else "epilogue"
        return steps._replace(**{last: lambda *arguments: getattr(steps, last)(*arguments) * (1.5 if unlucky else 1)})


DRAWS: dict[str, int] = {}


def test_one_unlucky_draw_drops_no_route(bench, tmp_path: Path) -> None:
    DRAWS.clear()
    register(
        Unlucky(
            **{field.name: getattr(EXACT, field.name) for field in dataclasses.fields(EXACT)} | {"name": "unlucky", "worth_timing": True}
        )
    )
    (shape,) = shapes("6:8 int8")
    cell = cell_of(tune.tune([shape], tmp_path / "plan.json", ms=(7,)), shape, 7)
    both = {"dense:unlucky", "packed:unlucky"}
    assert both <= names(cell.times) and not [name for name in cell.dropped if "unlucky" in name]
    assert set(DRAWS.values()) == {2}


@dataclasses.dataclass(frozen=True)
class Faulty(DenseKernel):
    """Wrong in one variant, missing memory in another."""

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        return None

    def search(self, problem: Problem, x: torch.Tensor, copy: tuple) -> tuple[str, ...]:
        return ("right", "wrong", "large", "refused", "short")

    def bind(self, problem: Problem, layout: str, variant: str, x: torch.Tensor, *, direct: bool) -> Pipeline:
        if variant == "refused":
            raise UnsupportedError("not this shape\nand more")
        steps = super().bind(problem, layout, "", x, direct=direct)

        last = "multiply" if steps.epilogue is None else "epilogue"

        def spoilt(*arguments: object) -> torch.Tensor:
            if variant == "large":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            y = getattr(steps, last)(*arguments)
            return y[:-1] if variant == "short" else y * (1.5 if variant == "wrong" else 1)

        return steps._replace(**{last: spoilt})


def test_a_wrong_or_failing_route_is_dropped_and_named(bench, tmp_path: Path) -> None:
    values = {field.name: getattr(EXACT, field.name) for field in dataclasses.fields(EXACT)}
    register(Faulty(**values | {"name": "faulty", "worth_timing": True}))
    plan = tune.tune(shapes("6:8 int8"), tmp_path / "plan.json", ms=(7,))
    (cell,) = plan.cells[64, 128, "6:8", "int8"].values()
    assert names(cell.times) == {"dense:faulty:right", "packed:faulty:right"}
    for layout in ("dense", "packed"):
        reasons = [cell.dropped[f"{layout}:faulty:{variant}"] for variant in ("wrong", "large", "refused", "short")]
        assert "max error" in reasons[0] and "out of memory" in reasons[1] and reasons[2:] == ["not this shape", "returned [6, 64]"]
    assert Plan.load(tmp_path / "plan.json").cells[64, 128, "6:8", "int8"][7].dropped == cell.dropped


@dataclasses.dataclass(frozen=True)
class Coarse(DenseKernel):
    """Has one error that only two roundings could make, or spoils the last row: by the variant."""

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        return None

    def search(self, problem: Problem, x: torch.Tensor, copy: tuple) -> tuple[str, ...]:
        return ("", "last")

    def bind(self, problem: Problem, layout: str, variant: str, x: torch.Tensor, *, direct: bool) -> Pipeline:
        steps = super().bind(problem, layout, "", x, direct=direct)

        def spoilt(sums: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor, bias: None) -> torch.Tensor:
            y, exact = steps.epilogue(sums, x_scale, scale, bias), sums.double() * scale.double().view(1, -1) * x_scale.double()
            if variant == "last":
                y[-1] *= 1.5
            else:
                largest = float(torch.cat([(y.double() - exact)[:32], (y.double() - exact)[-32:]]).abs().max())
                place = exact[0].abs().argmin()
                y[0, place] = exact[0, place] + 2.8 * largest
            return y

        return steps._replace(epilogue=spoilt)


def test_a_kernel_that_says_so_may_round_twice_and_the_last_rows_are_looked_at(bench, tmp_path: Path) -> None:
    values = {field.name: getattr(EXACT, field.name) for field in dataclasses.fields(EXACT)} | {"worth_timing": True}
    for name, rounds in (("once", 1), ("twice", 2)):
        register(Coarse(**values | {"name": name, "rounds": rounds}))
    (shape,) = shapes("6:8 int8")
    cell = cell_of(tune.tune([shape], tmp_path / "plan.json", ms=(200,)), shape, 200)
    assert names(cell.times) == {"dense:twice", "packed:twice"}
    assert all("max error" in cell.dropped[f"dense:{name}"] for name in ("once", "once:last", "twice:last"))


def test_what_is_asked_for_besides_is_timed_too(bench) -> None:
    (shape,) = shapes("6:8 int8")
    cell = tune.Bench(shape).cell(5, also=[Route("packed", "exact64")])
    assert names(cell.times) == BOTH | {"packed:exact64"}


def test_plans_of_other_machines_are_never_mixed_in_nor_lost(bench, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    path, wanted = tmp_path / "plan.json", shapes("6:8 int8")
    tune.tune(wanted, path, ms=(1,))
    tune.tune(wanted, ms=(1,))
    own = plans.user_plan_path()
    before = own.read_text()
    monkeypatch.setattr(tune, "this_machine", lambda: dataclasses.replace(HERE, driver="600"))
    with pytest.raises(ValueError, match="driver is '600' here, '580' there"):
        tune.tune(wanted, path, ms=(1,))
    assert tune.tune(wanted, ms=(1,)).machine.driver == "600"
    assert own.with_name(own.name + ".old").read_text() == before
    for number, text in enumerate(("{", json.dumps({"version": 1})), 2):
        own.write_text(text)
        caplog.clear()
        assert key_of(wanted[0].problem) in tune.tune(wanted, ms=(1,)).cells
        assert own.with_name(f"{own.name}.old{number}").read_text() == text and Plan.load(own).cells
        assert [line.endswith(f".old{number}") and "\n" not in line for line in caplog.messages if "it is now" in line] == [True]
        assert own.with_name(own.name + ".old").read_text() == before
        path.write_text(text)
        with pytest.raises(CheckpointError, match="plan"):
            tune.tune(wanted, path, ms=(1,))
        assert path.read_text() == text


def test_a_place_that_cannot_be_written_shows_before_anything_is_measured(bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        tune.tune(shapes("6:8 int8"), tmp_path / "file" / "plan.json", ms=(1,))
    assert not bench


def test_which_numbers_of_tokens_are_worth_measuring() -> None:
    (six,), (two,) = shapes("6:8 int8"), shapes("2:4 int8")
    assert six.buckets == BUCKETS and BUCKETS[0] == 1 and BUCKETS[-1] == 65536 and two.buckets == (16, 64, 256, 1024, 4096, 16384)


def test_brief_cells_are_for_advice_alone_and_take_no_place(bench, tmp_path: Path) -> None:
    path, (shape,) = tmp_path / "plan.json", shapes("6:8 int8")
    key = key_of(shape.problem)
    plan = tune.tune([shape], path, ms=(1,), brief=True)
    cell = cell_of(plan, shape, 1)
    assert cell.brief and names(cell.times) == {"dense:exact", "packed:exact"} and len(bench) == 1
    assert cell_of(Plan.load(path, brief=True), shape, 1).brief and not Plan.load(path).cells, "nothing that runs looks at them"
    tune.tune([shape], path, ms=(1,), brief=True)
    assert len(bench) == 1, "nothing is lacking for advice"
    whole = cell_of(tune.tune([shape], path, ms=(1,)), shape, 1)
    assert not whole.brief and names(whole.times) == BOTH and len(bench) == 2
    kept = tune.tune([shape], path, ms=(1, 2), brief=True)
    assert len(bench) == 3 and {m: cell.brief for m, cell in kept.cells[key].items()} == {1: False, 2: True}
    assert set(Plan.load(path).cells[key]) == {1} and set(tune.tune([shape], path, ms=(1,)).cells[key]) == {1}
    tune.tune([shape], path, ms=(1,), brief=True, again=True)
    assert not cell_of(Plan.load(path), shape, 1).brief, "a whole cell is measured as a whole one"


def test_brief_cells_do_not_replace_whole_ones_that_came_meanwhile(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, (shape,), measured = tmp_path / "plan.json", shapes("6:8 int8"), tune.Bench.cell
    whole = Cell(1, {Route("dense", "exact"): at(1.0)})

    def cell(self: tune.Bench, m: int, **options: object) -> Cell:
        tune._store(Plan(HERE), path, self.key, whole)
        return measured(self, m, **options)

    monkeypatch.setattr(tune.Bench, "cell", cell)
    for found in (tune.tune([shape], path, ms=(1,), brief=True), Plan.load(path, brief=True)):
        kept = cell_of(found, shape, 1)
        assert not kept.brief and kept.times == whole.times


def test_brief_cells_time_few_variants_and_no_restored_weights(bench, tmp_path: Path) -> None:
    values = {field.name: getattr(EXACT, field.name) for field in dataclasses.fields(EXACT)} | {"worth_timing": True}
    register(Numbered(**values | {"name": "numbered"}))
    (shape,) = shapes("6:8 int8")
    whole = cell_of(tune.tune([shape], tmp_path / "plan.json", ms=(1,), brief=True), shape, 1).times
    assert names(whole) == {"dense:numbered:0", "dense:numbered:3"}


@dataclasses.dataclass(frozen=True)
class Numbered(DenseKernel):
    """Five variants that are all the same."""

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        return None

    def search(self, problem: Problem, x: torch.Tensor, copy: tuple) -> tuple[str, ...]:
        return tuple(map(str, range(5)))
