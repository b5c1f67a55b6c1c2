"""Benchmarks on the CPU: nothing measured twice, failures as rows, speed-ups, the audit, and the commands."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plans import HERE, at
from slidesparse import measure, ops
from slidesparse.bench import audit, kernel, lift, rivals, rows, speedups
from slidesparse.bench.rows import FAILED, OK, PUBLISHED, REFUSED, WRONG, Row, Rows
from slidesparse.errors import UnsupportedError
from slidesparse.gemm import Cell, Kernel, Plan, Problem, Route, Weights, kernels, register
from slidesparse.gemm.kernels.base import Pipeline
from slidesparse.gemm.kernels.dense import products
from slidesparse.gemm.layouts import LAYOUTS
from slidesparse.ops.prologue import quantiser
from slidesparse.reference import scaled

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="played on the CPU")


class SlidStandIn:
    """Slid weights that are not compressed, in place of a layout for sparse tensor cores."""

    name = "slid"

    def nbytes(self, problem: Problem) -> int:
        return problem.n * problem.pattern.slid_k(problem.k)

    def prepare(self, problem: Problem, weights: Weights) -> tuple[Tensor, ...]:
        return (ops.slide(weights.packed),)


class StandIn(Kernel):
    """Multiplies lifted activations by them; ``off`` makes its outputs wrong, ``breaks`` breaks its calls."""

    name, layouts, off, breaks = "stand-in", ("slid",), 0.0, False

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        return None if problem.scheme.name == "int8" else "multiplies int8"

    def leaves(self, problem: Problem, variant: str) -> frozenset[str]:
        return frozenset()

    def bind(self, problem, layout, variant, x, *, direct) -> Pipeline:
        def multiply(q, x_scale, copy, scale, bias):
            if self.breaks:
                raise RuntimeError("CUDA error: a card fell out\nof its slot")
            return scaled(products(q, copy[0]), x_scale, scale.view(1, -1), bias, problem.dtype) + self.off

        return Pipeline(layout, quantiser(x, problem.scheme, problem.pattern, problem.pattern.slid_k(problem.k), 1, False), multiply)


def clocked(monkeypatch: pytest.MonkeyPatch, **us: float) -> None:
    """Every call is made once, and takes what is said of its layout."""

    def timed(calls, rounds):
        for one in calls.values():
            one[0]()
        return {each: at(us[getattr(each, "layout", "dense")]) for each in calls}

    monkeypatch.setattr(measure, "timed_by_clock", timed)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> StandIn:
    """A sparse kernel that runs here, and a clock by which it takes 10 µs, dense weights 15, packed ones 30."""
    clocked(monkeypatch, dense=15.0, packed=30.0, slid=10.0)
    monkeypatch.setattr(kernels, "_KERNELS", dict(kernels._KERNELS))
    monkeypatch.setattr(kernels._KERNELS["cusparselt"], "refuses", lambda *_: "runs on CUDA")
    monkeypatch.setitem(LAYOUTS, "slid", SlidStandIn())
    made = StandIn()
    register(made)
    register(replace(kernels._KERNELS["exact"], worth_timing=True))
    return made


@pytest.fixture
def run(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr(kernels, "_KERNELS", dict(kernels._KERNELS))
    return run


def measured(table: Rows, *kinds: str, tokens: tuple[int, ...] = (4,)) -> list[Row]:
    """Cells of one layer by ``PATTERN SCHEME``."""
    cells = [kernel.Work((64, 64), scheme, pattern, m) for pattern, scheme in map(str.split, kinds) for m in tokens]
    return kernel.run(cells, table, rows.here("abc"))


# ---------------------------------------------------------------------------------------------- kernel


def test_every_kernel_has_a_row_against_the_fastest_dense_one_with_its_error(stand_in: StandIn, tmp_path: Path) -> None:
    found = measured(Rows(tmp_path / "rows.csv"), "6:8 int8")
    whole = {row.route: row for row in found if row.what == "linear" and row.status == OK}
    assert {route: row.ratio for route, row in whole.items()} == {"slid:stand-in": 1.5, "dense:exact": 1.0, "packed:exact": 0.5}
    assert {row.rival for row in whole.values()} == {"dense:exact"} and {row.timer for row in whole.values()} == {"host clock"}
    assert all(row.error is not None and 0 < row.error < 0.1 for row in whole.values())
    alone = {row.route: row.us for row in found if row.what == "product"}
    assert alone == {"slid:stand-in": 10.0, "dense:exact": 15.0, "packed:exact": 30.0}
    refused = {row.route: row.why for row in found if row.status == REFUSED}
    assert refused["rowwise"] == "multiplies fp8 on CUDA", "what does not run is said"


def test_cells_that_are_there_are_not_measured_again(stand_in: StandIn, tmp_path: Path) -> None:
    table = Rows(tmp_path / "rows.csv")
    assert measured(table, "6:8 int8") and not measured(Rows(table.path), "6:8 int8")
    assert {row.m for row in measured(Rows(table.path), "6:8 int8", tokens=(4, 5))} == {5}
    other = replace(rows.here("def"), bench="kernel")
    assert not table.has(kernel.Work((64, 64), "int8", "6:8", 4).row(other)), "another commit's rows are not this one's"


class Variants(StandIn):
    """Two variants that differ in nothing."""

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        return super().refuses(problem)

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        return ("a", "b")


def test_every_variant_completes_cells_that_were_measured_without(stand_in: StandIn, tmp_path: Path) -> None:
    def rows_of(every: bool, tokens: tuple[int, ...] = (4,)) -> list[Row]:
        cells = [kernel.Work((64, 64), "int8", "6:8", m) for m in tokens]
        return kernel.run(cells, Rows(tmp_path / "rows.csv"), rows.here("abc"), every=every)

    register(Variants())
    few, more = rows_of(False), rows_of(True, (4, 5))
    whole = [row for row in rows.read(tmp_path / "rows.csv") if row.what == "linear" and row.status == OK]
    assert len(few) < len(more) and {row.m for row in more} == {4, 5}
    for m in (4, 5):
        routes = [row.route for row in whole if row.m == m]
        assert sorted(routes) == ["dense:exact", "packed:exact", "slid:stand-in:a", "slid:stand-in:b"], "once each"
    refused = [row.route for row in rows.read(tmp_path / "rows.csv") if row.status == REFUSED]
    assert "rowwise" in refused and len(set(refused)) == len(refused), "what does not run is still said, once"
    assert not rows_of(True, (4, 5)) and not rows_of(False, (4, 5))


def test_rows_stay_where_every_variant_cannot_be_measured(stand_in: StandIn, tmp_path: Path) -> None:
    def rows_of_every() -> list[Row]:
        kernel.run([kernel.Work((64, 64), "int8", "6:8", 4)], Rows(path), rows.here("abc"), every=True)
        return rows.read(path)

    path = tmp_path / "rows.csv"
    measured(Rows(path), "6:8 int8", "2:4 int8")
    good, stand_in.breaks = rows.read(path), True
    *kept, broken = rows_of_every()
    assert kept == good and broken.status == FAILED and broken.pattern == "6:8"
    stand_in.breaks = False
    other = [row for row in good if row.pattern == "2:4"]
    found = rows_of_every()
    new = found[len(other) :]
    assert found[: len(other)] == other and new and {row.pattern for row in new} == {"6:8"} and list(tmp_path.iterdir()) == [path]
    assert {row.why for row in new if row.what == "linear" and row.status == OK} == {kernel.EVERY}


def test_wrong_and_broken_kernels_are_rows_and_the_next_cell_is_measured(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.off = 5.0
    found = measured(Rows(tmp_path / "wrong.csv"), "6:8 int8")
    (wrong,) = [row for row in found if row.route == "slid:stand-in"]
    assert wrong.status == WRONG and "max error" in wrong.why and wrong.us is None
    assert any(row.status == OK for row in found)
    stand_in.off, stand_in.breaks = 0.0, True
    found = measured(Rows(tmp_path / "broken.csv"), "6:8 int8", "6:8 bf16")
    (broken,) = [row for row in found if row.status == FAILED]
    assert broken.why == "RuntimeError: CUDA error: a card fell out" and (broken.scheme, broken.pattern) == ("int8", "6:8")
    assert {row.scheme for row in found if row.status == OK} == {"bf16"}


def test_the_control_is_a_product_of_twice_the_width(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, plain = [], products
    monkeypatch.setattr(sys.modules[__name__], "products", lambda q, weight: widths.append(q.shape[1]) or plain(q, weight))
    clocked(monkeypatch, dense=15.0, packed=30.0, slid=20.0)
    found = [row for row in measured(Rows(tmp_path / "rows.csv"), "control int8") if row.status == OK]
    assert {(row.what, row.route, row.ratio) for row in found} == {("product", "slid:stand-in", 0.75), ("product", "dense:exact", 1.0)}
    assert set(widths) == {128} and {row.k for row in found} == {64}
    refused = measured(Rows(tmp_path / "bf16.csv"), "control bf16", "6:8 fp4")
    assert [row.why for row in refused] == ["no kernel on sparse tensor cores runs here", "fp4 needs compute capability 10.0"]


def test_speedups_are_of_sums_and_efficiency_is_against_two_of_four() -> None:
    base = Row("kernel", "linear", m=16, scheme="int8", n=1, k=1)
    table = [
        replace(base, n=n, pattern=pattern, route=route, us=us * n)
        for n in (1, 3)
        for pattern, sparse in (("2:4", 5.0), ("6:8", 8.0))
        for route, us in (("slid:one", sparse + 1), ("tiled:two", sparse), ("dense:a", 10.0), ("dense:b", 12.0), ("torch-cslt:x", 1.0))
    ]
    table.append(replace(base, n=1, pattern="6:8", route="slid:one", us=0.1, status=WRONG))
    found = speedups.curves(table)
    assert {curve.pattern: curve.speedups() for curve in found} == {"2:4": {16: 2.0}, "6:8": {16: 1.25}}
    assert speedups.efficiencies(found) == {("int8", "6:8"): {16: pytest.approx(1.25 / 2.0 / (0.5 / 0.75))}}
    assert not speedups.curves(table, [(1, 1), (9, 9)])[0].speedups(), "a sum needs every layer"
    assert [curve.bound for curve in found] == [2.0, pytest.approx(4 / 3)]


# ---------------------------------------------------------------------------------------------- lift, rivals, audit


def test_passes_over_activations_are_held_to_the_oracle(tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Rows(tmp_path / "lift.csv")
    found = lift.run(table, rows.here("abc"), patterns=["6:8"], tokens=[40], widths=[64])
    assert {row.what for row in found} == {"quantize", "quantize_lift", "lift", "rms_norm_quantize_lift", "silu_mul_quantize_lift"}
    assert all(row.status == OK and row.us and row.error is not None for row in found)
    assert not lift.run(Rows(table.path), rows.here("abc"), patterns=["6:8"], tokens=[40], widths=[64])
    more = lift.run(Rows(table.path), rows.here("abc"), patterns=["6:8", "2:4"], tokens=[40], widths=[64])
    assert {row.route for row in more if row.what in ("lift", "quantize_lift")} == {"2:4"}
    monkeypatch.setattr(lift, "_lift", lambda x, pattern, scheme: ops.lift(x, pattern).flip(1))
    (wrong,) = lift.run(Rows(tmp_path / "new.csv"), rows.here("abc"), schemes=["bf16"], patterns=["6:8"], tokens=[40], widths=[64])
    assert wrong.status == WRONG and "of the values are not the oracle's" in wrong.why and wrong.us is None


def test_rivals_that_are_not_here_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", dict(kernels._KERNELS))
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    found = rivals.offer(rows.here("abc"))
    assert [(row.route, row.status) for row in found] == [("dense:cutlass", REFUSED), ("torchao:torchao", REFUSED), ("humming", PUBLISHED)]
    assert "torch-cslt" in kernels.kernels() and found[-1].speedup is None, "what others report is no measurement"


def breaks(*_: object) -> None:
    raise RuntimeError("not permitted when stream is capturing")


def test_a_cell_that_a_rival_breaks_is_measured_without_rivals(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "_given_up", [])
    monkeypatch.setattr(rivals.TorchCslt, "refuses", lambda self, problem, variant="": "left out" if rivals._given_up else None)
    monkeypatch.setattr(rivals.TorchLayout, "prepare", lambda *_: (torch.empty(0),))
    monkeypatch.setattr(rivals.TorchCslt, "search", breaks)
    rivals.offer(rows.here("abc"))
    found = measured(Rows(tmp_path / "rows.csv"), "6:8 int8", "2:4 int8")
    assert {row.pattern for row in found if row.status == OK} == {"6:8", "2:4"} and not [row for row in found if row.status == FAILED]
    assert rivals._given_up == ["not permitted when stream is capturing"]
    assert [row.why for row in found if row.route == "torch-cslt"] == ["left out"]


def test_a_rivals_own_error_is_a_reason() -> None:
    def broken() -> Tensor:
        raise RuntimeError("cuSPARSELt: not supported\nsee above")

    with pytest.raises(UnsupportedError, match=r"^cuSPARSELt: not supported$"):
        rivals._tried(broken)


def plan_of(slid: float = 1.0, tokens: tuple[int, ...] = (4, 8)) -> Plan:
    plan = Plan(HERE)
    for m in tokens:
        plan.add((64, 64, "6:8", "int8"), Cell(m, {Route("slid", "stand-in"): at(slid), Route("dense", "exact"): at(9.0)}))
    return plan


def audited(tmp_path: Path, name: str, **options: object) -> list[Row]:
    plan = plan_of()
    return audit.run(plan, audit.tasks(plan, rows.here("abc"), **options), Rows(tmp_path / name))


def test_an_audit_times_what_the_plan_runs_beside_dense(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = audited(tmp_path, "a.csv")
    assert [(row.m, row.route, row.rival, row.ratio) for row in found] == [(m, "slid:stand-in", "dense:exact", 1.5) for m in (4, 8)]
    assert not audit.losing(found) and not audited(tmp_path, "a.csv"), "nor again"
    clocked(monkeypatch, dense=10.0, slid=11.0)
    slower = audited(tmp_path, "b.csv", tokens=[8])
    assert audit.losing(slower) == slower and slower[0].ratio == pytest.approx(10 / 11)
    stand_in.off = 5.0
    (wrong,) = audited(tmp_path, "c.csv", tokens=[8])
    assert wrong.status == WRONG and not audit.losing([wrong])
    assert not audited(tmp_path, "d.csv", shapes=[(1, 1)]) and not audited(tmp_path, "e.csv", schemes=["fp8"])


# ---------------------------------------------------------------------------------------------- commands


def test_bench_kernel_on_a_cpu_writes_rows_and_goes_on(run, tmp_path: Path, one_thread: None) -> None:
    words = ["bench", "kernel", "--shape", "64x64", "--tokens", "4", "--schemes", "int8,fp4", "--patterns", "6:8"]
    words += ["--out", tmp_path / "k.csv"]
    status, out, err = run(*words)
    assert status == 0 and "rows refused: fp4 needs compute capability 10.0" in out, err
    table = rows.read(tmp_path / "k.csv")
    assert {row.what for row in table} == {"roof", "linear", "product"} and next(row for row in table if row.what == "roof").us > 0
    status, out, _ = run(*words)
    assert status == 0 and f"0 new rows, {len(table)} in all" in out
    told = json.loads(run(*words, "--json")[1])
    assert [row["status"] for row in told["rows"]] == [row.status for row in table]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernel", "--model", "GPT-9"], "unknown model 'GPT-9': choose one of Llama-3.2-1B"),
        (["kernel", "--schemes", "int7"], "'int7': choose from int8, fp8"),
        (["kernel", "--patterns", "5:8"], "pattern 5:8"),
        (["lift", "--tokens", "0"], "--tokens '0': write positive numbers"),
        (["lift", "--widths", "0"], "--widths '0': write positive numbers"),
        (["audit", "--no-rivals"], "there is no plan in force here"),
    ],
)
def test_bad_requests_are_refused_in_one_line(run, words: list[str], message: str) -> None:
    status, _, err = run("bench", *words)
    assert status in (1, 2) and message in " ".join(err.split()) and "Traceback" not in err


def test_bench_audit_ends_with_3_where_the_plan_loses(run, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of(tokens=(4,)).save(tmp_path / "plan.json")
    words = ["bench", "audit", "--no-rivals", "--plan-file", tmp_path / "plan.json"]
    status, out, _ = run(*words, "--out", tmp_path / "a.csv")
    assert status == 0 and "1 cells timed; in 0 the plan's route takes over 2 % longer" in out
    clocked(monkeypatch, dense=10.0, slid=20.0)
    status, out, _ = run(*words, "--out", tmp_path / "b.csv")
    assert status == 3 and "slid:stand-in" in out and "0.50×" in out
    plan_of(slid=20.0, tokens=(4,)).save(tmp_path / "plan.json")
    status, out, _ = run(*words, "--out", tmp_path / "b.csv")
    assert status == 0 and "1 new rows, 2 in all" in out, "a plan that runs dense there is measured, and the old row does not count"
    assert "0 new rows" in run(*words, "--out", tmp_path / "b.csv")[1]
    told = json.loads(run(*words, "--out", tmp_path / "b.csv", "--json")[1])
    assert [row["route"] for row in told["rows"]] == ["dense:exact"] and not told["losing"]
    assert "0 cells timed" in run(*words, "--out", tmp_path / "b.csv", "--sparse")[1]
    plan_of(tokens=(4,)).save(tmp_path / "plan.json")
    assert run(*words, "--out", tmp_path / "b.csv")[0] == 3, "the first plan still loses"


@pytest.mark.parametrize(("minutes", "ends"), [([], 130), (["--minutes", "0"], 0)])
def test_a_run_that_is_stopped_shows_and_keeps_what_it_measured(
    run, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: list[str], ends: int
) -> None:
    cell = kernel._cell

    def stopped(work: kernel.Work, *rest: object) -> list[Row]:
        if work.m == 8 and not minutes:
            os.kill(os.getpid(), signal.SIGTERM)
        return cell(work, *rest)

    monkeypatch.setattr(kernel, "_cell", stopped)
    words = ["bench", "kernel", "--shape", "64x64", "--tokens", "4,8", "--schemes", "int8", "--patterns", "6:8", "--no-rivals"]
    status, out, err = run(*words, *minutes, "--out", tmp_path / "k.csv")
    assert status == ends and "Traceback" not in err
    told = "stopped after 0 minutes: 0 of 2" if minutes else "interrupted: 1 of 2"
    assert f"{told} were measured; run again to go on" in err
    assert re.search(r"measuring 0 of 2, \d+ s: 64×64 6:8 int8 M=4", err)
    assert ("1.50×" in out and "M = 8" not in out) if not minutes else "1 new rows" in out
    assert {row.m for row in rows.read(tmp_path / "k.csv")} == ({0, 4} if not minutes else {0})
