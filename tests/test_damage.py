"""Damaged, contradictory and impossible input through the command line: one line that names the culprit, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import models
from slidesparse.checkpoint import Recipe, convert, tensorfile, verify
from slidesparse.checkpoint.staging import write_text
from slidesparse.errors import CheckpointError
from slidesparse.pattern import Pattern

LAYER = "model.layers.1.self_attn.q_proj"
CONVERT = ("convert", "--method", "magnitude")
"""These models have random tensors and no tokenizer: nothing to calibrate with."""


@pytest.fixture
def dense(tmp_path):
    return models.write(tmp_path / "dense")


@pytest.fixture
def packed(tmp_path, dense):
    convert(dense, tmp_path / "packed", Recipe(Pattern.parse("6:8"), "magnitude", "int8"))
    return tmp_path / "packed"


def refused(result: tuple[int, str, str], *words: str, code: int = 1) -> None:
    status, _, err = result
    assert status == code, result
    assert err.strip().startswith("error:") and err.strip().count("\n") == 0
    for word in words:
        assert word in err, (word, err)


def test_truncated_file(run, dense, tmp_path):
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(run(*CONVERT, dense, tmp_path / "out"), "model.safetensors", "truncated", "100 bytes")
    file.write_bytes(b"\x00\x01")
    refused(run("inspect", dense), "truncated or not a safetensors file")
    file.write_bytes(b"<html>not found</html>")
    refused(run("verify", dense), "truncated or not a safetensors file")


def test_an_empty_tensor_may_stand_anywhere_in_the_header(dense):
    file = dense / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"empty": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert tensorfile.read_header(file)[0].keys() == models.read(dense).keys()


def test_header_that_lies(run, dense):
    file = dense / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[f"{LAYER}.weight"]["shape"][0] += 1
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(run("inspect", dense), LAYER, "does not take")


def test_sizes_of_several_vocabularies_are_no_fault(tmp_path):
    source = models.write(tmp_path / "audio", None, models.LLAMA | {"model_type": "own", "vocab_size": [96, 1024]})
    assert convert(source, tmp_path / "out", Recipe(Pattern.parse("6:8"), "magnitude")).kept_dense == ["model.embed_tokens"]


def test_missing_shard_and_index_outside_the_folder(run, tmp_path):
    source = models.write(tmp_path / "sharded", shards=3)
    index = source / "model.safetensors.index.json"
    original = index.read_text()
    moved = tmp_path / "model-00002-of-00003.safetensors"
    shutil.move(source / moved.name, moved)
    refused(run(*CONVERT, source, tmp_path / "out"), moved.name, "missing")
    index.write_text(original.replace(moved.name, f"../{moved.name}"))
    refused(run(*CONVERT, source, tmp_path / "out"), "outside the folder", f"../{moved.name}")
    index.write_text(original.replace(moved.name, "model-00001-of-00003.safetensors"))
    refused(run(*CONVERT, source, tmp_path / "out"), "does not hold it")
    index.write_text('{"weight_map": 3}')
    refused(run(*CONVERT, source, tmp_path / "out"), "index.json")


def test_not_a_model(run, tmp_path, dense):
    refused(run("inspect", tmp_path / "nowhere"), "no such directory")
    refused(run("inspect", "nowhere"), "nowhere: no such directory, and on the hub a model's name is org/name")
    refused(run("inspect", tmp_path), "no config.json")
    refused(run("inspect", dense / "config.json"), "is a file")
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    refused(run("inspect", dense), "pytorch_model.bin", "model.safetensors")
    (dense / "config.json").write_text("{")
    refused(run("inspect", dense), "config.json")


def test_wrong_dtype_and_transposed_or_foreign_weights(run, tmp_path):
    tensors = models.llama_tensors()
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.int8)
    source = models.write(tmp_path / "a", tensors)
    for command in ([*CONVERT, source, tmp_path / "no"], ["inspect", source], ["verify", source, "--pattern", "6:8"]):
        refused(run(*command), f"{LAYER}.weight is quantised (I8)", "config.json does not say how")
    tensors[f"{LAYER}.weight_scale"] = torch.ones(64, 1)
    refused(run(*CONVERT, models.write(tmp_path / "b", tensors), tmp_path / "no"), LAYER, "config.json does not say how")
    config = models.LLAMA | {"quantization_config": {"quant_method": "gptq"}}
    refused(run(*CONVERT, models.write(tmp_path / "c", None, config), tmp_path / "no"), "gptq")
    refused(run(*CONVERT, models.write(tmp_path / "d", None, models.LLAMA | {"model_type": "gpt2"}), tmp_path / "no"), "Conv1D", "Linear")


def test_layers_that_are_not_those_of_the_class(run, tmp_path):
    pytest.importorskip("transformers")
    weight = models.llama_tensors()[f"{LAYER}.weight"]
    for i, (other, told) in enumerate(
        [
            (weight[:60].clone(), "[60, 64], the class that config.json names needs [64, 64]"),
            (torch.zeros(0, 64).bfloat16(), "[0, 64], the class that config.json names needs [64, 64]"),
            (weight.unsqueeze(-1).clone(), "should be linear weights [64, 64], but its tensor cannot be read as such"),
            (weight.int(), "should be linear weights [64, 64]"),
        ]
    ):
        source = models.write(tmp_path / str(i), models.llama_tensors() | {f"{LAYER}.weight": other})
        refused(run(*CONVERT, source, tmp_path / "no"), f"layer {LAYER}", told)
    resized = models.llama_tensors() | {"model.embed_tokens.weight": torch.ones(97, 64).bfloat16()}
    refused(run(*CONVERT, models.write(tmp_path / "resized", resized), tmp_path / "no"), "tensor model.embed_tokens.weight is [97, 64]")
    names = {f"_orig_mod.{name}": t for name, t in models.llama_tensors().items()}  # as torch.compile leaves them
    refused(run(*CONVERT, models.write(tmp_path / "named", names), tmp_path / "no"), "tensor model.embed_tokens.weight is missing")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(run, tmp_path, value):
    tensors = models.llama_tensors(hidden=512, inner=2048, layers=2)
    tensors[f"{LAYER}.weight"][511, 3] = value
    source = models.write(tmp_path / "dense", tensors)
    for arguments in (["--scheme", "int8"], ["--scheme", "bf16"], []):
        refused(run(*CONVERT, source, tmp_path / "out", *arguments), LAYER, "row 511, column 3", str(value))
    bitnet = models.write(tmp_path / "bitnet", tensors, models.LLAMA | {"model_type": "bitnet"})  # rounding would make a number of it
    refused(run(*CONVERT, bitnet, tmp_path / "out", "--scheme", "int8"), LAYER, "row 511, column 3", str(value))
    assert not (tmp_path / "out").exists()


def test_keep_bits_with_a_wrong_count(run, packed):
    keep = models.read(packed)[f"{LAYER}.weight_keep"]
    keep[9, 5] ^= 4
    models.edit_tensors(packed, **{f"{LAYER}.weight_keep": keep})
    status, out, _ = run("verify", packed)
    assert status == 3 and LAYER in out and "row 9, group 5" in " ".join(out.split())
    status, out, _ = run("inspect", packed)
    assert status == 3 and "row 9, group 5" in " ".join(out.split())


def test_moved_keep_bits_and_swapped_values_turn_verify_red(packed, dense):
    tensors = models.read(packed)
    keep = tensors[f"{LAYER}.weight_keep"].clone()
    # Still six of eight, but not the canonical six where a kept zero and a dropped one trade places; else simply other weights.
    row, column = 3, 2
    ones, zeros = ([i for i in range(8) if keep[row, column] >> i & 1 == bit] for bit in (1, 0))
    keep[row, column] ^= 1 << ones[0] | 1 << zeros[0]
    models.edit_tensors(packed, **{f"{LAYER}.weight_keep": keep})
    report = verify(packed, dense)
    assert [layer.name for layer in report.layers if not layer.ok] == [LAYER]
    models.edit_tensors(packed, **tensors | {f"{LAYER}.weight_values": tensors[f"{LAYER}.weight_values"].flip(0)})
    assert [layer.name for layer in verify(packed, dense).layers if not layer.ok] == [LAYER]
    models.edit_tensors(packed, **tensors | {"model.norm.weight": torch.zeros(64).bfloat16()})
    assert verify(packed, dense).other_tensors == ["model.norm.weight"]


def test_fill_that_is_not_canonical(packed):
    tensors = models.read(packed)
    values, keep = tensors[f"{LAYER}.weight_values"].clone(), tensors[f"{LAYER}.weight_keep"].clone()
    values[0, :6] = torch.tensor([1, 2, 3, 4, 5, 0])
    keep[0, 0] = 0b10011111  # the explicit zero belongs at position 5
    models.edit_tensors(packed, **{f"{LAYER}.weight_values": values, f"{LAYER}.weight_keep": keep})
    report = verify(packed)
    assert "canonical" in next(layer for layer in report.layers if not layer.ok).reason
    keep[0, 0] = 0b00111111
    models.edit_tensors(packed, **{f"{LAYER}.weight_values": values, f"{LAYER}.weight_keep": keep})
    assert verify(packed).ok


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_scales_that_are_not_finite_and_positive(run, packed, value):
    scale = models.read(packed)[f"{LAYER}.weight_scale"]
    scale[7] = value
    models.edit_tensors(packed, **{f"{LAYER}.weight_scale": scale})
    status, out, _ = run("verify", packed)
    assert status == 3 and LAYER in out and "row 7" in " ".join(out.split())


def test_config_that_the_tensors_contradict(run, packed):
    models.edit_config(packed, pattern="4:6")
    refused(run("verify", packed), "weight_values", "4:6", "shape")
    models.edit_config(packed, pattern="5:8")
    refused(run("verify", packed), "config.json", "5:8")
    models.edit_config(packed, pattern="6:8", weights={"dtype": "fp8"})
    refused(run("verify", packed), "config.json", "activations.dtype is 'int8'", "fp8")
    models.edit_config(packed, activations={"dtype": "fp8"})
    refused(run("verify", packed), "I8", "fp8")
    models.edit_config(packed, weights={"dtype": "int8"}, activations={"dtype": "int8"}, version=2)
    refused(run("verify", packed), "version 2", "upgrade")
    models.edit_config(packed, version=1, in_features={"model.layers.0.mlp.down_proj": 92})
    refused(run("verify", packed), "model.layers.0.mlp.down_proj", "K = 92")


def test_output_is_never_replaced_by_accident(run, dense, tmp_path):
    out = tmp_path / "out"
    assert run(*CONVERT, dense, out)[0] == 0
    before = (out / "model.safetensors").read_bytes()
    refused(run(*CONVERT, dense, out), "exists already", "--overwrite")
    assert (out / "model.safetensors").read_bytes() == before
    assert run(*CONVERT, dense, out, "--scheme", "int8", "--overwrite")[0] == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert {file.name for file in tmp_path.iterdir()} == {"dense", "out"}
    refused(run(*CONVERT, dense, dense, "--overwrite"), "overlap")
    refused(run(*CONVERT, dense, tmp_path, "--overwrite"), "overlap")
    refused(run(*CONVERT, dense, dense / "inside"), "overlap")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    refused(run(*CONVERT, dense, precious, "--overwrite"), "not a checkpoint")
    assert (precious / "thesis.txt").exists()


def test_disk_full_before_and_during(run, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    refused(run(*CONVERT, dense, tmp_path / "out"), "GB free")
    monkeypatch.undo()

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorfile.os, "pwrite", full)
    refused(run(*CONVERT, dense, tmp_path / "out"), "full", "resume")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.incomplete").glob("*.safetensors*"))
    assert run(*CONVERT, dense, tmp_path / "out")[0] == 0


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "report.json", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        for name in ("report.json", "new.json"):
            with pytest.raises(OSError, match=rf"File too large: .*{name}"):
                write_text(tmp_path / name, "new" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"report.json": "old"}


def test_output_that_cannot_be_written(run, dense, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run(*CONVERT, dense, tmp_path / "file" / "out"), "cannot write", "Not a directory")
    if os.geteuid() != 0:
        (tmp_path / "readonly").mkdir(mode=0o555)
        refused(run(*CONVERT, dense, tmp_path / "readonly" / "out"), "cannot write")


def test_interrupted_runs_leave_nothing_whole_and_resume(run, tmp_path, monkeypatch):
    source = models.write(tmp_path / "dense", shards=4)
    written = []
    original = tensorfile.TensorWriter.__init__

    def stop_at_third(self, path, *rest):
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        original(self, path, *rest)

    monkeypatch.setattr(tensorfile.TensorWriter, "__init__", stop_at_third)
    refused(run(*CONVERT, source, tmp_path / "out"), "interrupted", "run again", code=130)
    monkeypatch.setattr(tensorfile.TensorWriter, "__init__", original)
    remains = tmp_path / "out.incomplete"
    assert not (tmp_path / "out").exists() and not (remains / "config.json").exists()
    refused(run("inspect", remains), "no config.json")
    refused(run(*CONVERT, source, tmp_path / "out", "--scheme", "int8"), "different run")
    status, out, _ = run(*CONVERT, source, tmp_path / "out")
    assert status == 0 and "2 shards" in out and not remains.exists()
    convert(source, tmp_path / "straight", Recipe(Pattern.parse("6:8"), "magnitude"))
    resumed, straight = models.read(tmp_path / "out"), models.read(tmp_path / "straight")
    assert resumed.keys() == straight.keys() and all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_two_runs_do_not_write_the_same_output(run, dense, tmp_path):
    from slidesparse.checkpoint.staging import Staging

    with Staging(tmp_path / "out", dense, {}, False):
        refused(run(*CONVERT, dense, tmp_path / "out"), "another run")


def test_ctrl_c_for_real(tmp_path):
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(2048, 1024).bfloat16() for i in range(60)}
    # Of a class that transformers does not know, which asks for no further tensors.
    source = models.write(tmp_path / "dense", tensors, models.LLAMA | {"architectures": ["OwnForCausalLM"]})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "slidesparse", *CONVERT, str(source), str(out)]
    # A shell that runs the tests in the background has told its children to ignore the signal.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(), preexec_fn=listen)
    while not list(Path(f"{out}.incomplete").glob("*.part")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert not out.exists() and not list(Path(f"{out}.incomplete").glob("*.safetensors*"))


def test_ended_commands_leave_processes_that_libraries_fork_alone(run, dense, tmp_path):
    """A pool ends its workers by SIGTERM: only commands that measure turn it into an interruption, and for their own time."""
    for arguments in (("doctor",), ("advise", "64x64"), ("inspect", dense)):
        run(*arguments)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, arguments


def test_usage_errors_exit_with_two(run, dense, tmp_path):
    for arguments in (["--pattern", "5:8"], ["--pattern", "six"], ["--scheme", "int4"], ["--nonsense"]):
        refused(run(*CONVERT, dense, tmp_path / "out", *arguments), arguments[0], "(see slidesparse convert --help)", code=2)
    refused(run("convert"), "Missing argument", code=2)
    refused(run(*CONVERT, dense, tmp_path / "out", "--ignore", "re:("), "bad regular expression", code=2)
    refused(run(*CONVERT, dense, tmp_path / "out", "--device", "gpu"), "--device", "'gpu'", "cuda:N", code=2)
    refused(run("generate", dense, "word", "--device", "gpu"), "--device gpu", code=2)
    refused(run(*CONVERT, dense, tmp_path / "out", "--method", "magnitude", "--reconstruct", "3"), "reconstruction", code=2)
    status, _, err = run()
    assert status in (0, 2) and not err.startswith("error")


def test_json_output_is_json(run, dense, packed, tmp_path):
    for arguments in (["inspect", packed], ["verify", packed], ["doctor"], [*CONVERT, dense, tmp_path / "o"]):
        status, out, _ = run(*arguments, "--json")
        assert status == 0 and json.loads(out)


def test_a_dense_model_claims_nothing(run, dense):
    refused(run("verify", dense), "claims no pattern")
    status, out, _ = run("verify", dense, "--pattern", "6:8")
    assert status == 3 and "row 0, group 0" in " ".join(out.split())


def test_other_checkpoint_of_another_shape(packed, tmp_path):
    other = models.write(tmp_path / "other", models.llama_tensors(inner=104))
    assert any("[104, 64]" in layer.reason for layer in verify(packed, other).layers)
    with pytest.raises(CheckpointError, match="no such directory"):
        verify(packed, tmp_path / "nowhere")


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
