"""What calibrated pruning cannot do is said in one line, before any work; and its command line."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import models
import tiny
from slidesparse import Pattern, Recipe, checkpoint, convert
from slidesparse.checkpoint import Calibration, PruningReport, verify
from slidesparse.errors import CheckpointError, SlideSparseError, UnsupportedError, WeightError
from slidesparse.integrations import conversion
from slidesparse.integrations.pruning import streaming
from test_convert import same
from tiny import SIX

pytestmark = pytest.mark.usefixtures("tiny_models")

ROOT = Path(__file__).resolve().parent.parent
Q, FIRST = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "dense")


@pytest.fixture
def ids(tmp_path: Path) -> str:
    return tiny.token_ids(tmp_path / "ids.npy")


def refused(out: Path, source: Path, recipe: Recipe, kind: type[SlideSparseError], told: str) -> None:
    """One line, and nothing left behind."""
    with pytest.raises(kind, match=told) as error:
        convert(source, out, recipe)
    assert "\n" not in str(error.value)
    assert not out.exists() and not out.with_name(f"{out.name}.incomplete").exists()


# ---------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "auto"])
def test_weights_that_are_quantised_already(tmp_path, dense, ids, method):
    convert(dense, tmp_path / "w8a8", Recipe(SIX, "magnitude", "int8", form="dense"))
    convert(dense, tmp_path / "packed", Recipe(SIX, "magnitude"))
    for source, what in (("w8a8", "dense quantised weights with scales"), ("packed", "packed")):
        told = rf"^layer {FIRST} holds {what}: {method} needs 16- or 32-bit weights, --method magnitude does not$"
        refused(tmp_path / "out", tmp_path / source, tiny.recipe(method, ids, pattern=Pattern.parse("2:4")), UnsupportedError, told)


def test_ternary_weights(tmp_path, ids):
    source = models.write(tmp_path / "bitnet", config=models.LLAMA | {"model_type": "bitnet"})
    told = f"^layer {FIRST} holds BitNet master weights: admm needs 16- or 32-bit weights, --method magnitude does not$"
    refused(tmp_path / "out", source, tiny.recipe("admm", ids, scheme="int8"), UnsupportedError, told)


def test_experts_that_transformers_merges(tmp_path, ids):
    source = tiny.build(tmp_path / "moe", "qwen2-moe")
    expert = "model.layers.0.mlp.experts.0.gate_proj"
    assert f"{expert}.weight" in models.read(source)
    refused(tmp_path / "out", source, tiny.recipe("admm", ids, only=(expert,)), UnsupportedError, "no layer to convert")


@pytest.mark.parametrize("only", [("lm_head",), (Q, "lm_head")])
def test_layers_outside_the_blocks(tmp_path, dense, ids, only):
    told = r"^layer lm_head: no linear module of the repeated blocks \(model\.layers\) .*--ignore.*--method magnitude$"
    refused(tmp_path / "out", dense, tiny.recipe("admm", ids, only=only), UnsupportedError, told)


def test_models_that_are_no_causal_language_models(tmp_path, ids):
    t5 = transformers.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    refused(
        tmp_path / "out",
        tmp_path / "t5",
        tiny.recipe("admm", ids),
        CheckpointError,
        r"transformers cannot load it .*T5Config.*; --method magnitude does not",
    )
    bert = tiny.build(tmp_path / "bert", "bert")
    told = r"^layer cls\.predictions\.transform\.dense: no linear module of the repeated blocks \(bert\.encoder\.layer\)"
    head = ("cls.predictions.transform.dense", "*")
    refused(tmp_path / "out", bert, tiny.recipe("admm", ids, only=head), UnsupportedError, told)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"])
def test_weights_that_are_not_finite(tmp_path, dense, ids, layer, value):
    tensors = models.read(dense)
    tensors[f"{layer}.weight"][5, 7] = value
    models.edit_tensors(dense, **tensors)
    told = rf"^layer {re.escape(layer)}: value at row 5, column 7 is {value}; weights must be finite$"
    refused(tmp_path / "out", dense, tiny.recipe("auto", ids), WeightError, told)


@pytest.mark.parametrize("tensor", ["self_attn.k_proj.weight", "input_layernorm.weight"])
def test_tensors_that_are_missing(tmp_path, dense, ids, tensor):
    tensors = models.read(dense)
    tensors.pop(f"model.layers.1.{tensor}")
    models.save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    told = rf"dense: tensor model\.layers\.1\.{re.escape(tensor)} is missing$"
    refused(tmp_path / "out", dense, tiny.recipe("admm", ids), CheckpointError, told)


def test_a_model_that_gives_no_numbers(tmp_path, dense, ids):
    norm = "model.layers.1.input_layernorm.weight"
    models.edit_tensors(dense, **{norm: torch.full_like(models.read(dense)[norm], float("nan"))})
    told = r"layer model\.layers\.1\.self_attn\.q_proj: norms of the inputs hold NaN or Inf: the model does not run"
    with pytest.raises(WeightError, match=told):
        convert(dense, tmp_path / "out", tiny.recipe("admm", ids))


# ---------------------------------------------------------------------------------------------- calibration


def test_samples_that_the_model_cannot_take(tmp_path, dense):
    np.save(tmp_path / "beyond.npy", np.full((4, 24), tiny.WORDS))
    told = rf"^the file of token ids .*beyond\.npy gives 4 samples of 24 tokens.*: token {tiny.WORDS} is beyond the {tiny.WORDS} "
    refused(tmp_path / "out", dense, tiny.recipe("admm", str(tmp_path / "beyond.npy")), CheckpointError, told)
    ids = tiny.token_ids(tmp_path / "long.npy", length=80)
    told = "^samples of 65 tokens are longer than the 64 that the model takes: give a smaller --length$"
    refused(tmp_path / "out", dense, tiny.recipe("admm", ids, length=65), CheckpointError, told)
    opt = tiny.build(tmp_path / "opt", "opt")
    refused(tmp_path / "out", opt, tiny.recipe("admm", ids, length=65), CheckpointError, told)
    convert(opt, tmp_path / "out", tiny.recipe("wanda", ids, length=64))


def test_text_that_is_missing_or_too_short(tmp_path, dense):
    (tmp_path / "short.txt").write_text("w3 w4 w5")
    short = str(tmp_path / "short.txt")
    told = r"dense has no tokenizer \(tokenizer\.json, .*\): copy the one of the original model there$"
    refused(tmp_path / "out", dense, tiny.recipe("admm", short), CheckpointError, told)
    tiny.add_tokenizer(dense)
    told = r"short\.txt: 3 tokens are too few for one sample of 24: give more text, or a smaller --length$"
    refused(tmp_path / "out", dense, tiny.recipe("admm", short), CheckpointError, told)
    told = "missing.txt: no such file to calibrate on$"
    refused(tmp_path / "out", dense, tiny.recipe("admm", str(tmp_path / "missing.txt")), CheckpointError, told)


def test_recipes_that_contradict_themselves():
    for method in ("magnitude", "random", "wanda", None):
        with pytest.raises(ValueError, match=f"^reconstruction goes with the methods auto, admm and sparsegpt, not with {method}$"):
            Recipe(SIX, method, reconstruction_steps=10)
    for method, named in (("magnitude", "magnitude"), (None, "packing")):
        with pytest.raises(ValueError, match=rf"^{named} does not run the model: leave out the calibration text book\.txt$"):
            Recipe(SIX, method, calibration=Calibration("book.txt"))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        Recipe(SIX, "admm", reconstruction_steps=-1)
    with pytest.raises(ValueError, match="unknown pruning method 'best': choose one of auto, "):
        Recipe(SIX, "best")
    assert not Recipe(SIX, "magnitude", reconstruction_steps=0).calibrated


# ---------------------------------------------------------------------------------------------- what must be there


def test_without_transformers_only_auto_goes_on_and_says_so(tmp_path, dense, ids, monkeypatch, caplog):
    monkeypatch.setattr(conversion, "find_spec", lambda name: None)
    for method in ("wanda", "sparsegpt", "admm"):
        told = rf"^{method} runs the model through transformers: pip install 'slidesparse\[hf\]'$"
        refused(tmp_path / "out", dense, tiny.recipe(method, ids), UnsupportedError, told)
    assert not caplog.records
    report = convert(dense, tmp_path / "out", tiny.recipe("auto", ids))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "prunes by magnitude" not in caplog.text
    assert "pruning goes by magnitude" in caplog.text and report.pruning is None
    convert(dense, tmp_path / "magnitude", Recipe(SIX, "magnitude", form="dense"))
    out, magnitude = models.read(tmp_path / "out"), models.read(tmp_path / "magnitude")
    assert all(same(out[name], magnitude[name]) for name in magnitude) and not (tmp_path / "out/pruning_report.json").exists()


def test_the_checkpoint_room_needs_a_solver(tmp_path, dense, ids):
    with pytest.raises(UnsupportedError, match=r"^auto runs the model: call slidesparse\.convert, which brings transformers$"):
        checkpoint.convert(dense, tmp_path / "out", tiny.recipe("auto", ids))


def test_a_device_that_runs_out_of_memory_names_the_block(tmp_path, dense, ids, monkeypatch):
    step = streaming._Stream.step

    def full(self, index):
        if index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nMore.")
        return step(self, index)

    monkeypatch.setattr(streaming._Stream, "step", full)
    with pytest.raises(UnsupportedError, match=r"^the memory of cpu ran out at block 2 of 2: .* resume, or .*--length") as error:
        convert(dense, tmp_path / "out", tiny.recipe("admm", ids))
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    convert(dense, tmp_path / "out", tiny.recipe("admm", ids))


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("command", ["prune", "convert"])
def test_the_command_line_prints_its_report_and_nothing_else(run, tmp_path, dense, ids, command):
    options = ["--method", "auto", "--calibration", ids, "--samples", 4, "--length", 20, "--reconstruct", 2, "--seed", 5]
    code, out, err = run(command, dense, tmp_path / "out", *options, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["pruning"]["method"] == "admm + 2 steps of reconstruction"
    told = f"4 of the 12 samples of 20 tokens that the file of token ids {ids} gives, chosen by seed 5"
    assert report["pruning"]["calibration"] == told
    written = json.loads((tmp_path / "out/pruning_report.json").read_text())
    assert written == report["pruning"] == asdict(PruningReport(**written))
    names = [layer["name"] for layer in report["layers"]]
    assert [block["block"] for block in written["blocks"]] == [0, 1]
    assert sorted(name for block in written["blocks"] for name in block["layers"]) == sorted(names)
    assert all(0 < layer["error"] < 1 for block in written["blocks"] for layer in block["layers"].values())
    assert verify(tmp_path / "out").ok
    form = "dense" if command == "prune" else "packed"
    convert(dense, tmp_path / "api", tiny.recipe("auto", ids, samples=4, length=20, form=form, seed=5, reconstruction_steps=2))
    for name, tensor in models.read(tmp_path / "api").items():
        assert same(tensor, models.read(tmp_path / "out")[name])


def test_the_command_line_tells_how_it_went(run, tmp_path, dense, ids):
    code, out, err = run("prune", dense, tmp_path / "out", "--calibration", ids, "--length", 24, "--reconstruct", 2, "--device", "cpu")
    assert code == 0, err
    lines = out.splitlines()
    told = f"the file of token ids {ids} gives 12 samples of 24 tokens, 128 were asked for"
    assert lines[-4] == f"  pruned by admm + 2 steps of reconstruction; {told}"
    assert re.fullmatch(r"  output error of the layers: \d+\.\d\d% on average, \d+\.\d\d% at most", lines[-3])
    assert re.fullmatch(r"  output error of the blocks, on samples held out: \d+\.\d\d% before reconstruction, \d+\.\d\d% after", lines[-2])
    divergence = r"  KL divergence of the logits, on the same: \d\.\d{4} nats before the last block was fitted, \d\.\d{4} after"
    assert re.fullmatch(divergence, lines[-1])
    tiny.add_tokenizer(dense)
    (tmp_path / "text.txt").write_text("w3 w4 w5 " * 40)
    code, out, err = run("convert", dense, tmp_path / "packed", "--method", "wanda", "--calibration", tmp_path / "text.txt", "--length", 24)
    assert code == 0 and "pruned by wanda; the file" in out and "reconstruction" not in out, err


def test_exit_codes(run, tmp_path, dense, ids):
    for wrong in (["--samples", 0], ["--length", 0], ["--method", "best"], ["--reconstruct", -1], ["--samples", "many"]):
        code, out, err = run("prune", dense, tmp_path / "out", "--calibration", ids, *wrong)
        assert code == 2 and not out and wrong[0] in err, wrong
    code, out, err = run("convert", dense, tmp_path / "out", "--method", "magnitude", "--reconstruct", 5)
    assert code == 2 and not out and "reconstruction goes with" in err
    at_fault = (
        (["--calibration", tmp_path / "missing.npy"], "no such file to calibrate on"),
        (["--calibration", ids, "--length", 30], "too few for one sample of 30"),
        (["--method", "admm"], "has no tokenizer"),
    )
    for wrong, told in at_fault:
        code, out, err = run("convert", dense, tmp_path / "out", *wrong)
        assert code == 1 and not out and err.startswith("error: ") and err.strip().count("\n") == 0 and told in err, wrong
    assert {file.name for file in tmp_path.iterdir()} == {"dense", "ids.npy"}


def test_interrupting_the_command_line(run, tmp_path, dense, ids, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    gather = streaming.gather
    monkeypatch.setattr(streaming, "gather", lambda tasks, passes: interrupt() if ".1." in tasks[0].name else gather(tasks, passes))
    options = ["--method", "admm", "--calibration", ids, "--length", 24]
    code, _, err = run("prune", dense, tmp_path / "out", *options)
    assert code == 130 and "run again to go on: a conversion from its last finished shard or block" in " ".join(err.split())
    monkeypatch.undo()
    code, _, err = run("prune", dense, tmp_path / "out", *options)
    assert code == 0, err
    shutil.rmtree(tmp_path / "out")
