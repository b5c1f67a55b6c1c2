"""Everything in a source is carried over or named as left out, and what is written can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import models
import slidesparse.integrations.transformers  # noqa: F401 - registers the packed form
import tiny
from slidesparse import Recipe, convert, verify
from slidesparse.checkpoint import convert as convert_by_names
from slidesparse.errors import CheckpointError
from slidesparse.tolerance import check_bitwise

IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1]])


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "dense")


def answers_as_masked(dense: Path, folder: Path, **recipe: object):
    """Both forms load, and answer alike; the report of the packed one."""
    recipe = {"method": "magnitude", **recipe}
    convert(dense, folder / "masked", Recipe(tiny.SIX, form="dense", **recipe))
    report = convert(dense, folder / "packed", Recipe(tiny.SIX, **recipe))
    logits = [AutoModelForCausalLM.from_pretrained(folder / form)(IDS).logits.detach() for form in ("masked", "packed")]
    check_bitwise(*logits)
    assert verify(folder / "packed", folder / "masked").ok
    return report


LORA = "model.layers.0.self_attn.q_proj.lora_A.default.weight"


def test_adapters_in_the_same_file_go_along(dense: Path, tmp_path: Path) -> None:
    extra = {
        LORA: torch.randn(8, 32),
        LORA.replace("lora_A", "lora_B"): torch.randn(32, 8),
        "model.layers.0.scale_of_something": torch.ones(3),
        "temperature": torch.ones(1),
    }
    models.save_file(models.read(dense) | extra, dense / "model.safetensors", metadata={"format": "pt"})
    report = answers_as_masked(dense, tmp_path)
    assert sorted(report.unplaced) == sorted(extra) and len(report.layers) == 14
    written = models.read(tmp_path / "packed")
    for name, tensor in extra.items():
        check_bitwise(written[name], tensor)
    by_names = convert_by_names(dense, tmp_path / "names", Recipe(tiny.SIX, "magnitude"))
    assert LORA.removesuffix(".weight") in by_names.kept_dense


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_tensors_that_the_class_has_no_place_for_in_a_layer_that_is_packed(dense: Path, tmp_path: Path, scheme: str | None) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    extra = {f"{layer}.bias": torch.zeros(32), f"{layer}.scale": torch.ones(1)}
    models.save_file(models.read(dense) | extra, dense / "model.safetensors", metadata={"format": "pt"})
    report = convert(dense, tmp_path / "packed", Recipe(tiny.SIX, "magnitude", scheme=scheme))
    assert sorted(report.unplaced) == sorted(extra) and layer in [found.name for found in report.layers]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert hasattr(model.get_submodule(layer), "weight_values") and verify(tmp_path / "packed").ok


@pytest.mark.parametrize("tensor", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_no_packed_form_of_a_model_that_lacks_a_tensor(dense: Path, tmp_path: Path, tensor: str) -> None:
    tensors = models.read(dense)
    tensors.pop(tensor)
    models.save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {tensor} is missing"):
        convert(dense, tmp_path / "out", Recipe(tiny.SIX, "magnitude"))
    assert not (tmp_path / "out").exists()


def test_side_files(dense: Path, tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(2)}
    for folder in ("1_Pooling", "2_Dense", "additional_chat_templates", "onnx", "original"):
        (dense / folder).mkdir()
    (dense / "modules.json").write_text(json.dumps([{"path": "1_Pooling"}, {"path": "2_Dense"}]))
    (dense / "1_Pooling" / "config.json").write_text("{}")
    (dense / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    models.save_file(tensors, dense / "2_Dense" / "model.safetensors")
    (dense / "preprocessor_config.json").write_text(json.dumps({"speakers": {"file": "voices.pt"}}))
    for name in ("voices.pt", "optimizer.pt", "training_args.bin", "onnx/model.onnx", "original/consolidated.00.pth", "flax_model.msgpack"):
        (dense / name).write_bytes(b"weights")
    models.save_file(tensors, dense / "model-00003-of-00003.safetensors")
    models.save_file(tensors, dense / "adapter_model.safetensors")
    (dense / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "optimizer.pt"}))

    report = convert(dense, tmp_path / "packed", Recipe(tiny.SIX, "magnitude"))
    left = ["adapter_config.json", "adapter_model.safetensors", "flax_model.msgpack", "model-00003-of-00003.safetensors"]
    assert sorted(report.left_out) == sorted([*left, "onnx", "optimizer.pt", "original", "training_args.bin"])
    there = {file.name for file in (tmp_path / "packed").iterdir()}
    assert {"1_Pooling", "2_Dense", "additional_chat_templates", "voices.pt", "modules.json", "preprocessor_config.json"} <= there
    assert not there & set(report.left_out)
    assert (tmp_path / "packed" / "2_Dense" / "model.safetensors").read_bytes() == (dense / "2_Dense" / "model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_weights_in_forms_of_other_frameworks_are_left_out_and_named(dense: Path, tmp_path: Path) -> None:
    stale = {
        "rust_model.ot",
        "model.tflite",
        "model.onnx_data",
        "model.pdparams",
        "saved_model.pb",
        "model.keras",
        "model.nemo",
        "weights.npz",
    }
    stale |= {"model.ckpt-10.data-00000-of-00001", "model.ckpt-10.index", "openvino_model.xml", "openvino_model.bin", "vae.mlmodel"}
    for name in (*stale, "vocab.txt", "spiece.model", "mel_filters.npz"):
        (dense / name).write_bytes(b"?")
    report = convert(dense, tmp_path / "packed", Recipe(tiny.SIX, "magnitude"))
    assert set(report.left_out) == stale
    assert {"vocab.txt", "spiece.model", "mel_filters.npz"} <= {file.name for file in (tmp_path / "packed").iterdir()}


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    models.save_file({"a.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="but an adapter: merge it into its model first"):
        convert(tmp_path, tmp_path / "out", Recipe(tiny.SIX, "magnitude"))
