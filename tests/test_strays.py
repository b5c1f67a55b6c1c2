"""What is left of a quantisation, beside weights or in config.json: it goes along and is named, is read, or is refused with its reason."""

from __future__ import annotations

import pytest
import torch

import models
import tiny
from slidesparse import convert as convert_with_readers
from slidesparse import load
from slidesparse.checkpoint import Recipe, convert, inspect, verify
from slidesparse.errors import CheckpointError
from slidesparse.pattern import Pattern

SIX = Pattern.parse("6:8")
LAYER = "model.layers.0.mlp.down_proj"

STRAYS = {
    **dict.fromkeys(("input_scale", "output_scale", "bias_zero_point", "k_scale"), torch.ones(1)),
    "weight_zero_point": torch.zeros(52, 1, dtype=torch.int8),
    "weight_shape": torch.tensor([52, 32]),
    "weight_g_idx": torch.arange(32),
}


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_what_is_left_of_a_quantisation_beside_16_bit_weights_goes_along_and_is_named(tmp_path, scheme):
    source, layer = tiny.build(tmp_path / "source"), "model.layers.0.mlp.up_proj"
    strays = {f"{layer}.{suffix}": tensor.clone() for suffix, tensor in STRAYS.items()}
    models.edit_tensors(source, **strays)
    for form in ("packed", "dense"):
        report = convert_with_readers(source, tmp_path / form, Recipe(SIX, "magnitude", scheme, form))
        assert set(report.unplaced) == strays.keys() <= models.read(tmp_path / form).keys() and len(report.layers) == 14
        load(tmp_path / form, tokenizer=False)
    by_name = convert(source, tmp_path / "by-name", Recipe(SIX, "magnitude", scheme))
    assert set(by_name.unplaced) == strays.keys() <= set(models.config_of(tmp_path / "by-name")["quantization_config"]["ignore"])


@pytest.mark.parametrize(
    ("suffix", "told"),
    [
        ("weight_scale", "is BF16 with .*up_proj.weight_scale beside it"),
        ("weight_global_scale", "saved before it was compressed"),
        ("weight_zero_point", "up_proj has zero points other than 0"),
        ("weight_packed", r"up_proj is there twice \(.*up_proj.weight and .*up_proj.weight_packed\)"),
    ],
)
def test_16_bit_weights_beside_another_form_of_them_are_refused(tmp_path, suffix, told):
    source = models.write(tmp_path / "dense")
    models.edit_tensors(source, **{f"model.layers.0.mlp.up_proj.{suffix}": torch.ones(100, 1)})
    with pytest.raises(CheckpointError, match=told):
        convert(source, tmp_path / "out", Recipe(SIX, "magnitude", "int8"))


@pytest.mark.parametrize("suffix", ["qweight", "weight"])
def test_integers_in_place_of_weights_are_quantised_ones(tmp_path, suffix):
    """As GPTQ, AWQ and MLX store them, whose settings may lie in a file of their own."""
    tensors = models.llama_tensors()
    dtype = torch.int32 if suffix == "qweight" else torch.uint32
    tensors[f"{LAYER}.{suffix}"] = torch.zeros(8, 64, dtype=torch.int32).view(dtype)
    if suffix == "qweight":
        del tensors[f"{LAYER}.weight"]
    for use in (inspect, lambda path: convert(path, tmp_path / "out", Recipe(SIX, "magnitude", form="dense"))):
        source = models.write(tmp_path / use.__name__, tensors)
        with pytest.raises(CheckpointError, match=rf"down_proj\.{suffix} is quantised.*does not say how: start from the 16-bit"):
            use(source)


@pytest.mark.parametrize("inside", [False, True], ids=["top", "text_config"])
@pytest.mark.parametrize("kind", ["fp8", "compressed-tensors", "W4A16"])
def test_a_configuration_left_over_on_dequantised_weights_is_said_to_be(tmp_path, kind, inside):
    config = models.w8a8_config(**({"weights": {"num_bits": 4, "strategy": "group"}} if kind == "W4A16" else {}))
    told = {"quant_method": "fp8"} if kind == "fp8" else config["quantization_config"]
    part = {"quantization_config": told}
    source = models.write(tmp_path / "model", None, models.LLAMA | ({"text_config": part} if inside else part))
    with pytest.raises(CheckpointError, match=r"says that weights are quantised by .*, but no tensor is: remove its quantization_config"):
        inspect(source)


def test_a_configuration_inside_the_one_of_the_text_model_is_read(tmp_path):
    config = models.w8a8_config() | {"text_config": {}}
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    source = models.write(tmp_path / "vision", models.w8a8(models.llama_tensors()), config)
    convert(source, tmp_path / "out", Recipe(SIX, "magnitude"))
    assert inspect(source).scheme == "int8" and verify(tmp_path / "out", source).ok
    assert "quantization_config" not in models.config_of(tmp_path / "out")["text_config"]
