"""Plans on the command line: what `inspect --plan` and `tune` show, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import models
from plans import HERE, plan_of, times
from slidesparse.checkpoint import Recipe, convert
from slidesparse.cli import screen
from slidesparse.doctor import diagnose
from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan, tune
from slidesparse.gemm.kernels import kernels
from slidesparse.gemm.tune import LinearShape
from slidesparse.pattern import Pattern

OUT, QKV = (64, 64, "6:8", "int8"), (128, 64, "6:8", "int8")
"""The output of attention of these models, and its queries, keys and values as engines merge them."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    models.write(folder / "dense")
    convert(folder / "dense", folder / "packed", Recipe(Pattern(6, 8), "magnitude", "int8"))
    return folder / "packed"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    plan = plan_of(OUT, {16: times(dense=10, packed=15, slid=4), 64: times(dense=30, packed=35, slid=10)})
    plan.add(QKV, Cell(16, times(dense=10, packed=12, slid=20, dense_elsewhere=5)))
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def run(run: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """Runs of blanks as one."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status, out, err = run(*arguments)
        return status, " ".join(out.split()), " ".join(err.split())

    return call


def test_a_plan_is_shown_for_a_models_layers_merged_and_not(run, packed: Path, file: Path) -> None:
    status, out, _ = run("inspect", packed, "--plan-file", file)
    assert status == 0 and f"measured on {HERE.gpu}" in out and str(file) in out.replace(" ", "")
    assert "64 × 64 6:8 int8: keeps slid, " in out and "128 × 64 6:8 int8: keeps dense, 1.00 of dense weights' bytes" in out
    assert "16 dense:triton 10.0 slid:cusparselt:alg=1 4.0 2.50× slid:cusparselt:alg=1 4.0 packed:triton 15.0 0.67×" in out
    assert "16 dense:triton 10.0 dense:triton 10.0 1.00× slid:cusparselt:alg=1 20.0 packed:triton 12.0 0.83×" in out
    assert "also timed, but not to be had here without --vllm: dense:elsewhere" in out
    assert "32 × 64 6:8 int8: not measured: dense runs" in out, "as transformers run them, and as engines do"


def test_a_plan_is_told_as_json(run, packed: Path, file: Path) -> None:
    status, out, _ = run("inspect", packed, "--plan-file", file, "--json")
    found = json.loads(out)
    assert status == 0 and found["sources"] == [str(file)]
    assert [(row["n"], row["m"], row["fast"], row["fast_us"]) for row in found["layers"]] == [
        (64, 16, "slid:cusparselt:alg=1", 4.0), (64, 64, "slid:cusparselt:alg=1", 10.0), (128, 16, "dense:triton", 10.0),
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a plan in force on a GPU")
def test_without_a_card_no_plan_is_in_force_and_none_is_measured(run, packed: Path) -> None:
    status, out, _ = run("inspect", packed, "--plan")
    assert status == 0 and "nothing measured is in force here: dense runs" in out and "no CUDA device" in out
    status, _, err = run("tune", packed)
    assert status == 1 and "tune measures on a GPU, and torch finds none here" in err


def test_a_file_that_is_no_plan_is_named(run, packed: Path, file: Path) -> None:
    file.write_text(json.dumps({"version": 1}))
    status, _, err = run("inspect", packed, "--plan-file", file)
    assert status == 1 and "plan version 1, this slidesparse reads 2: run tune again" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("tune",), "nothing to measure: name a model or give --shape NxK"),
        (("tune", "--shape", "64"), "write NxK"),
        (("tune", "--shape", "64x0"), "write NxK"),
        (("tune", "--shape", "00x64"), "write NxK"),
        (("tune", "--shape", "64x64", "--tokens", "16,0"), "write positive numbers"),
        (("tune", "--shape", "64x64", "--tensor-parallel", "2"), "--tensor-parallel goes with --vllm"),
        (("tune", "64x96"), "64x96 is a layer's shape: give --shape 64x96"),
        (("inspect", ".", "--vllm"), "--vllm goes with --plan or --plan-file"),
        (("advise", "64x96", "--card", "h300"), "Invalid value for '--card': 'h300' is not one of 'h100', 'h200'"),
    ],
)
def test_usage_errors(run, arguments: tuple[str, ...], told: str) -> None:
    status, _, err = run(*arguments)
    assert status == 2 and told in err.replace("│ ", "").replace(" │", "")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllms_kernels_need_vllm(run, packed: Path, file: Path) -> None:
    status, _, err = run("inspect", packed, "--plan-file", file, "--vllm")
    assert status == 1 and "--vllm needs vLLM" in err and "pip install 'slidesparse[vllm]'" in err


def test_what_is_measured_is_shown_and_where_it_lies(run, packed: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.ops, "capability", lambda: (9, 0))

    def measured(layers: list[LinearShape], path: Path, **how: object) -> Plan:
        asked.append((layers, how["ms"], how["again"]))
        return Plan.load(path)

    monkeypatch.setattr(tune, "tune", measured)
    own = LinearShape(64, 64, Pattern(2, 4), SCHEMES["fp8"])
    options = ("--pattern", "2:4", "--scheme", "fp8", "--tokens", "64,16,64", "--again")
    status, out, _ = run("tune", packed, "--merged", "--shape", "64x64", "--out", file, *options)
    ((layers, ms, again),) = asked
    assert status == 0 and (ms, again) == ([16, 64], True) and layers[-1] == own
    assert {(one.n, one.k) for one in layers[:-1]} == {(64, 64), (32, 64), (100, 64), (64, 100), (128, 64), (200, 64)}
    assert {(str(one.pattern), one.scheme.name) for one in layers[:-1]} == {("6:8", "int8")}, "what is stored is measured as it is"
    assert "64 × 64 6:8 int8: keeps slid" in out and out.replace(" ", "").endswith(f"planwrittento{file}")


def test_the_doctor_tells_which_kernels_run() -> None:
    found = {one.what: one for one in diagnose()}
    told = {name: found[f"kernel {name}"] for name in kernels()}
    assert told["exact"].ok and told["exact64"].ok and told["native"].ok and told["native"].means == "multiplies bf16, fp16"
    if not torch.cuda.is_available():
        assert told["cusparselt"].found == "needs a GPU" and "others run" in told["cusparselt"].means
        assert "plan" not in found


def test_reports_hold_no_numbers_that_json_does_not_know() -> None:
    text = screen.json_text({"rows": [float("nan"), (1.0, float("inf"))], "out": Path("x")})
    assert json.loads(text) == {"rows": [None, [1.0, None]], "out": "x"}
