"""The streaming conversion against the oracle, tensor by tensor, over forms, schemes and sources."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import models
from slidesparse import packing, reference
from slidesparse.checkpoint import Recipe, convert, layers, verify
from slidesparse.errors import PatternError, UnsupportedError
from slidesparse.format import SCHEMES, Packed, PackedConfig
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.quantization import dequantize_nvfp4

SIX = Pattern.parse("6:8")
LAYER = "model.layers.1.mlp.down_proj"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(packing.integer_view(a), packing.integer_view(b))


def restored(path: Path, layer: str) -> torch.Tensor:
    """A packed layer as dense stored values, through the oracle."""
    tensors, config = models.read(path), PackedConfig.from_dict(models.config_of(path)["quantization_config"])
    values, keep = tensors[f"{layer}.weight_values"], tensors[f"{layer}.weight_keep"]
    pattern = config.pattern_of(layer)
    full = values.shape[1] // pattern.kept * pattern.group
    return reference.restore(Packed(values, keep, config.scheme.pattern_stored(pattern), config.in_features.get(layer, full)))


@pytest.mark.parametrize("pattern", [KNOWN[0], KNOWN[1], SIX, KNOWN[3], KNOWN[-1]], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "fp16"])
def test_convert_is_the_oracles_prune_quantise_pack(tmp_path, scheme, pattern):
    tensors = models.llama_tensors()
    source = models.write(tmp_path / "dense", tensors)
    convert(source, tmp_path / "out", Recipe(pattern, "magnitude", scheme))
    out = models.read(tmp_path / "out")
    for name, weight in tensors.items():
        layer = name.removesuffix(".weight")
        if "proj" not in name:
            assert same(out[name], weight)
            continue
        pruned = reference.prune(weight, pattern)
        if SCHEMES[scheme].dynamic:
            values, scale = reference.quantize(pruned, SCHEMES[scheme])
            assert torch.equal(out[f"{layer}.weight_scale"], scale)
        else:
            values = pruned.to(SCHEMES[scheme].dtype)
        expected = reference.pack(values, pattern)
        assert same(out[f"{layer}.weight_values"], expected.values)
        assert torch.equal(out[f"{layer}.weight_keep"], expected.keep)
        assert f"{layer}.weight" not in out
    assert verify(tmp_path / "out", source).ok


def test_three_steps_equal_one(tmp_path):
    source = models.write(tmp_path / "dense", shards=3)
    convert(source, tmp_path / "pruned", Recipe(SIX, "magnitude", form="dense"))
    convert(tmp_path / "pruned", tmp_path / "quantized", Recipe(scheme="fp8", form="dense", obey=False))
    convert(tmp_path / "quantized", tmp_path / "packed", Recipe())
    convert(source, tmp_path / "direct", Recipe(SIX, "magnitude", "fp8"))
    steps, direct = models.read(tmp_path / "packed"), models.read(tmp_path / "direct")
    assert steps.keys() == direct.keys() and all(same(steps[name], direct[name]) for name in direct)
    assert models.config_of(tmp_path / "packed") == models.config_of(tmp_path / "direct")
    assert verify(tmp_path / "packed", tmp_path / "pruned").ok
    convert(tmp_path / "packed", tmp_path / "twin", Recipe(form="dense"))
    assert all(same(tensor, models.read(tmp_path / "quantized")[name]) for name, tensor in models.read(tmp_path / "twin").items())


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_index_and_side_files_go_along(tmp_path, shards):
    tensors = models.llama_tensors(bias=True)
    source = models.write(tmp_path / "dense", tensors, shards=shards)
    report = convert(source, tmp_path / "out", Recipe(SIX, "magnitude", "int8"))
    out = models.read(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert {file.name for file in source.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    assert all(same(out[name], tensor) for name, tensor in tensors.items() if name.endswith("bias"))
    assert report.bytes_out == sum(tensor.nbytes for tensor in out.values()) < report.bytes_in
    if shards > 1:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == out.keys() and index["metadata"]["total_size"] == report.bytes_out


def test_config_tells_a_loader_everything(tmp_path):
    source = models.write(tmp_path / "dense")
    convert(source, tmp_path / "out", Recipe(SIX, "magnitude", "int8", ignore=("*.0.self_attn.*",)))
    config = PackedConfig.from_dict(models.config_of(tmp_path / "out")["quantization_config"])
    assert (config.pattern, config.scheme.name) == (SIX, "int8")
    assert config.ignores("lm_head") and config.ignores("model.layers.0.self_attn.q_proj") and not config.ignores(LAYER)
    assert config.in_features == {"model.layers.0.mlp.down_proj": 100, LAYER: 100}
    assert "model.layers.0.self_attn.q_proj.weight" in models.read(tmp_path / "out")


def test_dense_twins_are_what_other_engines_read(tmp_path):
    source = models.write(tmp_path / "dense")
    convert(source, tmp_path / "w8a8", Recipe(SIX, "magnitude", "int8", form="dense"))
    config, tensors = models.config_of(tmp_path / "w8a8"), models.read(tmp_path / "w8a8")
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors" and quantization["format"] == "int-quantized"
    assert quantization["slidesparse"]["pattern"] == "6:8" and "sparsity_config" not in quantization
    assert tensors[f"{LAYER}.weight"].dtype == torch.int8 and tensors[f"{LAYER}.weight_scale"].shape == (64, 1)
    convert(source, tmp_path / "masked", Recipe(SIX, "magnitude", form="dense"))
    config = models.config_of(tmp_path / "masked")
    assert config["slidesparse"]["pattern"] == "6:8" and "quantization_config" not in config
    assert same(models.read(tmp_path / "masked")[f"{LAYER}.weight"], reference.prune(models.read(source)[f"{LAYER}.weight"], SIX))


def test_a_twin_holds_the_bits_that_packed_weights_give_back(tmp_path):
    tensors = models.llama_tensors()
    tensors[f"{LAYER}.weight"][:, ::3] *= -1e-6  # far below fp8's smallest step: these round to -0.0
    source = models.write(tmp_path / "source", tensors)
    for form in ("packed", "dense"):
        convert(source, tmp_path / form, Recipe(SIX, "magnitude", "fp8", form))
    twin = models.read(tmp_path / "dense")[f"{LAYER}.weight"]
    assert twin.dtype == torch.float8_e4m3fn and same(twin, restored(tmp_path / "packed", LAYER))


def test_masks_from_elsewhere_are_detected_per_layer_and_negative_zero_is_a_zero(tmp_path):
    tensors = models.llama_tensors()
    for name, weight in tensors.items():
        if "proj" in name:
            pattern = KNOWN[1] if "down_proj" in name else SIX
            mask = reference.prune_mask(weight, pattern)
            tensors[name] = torch.where(mask, weight, -torch.zeros((), dtype=weight.dtype))
    source = models.write(tmp_path / "masked", tensors)
    convert(source, tmp_path / "out", Recipe())
    config = PackedConfig.from_dict(models.config_of(tmp_path / "out")["quantization_config"])
    assert config.pattern == SIX and set(config.overrides.values()) == {KNOWN[1]} and all("down_proj" in name for name in config.overrides)
    report = verify(tmp_path / "out", source)
    assert report.ok
    for name, weight in tensors.items():
        if "proj" in name:
            layer = name.removesuffix(".weight")
            assert same(restored(tmp_path / "out", layer), reference.prune(weight, config.pattern_of(layer)))


def test_violations_name_tensor_row_group_and_values_and_nothing_is_written(tmp_path):
    tensors = {name: reference.prune(t, SIX) if "proj" in name else t for name, t in models.llama_tensors().items()}
    tensors[f"{LAYER}.weight"][37, 16:24] = torch.arange(1, 9).bfloat16()
    source = models.write(tmp_path / "masked", tensors)
    for recipe in (Recipe(SIX), Recipe(SIX, form="dense")):
        with pytest.raises(PatternError, match=rf"{LAYER}.*row 37, group 2 .*8 non-zero.*1, 2, 3, 4, 5, 6, 7, 8") as caught:
            convert(source, tmp_path / "out", recipe)
        assert (caught.value.row, caught.value.group) == (37, 2)
        assert not (tmp_path / "out").exists()


def test_unpruned_layers_are_refused_or_ignored_by_name(tmp_path):
    tensors = {name: reference.prune(t, SIX) if "self_attn" in name else t for name, t in models.llama_tensors().items()}
    source = models.write(tmp_path / "half", tensors)
    with pytest.raises(PatternError, match=r"mlp.*obeys no pattern.*--ignore"):
        convert(source, tmp_path / "out", Recipe())
    report = convert(source, tmp_path / "out2", Recipe(ignore=("*.mlp.*",)))
    assert {layer.pattern for layer in report.layers} == {"6:8"} and len(report.layers) == 8


def test_compressed_tensors_values_are_masked_and_packed_with_their_scales(tmp_path):
    source = models.write(tmp_path / "dense")
    convert(source, tmp_path / "w8a8", Recipe(scheme="int8", form="dense", obey=False))
    before = models.read(tmp_path / "w8a8")
    models.edit_tensors(tmp_path / "w8a8", **{f"{LAYER}.weight_scale": before[f"{LAYER}.weight_scale"].bfloat16()})
    convert(tmp_path / "w8a8", tmp_path / "out", Recipe(SIX, "magnitude"))
    after = models.read(tmp_path / "out")
    assert torch.equal(after[f"{LAYER}.weight_scale"], before[f"{LAYER}.weight_scale"].bfloat16().float())
    assert torch.equal(restored(tmp_path / "out", LAYER), reference.prune(before[f"{LAYER}.weight"], SIX))
    with pytest.raises(UnsupportedError, match="int8 already"):
        convert(tmp_path / "w8a8", tmp_path / "no", Recipe(SIX, "magnitude", "fp8"))
    with pytest.raises(UnsupportedError, match="cannot be left out"):
        convert(tmp_path / "w8a8", tmp_path / "no", Recipe(SIX, "magnitude", ignore=("*down_proj",)))


def test_nvfp4_with_pairs(tmp_path):
    tensors = models.llama_tensors(inner=112)
    source = models.write(tmp_path / "dense", tensors)
    pattern = Pattern.parse("6:8x2")
    with pytest.raises(UnsupportedError, match="6:8x2"):
        convert(source, tmp_path / "no", Recipe(SIX, "magnitude", "nvfp4"))
    convert(source, tmp_path / "out", Recipe(pattern, "magnitude", "nvfp4"))
    assert verify(tmp_path / "out", source).ok
    out = models.read(tmp_path / "out")
    dense = dequantize_nvfp4(restored(tmp_path / "out", LAYER), out[f"{LAYER}.weight_scale"], out[f"{LAYER}.weight_global_scale"])
    pruned = reference.prune(tensors[f"{LAYER}.weight"], pattern).float()
    assert ((dense == 0) | (pruned != 0)).all()
    assert (dense - pruned).norm() / pruned.norm() < 0.15
    convert(tmp_path / "out", tmp_path / "twin", Recipe(form="dense"))
    convert(tmp_path / "twin", tmp_path / "again", Recipe())
    assert all(same(tensor, out[name]) for name, tensor in models.read(tmp_path / "again").items())
    for form in ("packed", "dense"):  # masked first, in 16 bits
        convert(source, tmp_path / f"16-{form}", Recipe(pattern, "magnitude", form=form))
        convert(tmp_path / f"16-{form}", tmp_path / f"4-{form}", Recipe(scheme="nvfp4"))
    one, other = (models.read(tmp_path / f"4-{form}") for form in ("packed", "dense"))
    assert one.keys() == other.keys() == out.keys() and all(same(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_bitnet_packed_files_and_masters(tmp_path, linear_class):
    tensors = models.llama_tensors(inner=112)
    config = models.LLAMA | {"model_type": "bitnet", "quantization_config": {"quant_method": "bitnet", "linear_class": linear_class}}
    ternary, packed = {}, {}
    for name, weight in tensors.items():
        if "proj" not in name:
            packed[name] = weight
            continue
        scale = weight.float().abs().mean()
        q = (weight.float() / scale).round().clamp(-1, 1).to(torch.int8)
        ternary[name] = q, scale
        codes = (q + 1).to(torch.uint8).view(4, -1, q.shape[1])
        packed[name] = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
        packed[f"{name}_scale"] = (1 / scale if linear_class == "bitlinear" else scale).reshape(1)
    models.write(tmp_path / "packed", packed, config)
    models.write(tmp_path / "master", tensors, models.LLAMA | {"model_type": "bitnet"})
    for kind in ("packed", "master"):
        with pytest.raises(UnsupportedError, match="--scheme int8"):
            convert(tmp_path / kind, tmp_path / "no", Recipe(SIX, "magnitude"))
        convert(tmp_path / kind, tmp_path / f"{kind}-out", Recipe(SIX, "magnitude", "int8"))
        out = models.read(tmp_path / f"{kind}-out")
        for name, (q, scale) in ternary.items():
            layer = name.removesuffix(".weight")
            assert torch.equal(restored(tmp_path / f"{kind}-out", layer), reference.prune(q, SIX))
            torch.testing.assert_close(out[f"{layer}.weight_scale"], scale.expand(q.shape[0], 1).contiguous(), rtol=1e-6, atol=0)
        assert verify(tmp_path / f"{kind}-out", tmp_path / kind).ok


def test_random_pruning_is_reproducible_and_differs_by_seed(tmp_path):
    source = models.write(tmp_path / "dense")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(source, tmp_path / name, Recipe(SIX, "random", form="dense", seed=seed))
    a, b, c = (models.read(tmp_path / name)[f"{LAYER}.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert packing.find_violation(a, SIX) is None and int((a == 0).sum()) == 64 * 24


def test_random_pruning_draws_anew_in_every_layer_and_block(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "_WEIGHTS", 16 * 64)
    same = torch.randn(16, 64).bfloat16().repeat(4, 1)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    source = models.write(tmp_path / "dense", models.llama_tensors() | {name: same.clone() for name in names})
    convert(source, tmp_path / "out", Recipe(SIX, "random", form="dense"))
    found = models.read(tmp_path / "out")
    kept = [block != 0 for name in names for block in found[name].split(16)]
    assert len(kept) == 8 and not any(torch.equal(one, other) for one, other in itertools.combinations(kept, 2))


def test_selection_keeps_heads_experts_and_routers(tmp_path):
    tensors = models.llama_tensors() | {
        "lm_head.weight": torch.randn(96, 64).bfloat16(),
        "model.layers.0.mlp.experts.0.w1.weight": torch.randn(8, 64).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.randn(4, 64).bfloat16(),
    }
    source = models.write(tmp_path / "dense", tensors)
    report = convert(source, tmp_path / "a", Recipe(SIX, "magnitude"))
    assert {"lm_head", "model.layers.0.mlp.experts.0.w1", "model.layers.0.mlp.gate"} <= set(report.kept_dense)
    report = convert(source, tmp_path / "b", Recipe(SIX, "magnitude", only=("lm_head", "*.o_proj")))
    assert [layer.name for layer in report.layers] == ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    for recipe in (Recipe(SIX, "magnitude", only=("nothing*",)), Recipe(SIX, "magnitude", ignore=("*.typo_proj",))):
        with pytest.raises(UnsupportedError, match="matches no layer"):
            convert(source, tmp_path / "c", recipe)
    with pytest.raises(UnsupportedError, match="no layer to convert"):
        convert(source, tmp_path / "c", Recipe(SIX, "magnitude", only=("model.embed_tokens",)))
    convert(source, tmp_path / "packed", Recipe(SIX, "magnitude"))
    with pytest.raises(UnsupportedError, match="all together"):
        convert(tmp_path / "packed", tmp_path / "c", Recipe(KNOWN[0], "magnitude", only=("*.o_proj",)))


def test_float32_needs_a_scheme_and_fp16_overflow_is_refused(tmp_path):
    tensors = models.llama_tensors(torch.float32)
    source = models.write(tmp_path / "dense", tensors)
    with pytest.raises(UnsupportedError, match=r"float32.*--scheme"):
        convert(source, tmp_path / "no", Recipe(SIX, "magnitude"))
    convert(source, tmp_path / "masked", Recipe(SIX, "magnitude", form="dense"))
    assert same(models.read(tmp_path / "masked")[f"{LAYER}.weight"], reference.prune(tensors[f"{LAYER}.weight"], SIX))
    convert(source, tmp_path / "out", Recipe(SIX, "magnitude", "int8"))
    assert verify(tmp_path / "out", tmp_path / "masked").ok
    tensors[f"{LAYER}.weight"][5, 5] = 1e6
    source = models.write(tmp_path / "wide", tensors)
    with pytest.raises(ValueError, match=rf"{LAYER}.*row 5, column 5 is inf"):
        convert(source, tmp_path / "no", Recipe(SIX, "magnitude", "fp16"))


def test_a_cast_changes_the_models_type(tmp_path):
    parts = {"text_config": {"dtype": "bfloat16"}, "vision_config": {"torch_dtype": None, "depth": 2}}
    source = models.write(tmp_path / "dense", config=models.LLAMA | parts | {"dtype": "bfloat16"})
    for scheme, dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("int8", "bfloat16")):
        for form in ("packed", "dense"):
            convert(source, tmp_path / f"{scheme}-{form}", Recipe(SIX, "magnitude", scheme, form))
            config = models.config_of(tmp_path / f"{scheme}-{form}")
            assert config["dtype"] == config["text_config"]["dtype"] == dtype and config["vision_config"] == parts["vision_config"]


def test_byte_counts_are_those_of_the_format(tmp_path):
    source = models.write(tmp_path / "dense", models.llama_tensors(hidden=240, inner=480, layers=1))
    for pattern, bf16, eight in (("2:4", 0.563, 0.625), ("4:6", 0.729, 0.792), ("6:8", 0.813, 0.875), ("8:10", 0.863, 0.925)):
        for scheme, expected in (("bf16", bf16), ("int8", eight)):
            report = convert(source, tmp_path / f"{pattern}{scheme}", Recipe(Pattern.parse(pattern), "magnitude", scheme))
            dense = sum(layer.n * layer.k * SCHEMES[scheme].dtype.itemsize for layer in report.layers)
            scales = sum(layer.n * 4 for layer in report.layers) if scheme == "int8" else 0
            assert (sum(layer.bytes_out for layer in report.layers) - scales) / dense == pytest.approx(expected, abs=6e-4)
