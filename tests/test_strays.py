"""What is left of a quantisation beside 16-bit weights: it goes along and is named, or is refused where it is another form of them."""

from __future__ import annotations

import pytest
import torch

import models
import tiny
from slidesparse import convert as convert_with_readers
from slidesparse import load
from slidesparse.checkpoint import Recipe, convert
from slidesparse.errors import CheckpointError
from slidesparse.pattern import Pattern

SIX = Pattern.parse("6:8")

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
