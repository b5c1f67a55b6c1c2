"""What tuning keeps, drops and resumes, on the CPU: the timer is replaced, everything else is real. A GPU is timed in test_gpu.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slidesparse.errors import CheckpointError, UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Plan, Problem, active, key_of, register, registry, routes, tuning
from slidesparse.gemm.backends.cusparselt import CuSparseLt
from slidesparse.gemm.backends.dense import Dense
from slidesparse.gemm.machine import Machine, kernels_hash
from slidesparse.measure import Timing
from slidesparse.pattern import Pattern

HERE = Machine("A card", "580", "13.0", "2.11.0", "3.6.0", "0.8.0", kernels_hash())


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Tuning on the CPU; returns the list of what was timed."""
    timed, draw = [], torch.randn

    def interleaved(variants, rounds):
        timed.append(tuple(variants))
        return {name: Timing(10.0 + i, 9.0 + i, 11.0 + i) for i, name in enumerate(variants)}

    monkeypatch.setenv("SLIDESPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "this_machine", lambda: HERE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: HERE.gpu)
    monkeypatch.setattr(tuning.measure, "slots", lambda *_, **__: 2)
    monkeypatch.setattr(tuning.measure, "interleaved", interleaved)
    monkeypatch.setattr(tuning.torch, "randn", lambda *size, device=None, **kinds: draw(*size, **kinds))
    on_cpu = property(lambda layer: Problem(layer.n, layer.k, layer.pattern, layer.scheme, "cpu", torch.bfloat16))
    monkeypatch.setattr(tuning.Layer, "problem", on_cpu)
    monkeypatch.setattr(registry, "_BACKENDS", list(registry._BACKENDS))
    return timed


def layers(*kinds: str) -> list[tuning.Layer]:
    return [tuning.Layer(64, 128, Pattern.parse(pattern), SCHEMES[scheme]) for pattern, scheme in (kind.split() for kind in kinds)]


def test_every_cell_is_checked_timed_saved_and_not_measured_twice(bench, tmp_path):
    path, seen = tmp_path / "plan.json", []
    wanted = layers("6:8 int8", "2:4 bf16", "6:8 fp8")
    plan = tuning.tune(wanted, path, ms=(1, 100), progress=lambda *step: seen.append(step[:2]))
    assert len(bench) == 6 + 4 and seen[-1] == (6, 6)  # the bare products of 8-bit layers besides
    for layer in wanted:
        for m in (1, 100):
            cell = plan.cells[key_of(layer.problem)][m]
            assert cell.best("dense") and cell.best("restore") and cell.dropped == {"cusparselt": "runs on CUDA"}
            sums = {"dense:exact", "restore:exact"} if layer.scheme.dynamic else set()
            assert cell.sums.keys() == sums and cell.pick("fast", sums=True) == ("dense:exact" if sums else None)
    assert Plan.load(path) == plan
    tuning.tune(wanted, path, ms=(1, 100))
    assert len(bench) == 10
    tuning.tune(wanted[:1], path, ms=(1,), again=True)
    assert len(bench) == 12


def test_cells_without_a_dense_route_that_there_is_now_or_without_sums_are_measured_again(bench, tmp_path, monkeypatch):
    path, (layer,) = tmp_path / "plan.json", layers("6:8 int8")
    plan = tuning.tune([layer], path, ms=(1,))
    assert not tuning._lacks(plan, layer, 1) and tuning._lacks(plan, layer, 2)
    cell = plan.cells[key_of(layer.problem)][1]
    monkeypatch.setitem(routes._ROUTES, "other", routes.Route(lambda problem: None, routes._ROUTES["exact"].run))
    assert tuning._lacks(plan, layer, 1)
    assert "dense:other" in tuning.tune([layer], path, ms=(1,)).cells[key_of(layer.problem)][1].timings
    monkeypatch.delitem(routes._ROUTES, "other")
    cell.sums = {}
    assert tuning._lacks(plan, layer, 1)
    cell.dropped |= {"sums of dense:exact": "no memory"}
    assert not tuning._lacks(plan, layer, 1)
    del cell.dropped["cusparselt"]
    assert tuning._lacks(plan, layer, 1)


def test_sums_without_memory_are_told_from_whole_linears(bench, tmp_path, monkeypatch):
    (layer,), timed = layers("6:8 int8"), tuning.measure.interleaved

    def interleaved(variants, **rest):
        if isinstance(next(iter(variants.values()))[0](), tuple):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return timed(variants, **rest)

    monkeypatch.setattr(tuning.measure, "interleaved", interleaved)
    cell = tuning.tune([layer], tmp_path / "plan.json", ms=(1,)).cells[key_of(layer.problem)][1]
    assert cell.timings and not cell.sums
    told = {name: why for name, why in cell.dropped.items() if "memory" in why}
    assert told.keys() == {"sums of dense:exact", "sums of restore:exact"}


def test_a_backend_that_finds_nothing_right_is_named_and_not_asked_again(bench, tmp_path, monkeypatch):
    (layer,) = layers("6:8 int8")
    monkeypatch.setattr(CuSparseLt, "refuses", lambda *_: None)
    monkeypatch.setattr(CuSparseLt, "prepare", lambda *_: {})
    monkeypatch.setattr(CuSparseLt, "search", lambda *_: ())
    plan = tuning.tune([layer], tmp_path / "plan.json", ms=(1,))
    assert plan.cells[key_of(layer.problem)][1].dropped == {"cusparselt": "none of its algorithms gave right results"}
    assert not tuning._lacks(plan, layer, 1)


def test_cells_that_another_process_measured_meanwhile_stay(bench, tmp_path):
    path, (mine, other) = tmp_path / "plan.json", layers("6:8 int8", "2:4 int8")

    def interfere(done, total, what):
        if done == 1:
            meanwhile = Plan.load(path)
            meanwhile.add(key_of(other.problem), meanwhile.cells[key_of(mine.problem)][1])
            meanwhile.save(path)

    plan = tuning.tune([mine], path, ms=(1, 2), progress=interfere)
    assert plan == Plan.load(path) and {key: set(cells) for key, cells in plan.cells.items()} == {
        key_of(mine.problem): {1, 2},
        key_of(other.problem): {1},
    }


class Faulty(Dense):
    """Wrong in one variant, missing memory in another."""

    name = "faulty"

    def search(self, problem, x, resident, scale):
        return ("right", "wrong", "large", "refused")

    def run(self, problem, x, resident, scale, bias, variant):
        if variant == "large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        if variant == "refused":
            raise UnsupportedError("not this shape")
        y = super().run(problem, x, resident, scale, bias, "exact")
        return y if variant == "right" else y * 1.5


def test_a_wrong_or_failing_route_is_dropped_and_named(bench, tmp_path):
    register(Faulty())
    plan = tuning.tune(layers("6:8 int8"), tmp_path / "plan.json", ms=(7,))
    (cell,) = plan.cells[64, 128, "6:8", "int8"].values()
    assert "faulty:right" in cell.timings
    assert not {"faulty:wrong", "faulty:large", "faulty:refused"} & set(cell.timings)
    reasons = [cell.dropped[f"faulty:{variant}"] for variant in ("wrong", "large", "refused")]
    assert "max error" in reasons[0] and "out of memory" in reasons[1] and reasons[2] == "not this shape"
    assert Plan.load(tmp_path / "plan.json") == plan


def test_plans_of_other_machines_are_never_mixed_in_nor_lost(bench, tmp_path, monkeypatch):
    path, wanted = tmp_path / "plan.json", layers("6:8 int8")
    tuning.tune(wanted, path, ms=(1,))
    tuning.tune(wanted, ms=(1,))
    own = active.user_plan_path()
    before = own.read_text()
    monkeypatch.setattr(tuning, "this_machine", lambda: dataclasses.replace(HERE, driver="600"))
    with pytest.raises(ValueError, match="driver is '600' here, '580' there"):
        tuning.tune(wanted, path, ms=(1,))
    assert tuning.tune(wanted, ms=(1,)).machine.driver == "600"
    assert own.with_name(own.name + ".old").read_text() == before
    own.write_text("{")
    assert tuning.tune(wanted, ms=(1,)) == Plan.load(own)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is not a plan"):
        tuning.tune(wanted, path, ms=(1,))
    assert path.read_text() == "{"
