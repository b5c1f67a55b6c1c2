"""Saved norms of the layers' inputs: what calibrated pruning leaves, and Wanda from them without a run of the model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import models
import slidesparse
from slidesparse import cli
from slidesparse.checkpoint import NORMS, Calibration, Checkpoint, Recipe, convert, read_norms, verify
from slidesparse.checkpoint.norms import write_norms
from slidesparse.errors import CheckpointError, UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.pattern import Pattern
from slidesparse.pruning import Statistics, wanda
from slidesparse.quantization import quantize_weight
from test_convert import same

FOUR, SIX, PAIRS = Pattern.parse("2:4"), Pattern.parse("6:8"), Pattern.parse("6:8x2")
OWN = {"*.down_proj": Pattern.parse("8:10")}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return models.write(tmp_path / "source")


@pytest.fixture
def norms(dense: Path, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Norms with zeros and ties, far enough apart to change masks."""
    layers = {name: layer for name, layer in Checkpoint.open(dense).layers.items() if "proj" in name}
    return {name: (torch.randn(layer.k, generator=rng).exp() * 4).round() / 4 for name, layer in layers.items()}


@pytest.fixture
def file(tmp_path: Path, norms: dict[str, torch.Tensor]) -> Path:
    write_norms(tmp_path / NORMS, norms)
    return tmp_path / NORMS


def test_what_is_written_is_read(norms, file):
    found = read_norms(file)
    assert list(found) == list(norms) and all(same(found[layer], values) for layer, values in norms.items())
    assert not file.with_name(f"{NORMS}.part").exists()


@pytest.mark.parametrize(("pattern", "overrides"), [(FOUR, {}), (SIX, OWN), (PAIRS, {})], ids=["2:4", "overrides", "pairs"])
@pytest.mark.parametrize("scheme", [None, "int8", "fp16"])
def test_masks_are_wandas_on_these_norms(tmp_path, dense, norms, file, pattern, overrides, scheme):
    recipe = Recipe(pattern, "wanda", scheme, "dense", overrides=overrides, statistics=file)
    assert not recipe.calibrated
    report = convert(dense, tmp_path / "out", recipe)
    assert len(report.layers) == len(norms) == 14
    before, after = models.read(dense), models.read(tmp_path / "out")
    plain = models.read(convert(dense, tmp_path / "magnitude", Recipe(pattern, "magnitude", scheme, "dense", overrides=overrides)).out)
    for layer, values in norms.items():
        wanted = wanda(
            before[f"{layer}.weight"], overrides.get("*.down_proj", pattern) if "down" in layer else pattern, Statistics(None, values)
        )
        if scheme == "int8":
            wanted, scale = quantize_weight(wanted, SCHEMES["int8"])
            assert torch.equal(after[f"{layer}.weight_scale"].float().view(-1), scale.view(-1))
        assert same(after[f"{layer}.weight"], wanted.half() if scheme == "fp16" else wanted)
    assert any(not torch.equal(after[name] == 0, plain[name] == 0) for name in plain if "proj.weight" in name), "the norms decide"


def test_packed_from_norms_is_the_dense_weights_under_its_mask(tmp_path, dense, file):
    convert(dense, tmp_path / "packed", Recipe(SIX, "wanda", "int8", statistics=file))
    assert verify(tmp_path / "packed", against=dense).ok


def test_a_layer_that_the_norms_lack_is_refused_or_left_out(tmp_path, dense, norms):
    gone = "model.layers.1.mlp.up_proj"
    write_norms(tmp_path / NORMS, {layer: values for layer, values in norms.items() if layer != gone})
    with pytest.raises(UnsupportedError, match=rf"{NORMS} holds no norms of the inputs of layer {gone}: .*--ignore"):
        convert(dense, tmp_path / "out", Recipe(SIX, "wanda", statistics=tmp_path / NORMS))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.incomplete").exists()
    report = convert(dense, tmp_path / "out", Recipe(SIX, "wanda", statistics=tmp_path / NORMS, ignore=(gone,)))
    assert len(report.layers) == 13


def test_norms_of_another_model_are_refused(tmp_path, dense, norms):
    layer = "model.layers.0.mlp.down_proj"
    write_norms(tmp_path / NORMS, norms | {layer: torch.ones(99)})
    with pytest.raises(UnsupportedError, match=rf"of another model: layer {layer}: .*\[99\].*K = 100"):
        convert(dense, tmp_path / "out", Recipe(SIX, "wanda", statistics=tmp_path / NORMS))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.ones(4, dtype=np.float64), r"float64 \[4\]"),
        (np.ones((2, 4), dtype=np.float32), r"float32 \[2, 4\]"),
        (np.array([1, np.nan], dtype=np.float32), "NaN, Inf or values below 0"),
        (np.array([1, -1], dtype=np.float32), "NaN, Inf or values below 0"),
        (np.array([{}]), "holds no norms"),
    ],
)
def test_what_is_no_norms_is_refused(tmp_path, values, told):
    np.savez(tmp_path / "bad.npz", layer=values)
    with pytest.raises(CheckpointError, match=rf"bad\.npz.*{told}"):
        read_norms(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", "cut", "array"])
def test_files_that_hold_no_norms_are_named(tmp_path, file, content):
    path = tmp_path / "bad.npz"
    if content == "array":
        with path.open("wb") as stream:
            np.save(stream, np.ones(3))
    else:
        path.write_bytes(file.read_bytes()[:-40] if content == "cut" else content)
    with pytest.raises(CheckpointError, match=r"bad\.npz holds no norms of layers' inputs"):
        read_norms(path)
    with pytest.raises(CheckpointError, match=r"cannot read .*missing\.npz"):
        read_norms(tmp_path / "missing.npz")


@pytest.mark.parametrize("method", ["magnitude", "admm", "auto", None])
def test_norms_go_with_wanda_only(method, file):
    with pytest.raises(ValueError, match="wanda"):
        Recipe(SIX, method, statistics=file)


def test_other_norms_make_another_job(tmp_path, norms, file):
    recipe = Recipe(SIX, "wanda", statistics=file)
    before = recipe.to_dict()
    assert before == recipe.to_dict() != Recipe(SIX, "wanda").to_dict()
    layer = next(iter(norms))
    write_norms(file, norms | {layer: norms[layer] + 1})
    assert recipe.to_dict() != before


def test_the_command_line_takes_norms(tmp_path, dense, file, monkeypatch, capsys):
    arguments = ["prune", str(dense), str(tmp_path / "out"), "--pattern", "2:4", "--method", "wanda", "--statistics", str(file)]
    monkeypatch.setattr(sys, "argv", ["slidesparse", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    capsys.readouterr()
    expected = convert(dense, tmp_path / "expected", Recipe(FOUR, "wanda", form="dense", statistics=file)).out
    assert (expected / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------- what calibrated pruning leaves


@pytest.fixture
def calibration(tmp_path: Path, rng: torch.Generator) -> Calibration:
    np.save(tmp_path / "ids.npy", torch.randint(3, 96, (12, 24), generator=rng).numpy())
    return Calibration(str(tmp_path / "ids.npy"), samples=12, length=24)


def test_calibrated_pruning_leaves_the_norms_of_what_each_layer_was_given(tmp_path, dense, calibration):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = slidesparse.convert(dense, tmp_path / "out", Recipe(SIX, "sparsegpt", form="dense", calibration=calibration), device="cpu").out
    found = read_norms(out / NORMS)
    given: dict[str, list[torch.Tensor]] = {}

    def note(name: str):
        return lambda module, args: given.setdefault(name, []).append(args[0])

    # The first block as it was, the second one behind the pruned first.
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    pruned = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if name in found:
            module.register_forward_pre_hook(note(name))
    ids = torch.from_numpy(np.load(calibration.source))
    with torch.no_grad():
        model(ids)
        first = {name: inputs.pop() for name, inputs in given.items()}
        model.model.layers[0] = pruned.model.layers[0]
        model(ids)
    assert len(found) == 14
    for name, values in found.items():
        x = first[name] if ".0." in name else given[name].pop()
        torch.testing.assert_close(values, x.flatten(0, 1).square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)
    # They go along when the weights are packed; a new pruning brings its own.
    packed = slidesparse.convert(out, tmp_path / "packed", Recipe()).out
    assert (packed / NORMS).read_bytes() == (out / NORMS).read_bytes()
    again = slidesparse.convert(out, tmp_path / "again", Recipe(FOUR, "wanda", form="dense", calibration=calibration), device="cpu").out
    assert (again / NORMS).read_bytes() != (out / NORMS).read_bytes()


def test_wanda_from_its_own_norms_is_the_same_again(tmp_path, dense, calibration):
    pytest.importorskip("transformers", reason="transformers is not installed")
    one = slidesparse.convert(dense, tmp_path / "one", Recipe(SIX, "wanda", form="dense", calibration=calibration), device="cpu").out
    two = convert(dense, tmp_path / "two", Recipe(SIX, "wanda", form="dense", statistics=one / NORMS)).out
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
