"""Models whose layers have different patterns: in transformers, and swapped in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from packed_checkpoint import random_model
from slidesparse.checkpoint import Checkpoint, Recipe, convert
from slidesparse.nn import SlideSparseLinear, pack_model
from slidesparse.pattern import KNOWN, Pattern, tightest_first
from slidesparse.tolerance import check_bitwise
from test_transformers import load, logits, packed_layers, simulate, tiny

MIXED = {"*.down_proj": "8:10", "*.0.self_attn.qkv_proj": "2:4", "*.1.mlp.gate_up_proj": "4:6", "model.layers.1.self_attn.o_proj": "14:16"}
"""Over 6:8. Rows that obey 2:4 obey 6:8, too: the order in which a twin's weights are held against its patterns shows."""


def mixed(directory: Path, scheme: str, kind: str = "qwen2") -> Path:
    """A random model, masked in 16 bits and of one scheme in both stored forms."""
    random_model(tiny(kind, intermediate_size=48), torch.bfloat16).save_pretrained(directory / "source")
    pairs = "x2" if scheme == "nvfp4" else ""
    overrides = {entry: Pattern.parse(text + pairs) for entry, text in MIXED.items()}
    common = Pattern.parse("6:8" + pairs)
    convert(directory / "source", directory / "masked", Recipe(common, "magnitude", form="dense", overrides=overrides))
    for form in ("packed", "dense"):
        convert(directory / "source", directory / form, Recipe(common, "magnitude", scheme, form, overrides=overrides))
    return directory


def patterns(model: nn.Module) -> dict[str, str]:
    return {name: str(module.pattern) for name, module in model.named_modules() if isinstance(module, SlideSparseLinear)}


def wanted(pairs: str = "") -> dict[str, str]:
    """What each layer of the small models has."""
    found = {}
    for block in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            special = "2:4" if block == 0 and name != "o_proj" else "14:16" if block == 1 and name == "o_proj" else "6:8"
            found[f"model.layers.{block}.self_attn.{name}"] = special + pairs
        for name in ("gate_proj", "up_proj", "down_proj"):
            found[f"model.layers.{block}.mlp.{name}"] = ("8:10" if name == "down_proj" else "4:6" if block else "6:8") + pairs
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_sixteen_bit_models_compute_what_the_masked_one_does(kind: str, tmp_path: Path) -> None:
    mixed(tmp_path, "bf16", kind)
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    packed, (twin, _) = AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), load(tmp_path / "dense", tokenizer=False)
    for model in (packed, twin):
        assert patterns(model) == wanted()
        check_bitwise(logits(model), logits(masked))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "nvfp4"])
def test_quantised_models_stay_close_and_their_forms_agree(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    mixed(tmp_path, scheme)
    packed, twin = (load(tmp_path / form, tokenizer=False)[0] for form in ("packed", "dense"))
    assert patterns(packed) == patterns(twin) == wanted("x2" if scheme == "nvfp4" else "")
    for name, tensor in packed.state_dict().items():
        check_bitwise(twin.state_dict()[name], tensor)
    check_bitwise(logits(twin), logits(packed))
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    dense, ours = logits(masked).float(), logits(packed).float()
    assert 0 < (ours - dense).norm() < (0.7 if scheme == "nvfp4" else 0.4) * dense.norm()  # a wrong layer would give about 1.4
    if scheme == "int8":
        assert (ours - logits(simulate(masked, scheme)).float()).norm() < 0.15 * dense.norm()


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_saving_keeps_each_layers_pattern(form: str, tmp_path: Path) -> None:
    mixed(tmp_path, "bf16")
    model, _ = load(tmp_path / form, tokenizer=False)
    model.save_pretrained(tmp_path / "again")
    saved, written = (json.loads((tmp_path / path / "config.json").read_text())["quantization_config"] for path in ("again", "packed"))
    assert (saved["pattern"], saved["overrides"], saved["in_features"]) == tuple(
        written[key] for key in ("pattern", "overrides", "in_features")
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert patterns(again) == wanted()
    check_bitwise(logits(again), logits(model))


def test_swapped_layers_get_the_tightest_pattern_they_obey(tmp_path: Path) -> None:
    mixed(tmp_path, "bf16")
    claimed = Checkpoint.open(tmp_path / "dense").marked_patterns()
    assert tuple(map(str, claimed)) == ("2:4", "4:6", "6:8", "8:10", "14:16")
    for candidates in (KNOWN, claimed):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
        before = logits(model)
        pack_model(model, candidates=candidates)
        assert packed_layers(model) == list(wanted()) and patterns(model) == wanted()
        check_bitwise(logits(model), before)
    # Zeros that happen to obey a tighter pattern are packed in it: the weights decide.
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
        model.model.layers[1].self_attn.o_proj.weight[:, ::2] = 0
        pack_model(model, candidates=claimed)
    assert patterns(model) == wanted() | {"model.layers.1.self_attn.o_proj": "2:4"}


def test_tightest_first() -> None:
    texts = ["8:10", "2:4", "12:16@4:8", "6:8", "2:4x2", "4:6"]
    assert [str(one) for one in tightest_first(map(Pattern.parse, texts))] == ["2:4", "2:4x2", "4:6", "6:8", "12:16@4:8", "8:10"]
