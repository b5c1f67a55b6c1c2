"""Engines against each other: transformers for real on a CPU, vLLM played or absent; rows, turns, resuming, failures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import models
from slidesparse import cli
from slidesparse.bench import rows, serve, vllm_engine
from slidesparse.bench.models import MODELS
from slidesparse.bench.rows import FAILED, OK, Rows
from slidesparse.bench.serve import Asked, kv_bytes, per_token

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="played on the CPU")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("serve") / "dense")


class Played:
    """In place of vLLM: dense takes 8 ms a step, packed ones 5; every engine writes down its turns."""

    turns: list[tuple[str, str, int]] = []  # noqa: RUF012

    def __init__(self, asked: dict, stem: Path) -> None:
        self.form, self.settings, self.open = asked["form"], asked["settings"], True
        assert (Path(asked["checkpoint"]) / "config.json").is_file() and asked["kv_bytes"] > 1 << 30

    def gigabytes(self) -> float:
        return {"dense": 2.0, "packed": 1.5}[self.form]

    def turn(self, phase: str, tokens: int) -> list[float]:
        if self.settings.get("breaks") and phase == "decode":
            raise RuntimeError("out of memory\nand more")
        self.turns.append((self.form, phase, tokens))
        return [0.008 if self.form == "dense" else 0.005]

    def kernels(self, phase: str, tokens: int) -> float:
        return 4000.0

    def logprobs(self) -> list[float]:
        return [-1.0, -2.0] if self.form == "dense" else [-1.5, -2.0]

    def close(self) -> None:
        self.open = False


def asked_of(dense: Path, work: Path, **changes: object) -> Asked:
    small = {"schemes": ("fp8",), "patterns": ("6:8",), "prefill": (64,), "decode": (4,)}
    return Asked(**{"engine": "vllm", "model": str(dense), "work": work} | small | changes)


def test_engines_take_turns_and_every_point_has_their_rows(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "VllmEngine", Played)
    Played.turns.clear()
    table, asked = Rows(tmp_path / "serve.csv"), asked_of(dense, tmp_path)
    found = serve.run(asked, table, rows.here("abc"))
    told = {(row.what, row.m, row.route): (row.us, row.ratio, row.gigabytes, row.error, row.kernels_us) for row in found}
    plain = "packed: as the plan has it"
    for point in (("prefill", 64), ("decode", 4)):
        assert told[*point, "vLLM"] == (8000.0, 1.0, 2.0, 0.0, 4000.0)
        assert told[*point, plain] == (5000.0, 1.6, 1.5, 0.25, 4000.0)
    order = [form for form, phase, _ in Played.turns if phase == "prefill"]
    assert order == ["dense", "packed", "packed", "dense"] * 2, "each goes first as often"
    assert not serve.run(asked, Rows(table.path), rows.here("abc")), "what is there is not measured again"
    more = serve.run(asked_of(dense, tmp_path, decode=(4, 8)), Rows(table.path), rows.here("abc"))
    assert {(row.what, row.m) for row in more} == {("decode", 8)}
    other = serve.run(asked_of(dense, tmp_path, packed={"lean": {}}, graphs=(1, 2048)), Rows(table.path), rows.here("abc"))
    assert {row.route for row in other} == {"vLLM, CUDA graphs to 2048", "packed: lean, CUDA graphs to 2048"}
    assert {row.rival for row in other} == {"vLLM, CUDA graphs to 2048"}, "dense has the same graphs"
    eager = serve.run(asked_of(dense, tmp_path, eager=True), Rows(table.path), rows.here("abc"))
    assert {row.route for row in eager} == {"vLLM, eager", "packed: as the plan has it, eager"}


def test_an_engine_that_breaks_leaves_its_points_and_a_row_that_says_why(dense: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(serve, "VllmEngine", Played)
    table = Rows(tmp_path / "serve.csv")
    found = serve.run(asked_of(dense, tmp_path, packed={"x": {"breaks": True}}), table, rows.here("abc"))
    assert found == table.rows, "what was measured before is in the answer"
    assert [(row.what, row.status) for row in table.rows] == [("prefill", OK), ("prefill", OK), ("prefill", FAILED)]
    assert table.rows[-1].why == "out of memory"


def test_progress_counts_the_points_of_all_schemes_and_patterns(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "VllmEngine", Played)
    table, seen = Rows(tmp_path / "serve.csv"), []
    serve.run(asked_of(dense, tmp_path, decode=()), table, rows.here("abc"))
    asked = asked_of(dense, tmp_path, schemes=("fp8", "int8"), patterns=("6:8", "2:4"))
    serve.run(asked, table, rows.here("abc"), lambda done, total, what: seen.append((done, total, what)))
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen) and {total for _, total, _ in seen} == {7}
    begun = {what.split(" ", 1)[1]: done for done, _, what in seen if what.endswith(("prefill 64", "decode 4"))}
    assert list(begun.values()) == list(range(7)) and begun["fp8 6:8: decode 4"] == 0 and begun["int8 2:4: decode 4"] == 6
    assert seen[-1] == (7, 7, "")


def test_each_model_has_checkpoints_of_its_own(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []

    class Watched(Played):
        def __init__(self, asked: dict, stem: Path) -> None:
            super().__init__(asked, stem)
            places.append(Path(asked["checkpoint"]))

    monkeypatch.setattr(serve, "VllmEngine", Watched)
    other = models.write(tmp_path / "other" / dense.name, models.llama_tensors(hidden=128), models.LLAMA | {"hidden_size": 128})
    for model in (dense, other):
        serve.run(asked_of(model, tmp_path / "work", decode=()), Rows(tmp_path / f"{model.parent.name}.csv"), rows.here("abc"))
    widths = [json.loads((place / "config.json").read_text())["hidden_size"] for place in places]
    assert len(set(places)) == 4 and widths == [64, 64, 128, 128], places


def test_random_weights_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(MODELS["Llama-3.2-1B"], hidden=64, inner=96, layers=1, heads=2, kv_heads=1, head_dim=32, vocabulary=32)
    monkeypatch.setitem(MODELS, "Llama-3.2-1B", small)
    monkeypatch.setattr(serve, "VllmEngine", Played)
    asked, save = asked_of(Path("Llama-3.2-1B"), tmp_path, decode=()), PreTrainedModel.save_pretrained

    def torn(model: PreTrainedModel, folder: Path, **options: object) -> None:
        save(model, folder, **options)
        (Path(folder) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", torn)
    with pytest.raises(KeyboardInterrupt):
        serve.run(asked, Rows(tmp_path / "serve.csv"), rows.here("abc"))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    found = serve.run(asked, Rows(tmp_path / "serve.csv"), rows.here("abc"))
    assert [row.status for row in found] == [OK, OK], [row.why for row in found]
    assert (tmp_path / "Llama-3.2-1B" / "source" / "model.safetensors").is_file()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_the_row_says_so(dense: Path, tmp_path: Path) -> None:
    (row,) = serve.run(asked_of(dense, tmp_path, decode=()), Rows(tmp_path / "serve.csv"), rows.here("abc"))
    assert row.status == FAILED and "the engine ended: " in row.why and "vllm" in row.why and ".log" in row.why


def test_transformers_runs_a_model_here(dense: Path, tmp_path: Path, one_thread: None, monkeypatch, capsys) -> None:
    out = tmp_path / "serve.csv"
    words = ["bench", "serve", dense, tmp_path / "work", "--engine", "transformers", "--schemes", "int8"]
    words += ["--prefill", "16", "--decode", "2"]
    monkeypatch.setattr(sys, "argv", ["slidesparse", *map(str, words), "--packed", 'lean={"memory": "lean"}', "--out", str(out)])
    monkeypatch.setattr(serve, "TURNS", 1)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    assert not stopped.value.code, shown.err
    found = rows.read(out)
    assert {(row.what, row.m, row.route) for row in found} == {
        (phase, m, route) for phase, m in (("prefill", 16), ("decode", 2)) for route in ("transformers, bf16", "packed: lean")
    }
    assert all(row.us and row.status == OK and row.card == "cpu" and row.error is None for row in found), [row.why for row in found]
    sizes = {row.route: row.gigabytes for row in found}
    assert sizes["packed: lean"] < sizes["transformers, bf16"] and "packed: lean" in shown.out


def test_the_command_fails_where_no_engine_ran(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("the engine ended: no memory")

    monkeypatch.setattr(serve, "_engines", broken)
    words = ["bench", "serve", dense, tmp_path / "work", "--engine", "transformers", "--out", tmp_path / "serve.csv"]
    for extra in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["slidesparse", *map(str, words), *extra])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 1 and "the engine ended: no memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Qwen2.5-7B", "--prefill", "1500"], "prefill 1500: prompts have 1024 tokens; write up to 1024, or multiples of it up to 32768"),
        (["Qwen2.5-7B", "--prefill", "65536"], "prefill 65536: "),
        (["Qwen2.5-7B", "--decode", "1,513"], "decode 513: a batch has 512 requests at most"),
        (["GPT-9"], "is no folder with config.json, and none of Llama-3.2-1B"),
        (["Qwen2.5-7B", "--packed", "x"], "write NAME=JSON"),
    ],
)
def test_bad_requests_are_refused_in_one_line(words: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["slidesparse", "bench", "serve", words[0], str(tmp_path), *words[1:]])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("installed", "reason"), [(None, "vllm is not installed"), (object(), "torch finds no GPU here")])
def test_what_vllm_lacks_is_said_before_anything_is_written(installed: object, reason: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        sys, "argv", ["slidesparse", "bench", "serve", "Qwen2.5-7B", str(tmp_path / "work"), "--out", str(tmp_path / "rows.csv")]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1 and reason in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.iterdir())


def test_arguments_of_vllm_follow_the_form(dense: Path, tmp_path: Path) -> None:
    asked = {"checkpoint": "x", "kv_bytes": 5, "settings": {"memory": "lean"}, "eager": False, "graphs": [1, 2], "scheme": "fp8"}
    packed, stock = (vllm_engine.words_of(asked | {"form": form}) for form in ("packed", "dense"))
    assert packed[-2:] == ["--quantization", "slidesparse"] and stock[-2:] == ["--quantization", "compressed-tensors"]
    assert json.loads(packed[packed.index("--additional-config") + 1]) == {"slidesparse": {"memory": "lean"}}
    assert packed[packed.index("--cudagraph-capture-sizes") + 1 :][:2] == ["1", "2"] and "--enforce-eager" not in packed
    assert "--quantization" not in vllm_engine.words_of(asked | {"form": "dense", "scheme": "bf16"})
    assert asked_of(dense, tmp_path, engine="transformers", prefill=(1500,)).prefill == (1500,), "one prompt of any length"
    assert kv_bytes(dense, asked_of(dense, tmp_path, prefill=(1000,), decode=())) == 2 * 2 * 2 * 2 * 16 * 1000 + (1 << 30)


def test_kernels_are_sorted_by_what_they_do() -> None:
    found = {"flash_fwd": 4.0, "nvjet_tst_128": 2.0, "cutlass_gemm": 6.0, "triton_red_fused": 8.0, "quantize_kernel": 2.0}
    assert vllm_engine.by_kind(found, 2, "int8") == {"linear": 4.0, "head": 1.0, "attention": 2.0, "other": 4.0}
    assert vllm_engine.by_kind(found, 2, "bf16") == {"linear": 5.0, "head": 0.0, "attention": 2.0, "other": 4.0}


def test_energy_is_told_only_where_every_turn_was_read() -> None:
    assert per_token([40.0, 80.0, 40.0], "vllm", "prefill", 10) == 1.0
    assert per_token([None, 80.0], "vllm", "prefill", 10) is None and per_token([8.0], "transformers", "decode", 1) is None
