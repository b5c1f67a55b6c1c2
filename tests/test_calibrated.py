"""Calibrated pruning from end to end: many architectures, every method, every stored form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models
import tiny
from slidesparse import Pattern, convert, load, reference, verify
from slidesparse.checkpoint import Recipe
from slidesparse.errors import UnsupportedError, WeightError
from slidesparse.format import FP32, SCHEMES, PackedConfig
from slidesparse.integrations.pruning.solving import Task, solve_layers
from slidesparse.packing import find_violation
from slidesparse.pruning import Gathering, Statistics, layer_error, prune
from slidesparse.quantization import quantize_weight
from test_convert import restored, same
from tiny import SIX

pytestmark = pytest.mark.usefixtures("tiny_models")

METHODS = ("wanda", "sparsegpt", "admm", "auto")
LAYERS = {"llama": 7, "qwen2": 7, "gemma3": 7, "phi": 6, "gpt-neox": 4, "falcon": 4, "bloom": 4, "opt": 6, "qwen2-moe": 7, "mixtral": 4}
"""Linear layers of a block that are pruned; of mixtures the experts are not."""


def steps_of(method: str) -> int | None:
    return 8 if method == "auto" else None


def logits(path: Path) -> torch.Tensor:
    model, _ = load(path, tokenizer=False, device="cpu")
    with torch.no_grad():
        return model(torch.arange(3, 20).unsqueeze(0)).logits.float()


@pytest.mark.parametrize("family", LAYERS)
def test_every_method_on_every_architecture(tmp_path, family):
    dense, ids = tiny.build(tmp_path / "dense", family), tiny.token_ids(tmp_path / "ids.npy")
    before, errors = models.read(dense), {}
    for method in METHODS:
        out = tmp_path / method
        report = convert(dense, out, tiny.recipe(method, ids, reconstruction_steps=steps_of(method)))
        names = {layer.name for layer in report.layers}
        assert len(names) == 2 * LAYERS[family] and report.pruning.layers.keys() == names
        added = {file.name for file in out.iterdir()} - {file.name for file in dense.iterdir()}
        assert verify(out).ok and added == {"pruning_report.json", "calibration_norms.npz"}
        after = models.read(out)
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            if name.removesuffix(".weight") not in names:
                assert same(tensor, before[name]), f"{name} is no pruned layer's"
        errors[method] = sum(layer["error"] for layer in report.pruning.blocks[0]["layers"].values())
    # The first block sees the same inputs whatever the method, so its errors can be compared; 16-bit rounding is the allowance.
    assert 0 < errors["admm"] <= errors["sparsegpt"] * 1.01 and errors["sparsegpt"] < errors["wanda"]
    assert verify(tmp_path / "wanda", dense).ok, "Wanda changes no weight that stays"
    assert not verify(tmp_path / "admm", dense).ok
    assert torch.isfinite(logits(tmp_path / "auto")).all()


def test_layers_outside_the_blocks_are_left_out_by_name(tmp_path):
    dense, ids = tiny.build(tmp_path / "dense", "opt-projected"), tiny.token_ids(tmp_path / "ids.npy")
    with pytest.raises(UnsupportedError, match=r"^layer model\.decoder\.project_in and 1 more: .*--ignore"):
        convert(dense, tmp_path / "no", tiny.recipe("admm", ids))
    report = convert(dense, tmp_path / "out", tiny.recipe("admm", ids, ignore=("*.project_*",)))
    assert len(report.layers) == 12 and {"model.decoder.project_in", "model.decoder.project_out"} < set(report.kept_dense)


def test_a_layer_that_is_never_called_is_left_out_by_name(tmp_path):
    # Mamba takes the weight of dt_proj without calling the layer.
    dense, ids = tiny.build(tmp_path / "dense", "mamba"), tiny.token_ids(tmp_path / "ids.npy")
    with pytest.raises(WeightError, match=r"^layer backbone\.layers\.0\.mixer\.dt_proj: no calibration token reached it: .*--ignore"):
        convert(dense, tmp_path / "no", tiny.recipe("sparsegpt", ids))
    report = convert(dense, tmp_path / "out", tiny.recipe("sparsegpt", ids, ignore=("*.dt_proj",)))
    assert len(report.layers) == 6 and torch.isfinite(logits(tmp_path / "out")).all()


# ---------------------------------------------------------------------------------------------- calibration


def test_text_through_a_tokenizer_is_the_same_as_its_token_ids(tmp_path):
    dense = tiny.build(tmp_path / "dense")
    tiny.add_tokenizer(dense)
    ids = tiny.token_ids(tmp_path / "ids.npy")
    lines = [" ".join(f"w{token}" for token in row) for row in np.load(ids)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    of_ids = convert(dense, tmp_path / "a", tiny.recipe("admm", ids))
    of_text = convert(dense, tmp_path / "b", tiny.recipe("admm", str(tmp_path / "text.txt")))
    assert of_ids.pruning.layers == of_text.pruning.layers
    a, b = models.read(tmp_path / "a"), models.read(tmp_path / "b")
    assert all(same(a[name], b[name]) for name in a)
    assert of_text.pruning.calibration == f"the file {tmp_path / 'text.txt'} gives 12 samples of 24 tokens"


def test_the_seed_decides_which_samples_are_taken_and_nothing_else(tmp_path):
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy", samples=30)
    reports, outputs = [], []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        recipe = tiny.recipe("auto", ids, samples=6, reconstruction_steps=8, seed=seed)
        reports.append(convert(dense, tmp_path / name, recipe).pruning)
        outputs.append(models.read(tmp_path / name))
    assert reports[0] == reports[1] and all(same(outputs[0][name], outputs[1][name]) for name in outputs[0])
    assert "chosen by seed 7" in reports[0].calibration and "chosen by seed 8" in reports[2].calibration
    assert any(not same(outputs[0][name], outputs[2][name]) for name in outputs[0])


# ---------------------------------------------------------------------------------------------- stored forms


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_packed_is_its_dense_twin_packed(tmp_path, scheme):
    dense, ids = tiny.build(tmp_path / "dense", "qwen2"), tiny.token_ids(tmp_path / "ids.npy")
    convert(dense, tmp_path / "packed", tiny.recipe("admm", ids, scheme=scheme, form="packed"))
    convert(dense, tmp_path / "twin", tiny.recipe("admm", ids, scheme=scheme))
    assert verify(tmp_path / "packed", tmp_path / "twin").ok
    masked = convert(dense, tmp_path / "masked", tiny.recipe("admm", ids))
    got, want = logits(tmp_path / "packed"), logits(tmp_path / "masked")
    error = (got - want).norm() / want.norm()
    assert len(masked.layers) == 14 and error < {"int8": 0.1, "fp8": 0.3, "bf16": 1e-3}[scheme], error


def test_another_16_bit_type_is_the_models_type(tmp_path):
    source, ids = tiny.build(tmp_path / "source"), tiny.token_ids(tmp_path / "ids.npy")
    for form in ("dense", "packed"):
        convert(source, tmp_path / form, tiny.recipe("sparsegpt", ids, scheme="fp16", form=form))
        assert models.config_of(tmp_path / form)["dtype"] == "float16"


def test_nvfp4_pairs_are_pruned_as_pairs_and_rounded_by_the_conversion(tmp_path):
    dense, ids = tiny.build(tmp_path / "dense", intermediate_size=64), tiny.token_ids(tmp_path / "ids.npy")
    pairs = Pattern.parse("6:8x2")
    convert(dense, tmp_path / "packed", tiny.recipe("admm", ids, pattern=pairs, scheme="nvfp4", form="packed"))
    convert(dense, tmp_path / "masked", tiny.recipe("admm", ids, pattern=pairs))
    convert(tmp_path / "masked", tmp_path / "steps", Recipe(pairs, scheme="nvfp4"))
    direct, steps = models.read(tmp_path / "packed"), models.read(tmp_path / "steps")
    assert direct.keys() == steps.keys() and all(same(direct[name], steps[name]) for name in direct)
    assert verify(tmp_path / "packed", tmp_path / "masked").ok


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_layers_may_have_patterns_of_their_own(tmp_path, method):
    dense, ids = tiny.build(tmp_path / "dense"), tiny.token_ids(tmp_path / "ids.npy")
    mixed = {"*.down_proj": "8:10", "*.0.self_attn.qkv_proj": "2:4", "model.layers.1.mlp.gate_up_proj": "4:6"}
    overrides = {entry: Pattern.parse(text) for entry, text in mixed.items()}
    report = convert(dense, tmp_path / "out", tiny.recipe(method, ids, overrides=overrides, scheme="int8", form="packed"))
    found = {layer.name: layer.pattern for layer in report.layers}
    assert {pattern: list(found.values()).count(pattern) for pattern in found.values()} == {"2:4": 3, "6:8": 7 - 2 + 2, "8:10": 2, "4:6": 2}
    config = PackedConfig.from_dict(models.config_of(tmp_path / "out")["quantization_config"])
    for name, pattern in found.items():
        assert config.pattern_of(name) == Pattern.parse(pattern)
        assert find_violation(restored(tmp_path / "out", name), Pattern.parse(pattern)) is None
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_files_type_counts_whatever_config_says(tmp_path, dtype):
    dense, ids = tiny.build(tmp_path / "dense", dtype=getattr(torch, dtype)), tiny.token_ids(tmp_path / "ids.npy")
    config = models.config_of(dense) | {"dtype": "bfloat16"}
    (dense / "config.json").write_text(json.dumps(config))
    convert(dense, tmp_path / "out", tiny.recipe("wanda", ids))
    assert verify(tmp_path / "out", dense).ok


# ---------------------------------------------------------------------------------------------- 8 bits


@pytest.fixture
def layer() -> tuple[nn.Linear, Statistics]:
    """A linear layer and the statistics of correlated inputs."""
    linear, gathering = nn.Linear(72, 40, bias=False), Gathering()
    gathering.add(torch.randn(400, 72) @ torch.randn(72, 72))
    return linear, gathering.statistics()


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "wanda"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_rounding_to_8_bits_loses_no_more_than_the_nearest_values(layer, scheme, method):
    linear, statistics = layer
    seen: list[str] = []
    solution = solve_layers([Task("a", linear, SIX, SCHEMES[scheme])], {"a": statistics}, method, seen.append)["a"]
    pruned = prune(linear.weight.detach(), SIX, method, statistics=statistics)
    values, scale = quantize_weight(pruned, SCHEMES[scheme])
    nearest = layer_error(linear.weight.detach(), values.float() * scale, statistics)
    assert seen == ["a"] and solution.error == layer_error(linear.weight.detach(), solution.weight, statistics)
    assert torch.equal(solution.scale, scale) and torch.equal(solution.weight, solution.values.float() * scale)
    assert ((solution.values.float() == 0) | (pruned != 0)).all(), "a weight that went came back"
    if method == "wanda":
        assert torch.equal(solution.weight, values.float() * scale) and solution.error == nearest
    else:
        assert solution.error < nearest


def test_layers_are_solved_together_as_they_would_be_alone(layer):
    """Layers with the same inputs share a solve, whatever their size; one with another pattern does not."""
    linear, statistics = layer
    other = nn.Linear(72, 24, bias=False)
    tasks = [Task("a", linear, SIX, FP32), Task("b", other, SIX, SCHEMES["bf16"]), Task("c", linear, Pattern.parse("2:4"), FP32)]
    both = solve_layers(tasks, dict.fromkeys("abc", statistics), "sparsegpt", lambda name: None)
    for task in tasks:
        alone = solve_layers([task], {task.name: statistics}, "sparsegpt", lambda name: None)[task.name]
        torch.testing.assert_close(both[task.name].weight, alone.weight)
        assert find_violation(both[task.name].weight, task.pattern) is None
        assert both[task.name].values.dtype == task.scheme.dtype
    assert reference.prune_mask(both["a"].weight, SIX).float().mean() <= 0.75 + 1e-6
