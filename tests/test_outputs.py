"""No command ever removes or replaces what it did not make, whatever it is called and whenever it appears."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import models
from slidesparse.checkpoint import Recipe, convert, inspect, staging, verify
from slidesparse.checkpoint.norms import write_norms
from slidesparse.errors import CheckpointError, OutputExistsError, PatternError
from slidesparse.pattern import Pattern

RECIPE = Recipe(Pattern.parse("6:8"), "magnitude")


@pytest.fixture
def dense(tmp_path):
    return models.write(tmp_path / "dense")


def keep(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder / "thesis.txt"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("suffix", [".incomplete", ".replaced", ".old", ".part"])
def test_neighbours_with_telling_names_are_left_alone(tmp_path, dense, suffix, overwrite):
    thesis = keep(tmp_path / f"out{suffix}")
    if suffix == ".incomplete":
        with pytest.raises(OutputExistsError, match="no run of slidesparse made it"):
            convert(dense, tmp_path / "out", RECIPE, overwrite=overwrite)
        assert os.listdir(thesis.parent) == ["thesis.txt"]
        return
    convert(dense, tmp_path / "out", RECIPE)
    convert(dense, tmp_path / "out", Recipe(Pattern.parse("4:6"), "magnitude"), overwrite=True)
    assert thesis.exists() and {file.name for file in tmp_path.iterdir()} == {"dense", "out", f"out{suffix}"}


@pytest.mark.parametrize("suffix", [".incomplete", ".replaced"])
def test_a_source_with_such_a_name_survives(tmp_path, suffix):
    source = models.write(tmp_path / f"out{suffix}")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    if suffix == ".incomplete":
        with pytest.raises(OutputExistsError, match="overlap"):
            convert(source, tmp_path / "out", RECIPE, overwrite=True)
    else:
        convert(source, tmp_path / "out", RECIPE)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_an_output_that_appears_during_the_run_is_kept(tmp_path, dense):
    def appear(done: int, total: int, what: str) -> None:
        if not (tmp_path / "out").exists():
            keep(tmp_path / "out")

    with pytest.raises(OutputExistsError, match="appeared"):
        convert(dense, tmp_path / "out", RECIPE, progress=appear)
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert convert(dense, tmp_path / "out", RECIPE).resumed_shards == 1


def test_a_failed_rename_puts_everything_back_and_can_be_resumed(tmp_path, dense, monkeypatch):
    convert(dense, tmp_path / "out", RECIPE)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    original, calls = os.rename, []

    def failing(source: object, target: object) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", failing)
    other = Recipe(Pattern.parse("4:6"), "magnitude")
    with pytest.raises(CheckpointError, match="Input/output error"):
        convert(dense, tmp_path / "out", other, overwrite=True)
    monkeypatch.undo()
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert not (tmp_path / "out.incomplete/config.json").exists()
    assert convert(dense, tmp_path / "out", other, overwrite=True).resumed_shards == 1
    assert {file.name for file in tmp_path.iterdir()} == {"dense", "out"}


def test_a_disk_that_is_full_at_the_last_file_leaves_the_old_output(tmp_path, dense, monkeypatch):
    convert(dense, tmp_path / "out", RECIPE)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(path: Path, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "write_json", full)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"out\.incomplete is full: free space and run the same command again"):
        convert(dense, tmp_path / "out", Recipe(Pattern.parse("4:6"), "magnitude"), overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert {file.name for file in tmp_path.iterdir()} == {"dense", "out", "out.incomplete"}


def test_links_and_roots_are_refused_at_once(tmp_path, dense):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "link", Path("/")):
        with pytest.raises(OutputExistsError):
            convert(dense, out, RECIPE, overwrite=True)
    assert (tmp_path / "link").is_symlink()


def test_a_run_that_fails_early_leaves_nothing_in_the_way(tmp_path, dense):
    with pytest.raises(PatternError):
        convert(dense, tmp_path / "out", Recipe(Pattern.parse("6:8")))
    assert {file.name for file in tmp_path.iterdir()} == {"dense"}
    convert(dense, tmp_path / "out", RECIPE)


def test_side_files_that_are_links_to_nowhere_are_missed(tmp_path, dense):
    (dense / "tokenizer_config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is a link"):
        convert(dense, tmp_path / "out", RECIPE)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_models_files_that_are_links_to_nowhere_are_said_to_be(tmp_path, dense, name):
    (dense / name).unlink(missing_ok=True)
    (dense / name).symlink_to(tmp_path / "nowhere")
    for call in (lambda: convert(dense, tmp_path / "out", RECIPE), lambda: inspect(dense)):
        with pytest.raises(CheckpointError, match=rf"{name} is a link to a file that is not there: fetch the model again"):
            call()


def test_special_files_do_not_hang(tmp_path, dense):
    (dense / "model.safetensors").unlink()
    os.mkfifo(dense / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        convert(dense, tmp_path / "out", RECIPE)


def test_packed_tensors_and_config_must_tell_the_same_story(tmp_path, dense):
    convert(dense, tmp_path / "out", Recipe(Pattern.parse("6:8"), "magnitude", "int8"))
    tensors, layer = models.read(tmp_path / "out"), "model.layers.0.self_attn.q_proj"
    quantization = models.config_of(tmp_path / "out")["quantization_config"]

    def damaged(changes: dict[str, torch.Tensor], drop: str = "") -> None:
        kept = {name: tensor for name, tensor in (tensors | changes).items() if name != drop}
        models.save_file(kept, tmp_path / "out/model.safetensors", metadata={"format": "pt"})

    damaged({}, drop=f"{layer}.weight_values")
    with pytest.raises(CheckpointError, match=rf"{layer}\.weight_values is missing"):
        verify(tmp_path / "out")
    damaged({f"{layer}.weight": torch.zeros(64, 64)})
    with pytest.raises(CheckpointError, match="there twice"):
        verify(tmp_path / "out")
    damaged({f"{layer}.weight_scale": tensors[f"{layer}.weight_scale"].bfloat16()})
    with pytest.raises(CheckpointError, match="expected F32"):
        verify(tmp_path / "out")
    damaged({})
    for key, value in (("ignore", [layer]), ("overrides", {"model.layers.9": "4:6"}), ("in_features", {"model.layers.9": 3})):
        models.edit_config(tmp_path / "out", **{key: value})
        with pytest.raises(CheckpointError, match=key):
            verify(tmp_path / "out")
        models.edit_config(tmp_path / "out", **{key: quantization[key]})
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("scheme", ["bf16", "fp8"])
def test_packed_nan_is_found(tmp_path, dense, scheme):
    convert(dense, tmp_path / "out", Recipe(Pattern.parse("6:8"), "magnitude", scheme))
    name = "model.layers.1.mlp.up_proj.weight_values"
    values = models.read(tmp_path / "out")[name]
    values[7, 3] = float("nan")
    models.edit_tensors(tmp_path / "out", **{name: values})
    bad = [layer for layer in verify(tmp_path / "out").layers if not layer.ok]
    assert len(bad) == 1 and "row 7" in bad[0].reason and "nan" in bad[0].reason


@pytest.mark.parametrize(
    "change",
    [{"transform_config": {"rotation": {}}}, {"kv_cache_scheme": {"num_bits": 8}}, {"sparsity_config": {"format": "marlin-24"}}],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_change_the_meaning_are_refused_not_dropped(tmp_path, dense, change):
    convert(dense, tmp_path / "twin", Recipe(Pattern.parse("6:8"), "magnitude", "int8", "dense"))
    models.edit_config(tmp_path / "twin", **change)
    with pytest.raises(CheckpointError, match="not supported"):
        convert(tmp_path / "twin", tmp_path / "out", Recipe())


@pytest.mark.parametrize("place", ["nested", "unnamed"])
def test_transposed_weights_are_found_where_the_top_does_not_say_so(tmp_path, place):
    config = models.LLAMA | ({"model_type": "vision", "decoder": {"model_type": "gpt2"}} if place == "nested" else {"model_type": ""})
    tensors = {"h.0.attn.c_attn.weight": torch.randn(16, 48), "h.0.attn.c_attn.bias": torch.randn(48)}
    with pytest.raises(CheckpointError, match="transposed"):
        convert(models.write(tmp_path / "dense", tensors, config), tmp_path / "out", RECIPE)


def test_nothing_takes_its_name_before_the_disk_has_it(tmp_path, monkeypatch) -> None:
    """A file that is renamed first may be empty after a power cut."""
    synced, renamed, sync, replace = set(), [], os.fsync, os.replace

    def fsync(file) -> None:
        sync(file)
        state = os.fstat(file)
        synced.add((state.st_ino, state.st_size))

    def rename(source, target) -> None:
        state = os.stat(source)
        if Path(source).is_file():
            renamed.append((Path(target).name, (state.st_ino, state.st_size) in synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    convert(models.write(tmp_path / "dense"), tmp_path / "packed", Recipe(Pattern.parse("6:8"), "magnitude", "int8"))
    write_norms(tmp_path / "norms.npz", {"layer": torch.ones(3)})
    names = {name for name, _ in renamed}
    assert {"config.json", "norms.npz"} < names and any(name.endswith(".safetensors") for name in names)
    assert not [name for name, whole in renamed if not whole]
