"""Quantised checkpoints of others: what their makers decided is heeded, read or refused; what is written says what lies in the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import models
import tiny
from slidesparse import convert as convert_with_readers
from slidesparse import reference
from slidesparse import verify as verify_with_readers
from slidesparse.checkpoint import Recipe, convert, inspect, verify
from slidesparse.errors import CheckpointError, PatternError, UnsupportedError, WeightError
from slidesparse.format import PackedConfig
from slidesparse.pattern import Pattern

SIX = Pattern.parse("6:8")
LEFT = "model.layers.0.mlp.down_proj"
EXPERT = "model.layers.0.mlp.experts.0.w1"


def masked() -> dict[str, torch.Tensor]:
    return {name: reference.prune(t, SIX) if "proj" in name else t for name, t in models.llama_tensors().items()}


def ignored(path: Path) -> list[str]:
    return models.config_of(path)["quantization_config"]["ignore"]


@pytest.fixture
def mixed(tmp_path) -> Path:
    """W8A8 with one linear layer left in 16 bits, an int8 expert, an int8 head, and a router."""
    more = {"lm_head": (96, 64), EXPERT: (8, 64), "model.layers.0.mlp.gate": (4, 64)}
    tensors = masked() | {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in more.items()}
    return models.write(tmp_path / "mixed", models.w8a8(tensors, (LEFT,)), models.w8a8_config((LEFT, "re:.*gate$")))


# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("recipe", [Recipe(SIX, "magnitude", form="dense"), Recipe(SIX, form="dense")], ids=["prune", "pack"])
def test_a_dense_output_says_which_layers_are_quantised(tmp_path, mixed, recipe):
    convert(mixed, tmp_path / "out", recipe)
    quantization, tensors = models.config_of(tmp_path / "out")["quantization_config"], models.read(tmp_path / "out")
    assert quantization["quant_method"] == "compressed-tensors" and quantization["format"] == "int-quantized"
    floating = {name.removesuffix(".weight") for name, t in tensors.items() if t.dim() == 2 and t.dtype == torch.bfloat16}
    assert set(quantization["ignore"]) == floating == {LEFT, "model.layers.0.mlp.gate", "model.embed_tokens"}
    assert set(quantization["slidesparse"]["ignore"]) == floating | {"lm_head", EXPERT}
    assert verify(tmp_path / "out", mixed).ok and inspect(tmp_path / "out").pattern == "6:8"


def test_the_first_layer_does_not_decide_for_all(tmp_path):
    first = "model.layers.0.self_attn.q_proj"
    source = models.write(tmp_path / "w8a8", models.w8a8(masked(), (first,)), models.w8a8_config((first,)))
    for name, recipe in (("dense", Recipe(SIX, form="dense")), ("packed", Recipe())):
        convert(source, tmp_path / name, recipe)
        assert first in ignored(tmp_path / name) and first + ".weight" in models.read(tmp_path / name)
    assert PackedConfig.from_dict(models.config_of(tmp_path / "packed")["quantization_config"]).scheme.name == "int8"


def test_types_that_cannot_share_a_checkpoint_are_refused_with_a_way_out(tmp_path):
    tensors = {name: t.half() if "down_proj" in name else t for name, t in masked().items()}
    source = models.write(tmp_path / "two", tensors)
    with pytest.raises(UnsupportedError, match=r"bf16, fp16.*--ignore \(fp16: model\.layers\.0\.mlp\.down_proj"):
        convert(source, tmp_path / "out", Recipe())
    convert(source, tmp_path / "out", Recipe(ignore=("*down_proj",)))
    source = models.write(tmp_path / "w8a8", models.w8a8(masked(), (LEFT,)), models.w8a8_config((LEFT,)))
    with pytest.raises(UnsupportedError, match=rf"fp8, int8.*\(fp8: {LEFT}\)"):
        convert(source, tmp_path / "no", Recipe(scheme="fp8", form="dense", obey=False, only=(LEFT,)))


def test_a_configuration_that_the_files_contradict_fails_verification(tmp_path, mixed):
    convert(mixed, tmp_path / "out", Recipe(SIX, form="dense"))
    ignore = ignored(tmp_path / "out")
    for entries, told in (([*ignore, EXPERT], f"{EXPERT} is quantised in the files"), (ignore[1:], "in the files it is not")):
        models.edit_config(tmp_path / "out", ignore=entries if told.startswith(EXPERT) else [e for e in ignore if e != LEFT])
        report = verify(tmp_path / "out")
        assert not report.ok and len(report.contradictions) == 1 and told in report.contradictions[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "falcon"])
def test_twins_are_read_by_transformers_and_compressed_tensors_as_they_are(tmp_path, family):
    from transformers import AutoModelForCausalLM

    source = tiny.build(tmp_path / "dense", family)
    convert_with_readers(source, tmp_path / "twin", Recipe(SIX, "magnitude", "int8", "dense"))
    assert verify_with_readers(tmp_path / "twin", source).ok
    here, there = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("dense", "twin"))
    assert torch.isfinite(there(torch.arange(3, 9)[None]).logits).all()
    head = "lm_head"
    assert here.get_submodule(head).weight.equal(there.get_submodule(head).weight)
    models.edit_config(tmp_path / "twin", ignore=[entry for entry in ignored(tmp_path / "twin") if entry != head])
    assert [head in told for told in verify_with_readers(tmp_path / "twin").contradictions] == [True]


def test_names_of_modules_are_ignored_where_they_are_not_those_in_the_files(tmp_path):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2}
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "max_position_embeddings": 64}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=sizes | rope, vision_config=vision))
    model.bfloat16().save_pretrained(tmp_path / "vlm")
    recipe = Recipe(scheme="int8", form="dense", ignore=("*visual*",), obey=False)
    convert_with_readers(tmp_path / "vlm", tmp_path / "out", recipe)
    entries = ignored(tmp_path / "out")
    assert "visual.blocks.0.attn.qkv" in entries and "model.visual.blocks.0.attn.qkv" in entries
    assert verify_with_readers(tmp_path / "out", pattern=Pattern.parse("16:18")).contradictions == []


def test_an_output_that_would_not_be_read_as_written_never_appears(tmp_path, monkeypatch):
    source = models.write(tmp_path / "dense")
    monkeypatch.setattr("slidesparse.checkpoint.configs._with_head", lambda ignore, elsewhere: ["re:.*"])
    with pytest.raises(CheckpointError, match=r"is quantised in the files; config\.json says that it is not"):
        convert(source, tmp_path / "out", Recipe(SIX, "magnitude", "int8", "dense"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- what their makers decided


def test_layers_left_in_16_bits_stay_so_unless_they_are_named(tmp_path, mixed):
    tensors = models.read(mixed)
    report = convert(mixed, tmp_path / "out", Recipe(SIX, "magnitude", "int8", "dense"))
    assert LEFT in report.kept_dense and torch.equal(models.read(tmp_path / "out")[f"{LEFT}.weight"], tensors[f"{LEFT}.weight"])
    report = convert(mixed, tmp_path / "named", Recipe(SIX, "magnitude", "int8", "dense", only=("*", LEFT)))
    assert LEFT not in report.kept_dense and models.read(tmp_path / "named")[f"{LEFT}.weight"].dtype == torch.int8
    assert LEFT not in ignored(tmp_path / "named")


def test_int8_heads_and_experts_stay_out_of_packed_checkpoints_with_a_way_out(tmp_path, mixed):
    with pytest.raises(UnsupportedError, match=rf"{EXPERT}.*--format dense keeps it$"):
        convert(mixed, tmp_path / "no", Recipe(SIX, "magnitude", only=("lm_head", "*")))
    tensors = {name: t for name, t in models.read(mixed).items() if EXPERT not in name}
    source = models.write(tmp_path / "head", tensors, models.config_of(mixed))
    with pytest.raises(UnsupportedError, match=r"lm_head.*name it in --only, beside the others \(--only '\*'\)$"):
        convert(source, tmp_path / "no", Recipe(SIX, "magnitude"))
    report = convert(source, tmp_path / "out", Recipe(SIX, "magnitude", only=("lm_head", "*")))
    assert "lm_head" in [layer.name for layer in report.layers]


def test_one_scale_for_a_tensor_is_that_of_every_row(tmp_path):
    tensors, expected = models.w8a8(masked() | {f"{EXPERT}.weight": torch.randn(8, 64).bfloat16()}), {}
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        scale = tensors[name].amax()
        expected[name] = scale.expand(tensors[name].shape[0], 1)
        tensors[name] = scale.reshape(()) if "q_proj" in name else scale.reshape(1)
    source = models.write(tmp_path / "w8a8", tensors, models.w8a8_config(weights={"strategy": "tensor"}))
    convert(source, tmp_path / "dense", Recipe(form="dense"))
    out = models.read(tmp_path / "dense")
    assert all(torch.equal(out[name], scale) for name, scale in expected.items())  # that of an expert, which is not converted, too
    assert verify(tmp_path / "dense", source).ok and verify(source, source, pattern=SIX).ok
    source = models.write(tmp_path / "alone", {n: t for n, t in tensors.items() if EXPERT not in n}, models.config_of(source))
    convert(source, tmp_path / "packed", Recipe())
    assert all(torch.equal(scale, expected[n]) for n, scale in models.read(tmp_path / "packed").items() if n in expected)
    assert verify(tmp_path / "packed", source).ok
    source = models.write(tmp_path / "lies", tensors, models.w8a8_config())
    with pytest.raises(CheckpointError, match=r"weight_scale has shape \[\], expected \[64, 1\]|shape \[1\], expected"):
        convert(source, tmp_path / "no", Recipe())


def test_zero_points_are_read_only_where_they_are_zero(tmp_path):
    tensors = models.w8a8(masked())
    zeros = {name.replace("scale", "zero_point"): torch.zeros_like(t, dtype=torch.int8) for name, t in tensors.items() if "scale" in name}
    source = models.write(tmp_path / "zeros", tensors | zeros, models.w8a8_config())
    convert(source, tmp_path / "out", Recipe())
    assert not any("zero_point" in name for name in models.read(tmp_path / "out")) and verify(tmp_path / "out", source).ok
    zeros["model.layers.1.mlp.up_proj.weight_zero_point"][7] = 3
    source = models.write(tmp_path / "points", tensors | zeros, models.w8a8_config())
    with pytest.raises(CheckpointError, match=r"layer model\.layers\.1\.mlp\.up_proj has zero points other than 0"):
        convert(source, tmp_path / "no", Recipe())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weights": {"symmetric": False}}, "asymmetric weights"),
        ({"weights": {"num_bits": 4}}, "4-bit int weights"),
        ({"weights": {"strategy": "group"}}, "weights with scales per group"),
        ({"activations": {"symmetric": False}}, "asymmetric activations"),
        ({"activations": {"dynamic": False, "strategy": "tensor"}}, "activations with static scales"),
        ({"activations": {"strategy": "tensor"}}, "activations with scales per tensor"),
        ({"activations": {"type": "float"}}, "weights and activations of different types"),
        ({"activations": None}, "quantised weights with activations that are not"),
        ({"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}, "NVFP4 weights with quantised activations"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: a quantised KV cache"),
        ({"transform_config": {"rotation": {}}}, "transform_config: rotated weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_computed_is_refused_by_its_name(tmp_path, changes, told):
    source = models.write(tmp_path / "w8a8", models.w8a8(masked()), models.w8a8_config(**changes))
    with pytest.raises(CheckpointError, match=rf"config\.json: quantization_config.*{told}.* not supported"):
        convert(source, tmp_path / "out", Recipe())


def test_the_old_key_of_the_configuration_is_read(tmp_path):
    config = models.w8a8_config()
    config["compression_config"] = config.pop("quantization_config")
    source = models.write(tmp_path / "old", models.w8a8(masked()), config)
    convert(source, tmp_path / "out", Recipe(form="dense"))
    assert "compression_config" not in models.config_of(tmp_path / "out") and ignored(tmp_path / "out")
    assert inspect(source).scheme == "int8"


def test_a_leftover_configuration_of_sparsity_quantises_nothing(tmp_path):
    sparsity = {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
    quantization = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity, "version": "0.9.0"}
    source = models.write(tmp_path / "dense", masked(), models.LLAMA | {"quantization_config": quantization})
    convert(source, tmp_path / "out", Recipe())
    assert verify(tmp_path / "out", source).ok and len(inspect(source).layers) == 14


def test_weights_quantised_in_unknown_ways_are_said_to_be(tmp_path):
    codes = {"model.layers.0.self_attn.q_proj.W_q": torch.zeros(4, 4, dtype=torch.uint8)}
    for quantization in ({"group_size": 64, "bits": 4}, {"quant_method": "hqq"}):
        config = models.LLAMA | {"quantization_config": quantization}
        with pytest.raises(CheckpointError, match=r"quantised.*start from the 16-bit checkpoint"):
            inspect(models.write(tmp_path / f"{len(quantization)}", models.llama_tensors() | codes, config))
    with pytest.raises(CheckpointError, match=r"quantised in an unknown way \(quantization: bits, group_size\)"):
        inspect(models.write(tmp_path / "mlx", codes, models.LLAMA | {"quantization": {"group_size": 64, "bits": 4}}))
    source = models.write(tmp_path / "none", None, models.LLAMA | {"quantization_config": None})
    assert len(inspect(source).layers) == 14
    tensors = models.w8a8(masked())
    tensors |= {name: t.bfloat16() for name, t in tensors.items() if t.dtype == torch.int8}
    with pytest.raises(CheckpointError, match=r"is BF16 with .*weight_scale beside it"):
        inspect(models.write(tmp_path / "frozen", tensors, models.w8a8_config()))
    fp8 = {name: t.to(torch.float8_e4m3fn) if "proj" in name else t for name, t in models.llama_tensors().items()}
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is quantised \(F8_E4M3\), but config\.json does not say how"):
        inspect(models.write(tmp_path / "fp8", fp8))


def test_64_bit_weights_are_cast_and_otherwise_named(tmp_path):
    tensors = {name: t.double() if "q_proj" in name else t for name, t in models.llama_tensors().items()}
    source = models.write(tmp_path / "merged", tensors)
    for recipe in (Recipe(SIX, "magnitude", "int8"), Recipe(SIX, "magnitude", form="dense"), Recipe(SIX), Recipe(SIX, form="dense")):
        with pytest.raises(UnsupportedError, match=r"q_proj is float64, .*: cast it first \(slidesparse quantize --scheme bf16\)$"):
            convert(source, tmp_path / "no", recipe)
    convert(source, tmp_path / "cast", Recipe(scheme="bf16", form="dense", obey=False))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(models.read(tmp_path / "cast")[name], tensors[name].bfloat16())
    convert(tmp_path / "cast", tmp_path / "out", Recipe(SIX, "magnitude", "int8"))
    assert {layer.scheme for layer in inspect(source).layers} == {"bf16", "fp64"}
    tensors[name][3, 5] = 1e200
    wide = models.write(tmp_path / "wide", tensors)
    for scheme in ("int8", "fp8", "bf16"):
        with pytest.raises(WeightError, match=r"q_proj: .*row 3, column 5 is inf"):
            convert(wide, tmp_path / "no", Recipe(SIX, scheme=scheme, form="dense", obey=False))


# ---------------------------------------------------------------------------------------------- what the class of model says


def test_layers_that_cannot_stay_are_not_to_be_ignored(tmp_path):
    source = models.write(tmp_path / "w8a8", models.w8a8(models.llama_tensors()), models.w8a8_config())
    with pytest.raises(PatternError, match=r"obeys no pattern.*Prune it$"):
        convert(source, tmp_path / "out", Recipe())


def test_embeddings_of_any_name_and_tied_heads_stored_twice_stay_as_they_are(tmp_path):
    import transformers

    import slidesparse.integrations.transformers  # noqa: F401

    sizes = {"vocab_size": 96, "n_embd": 32, "dff": 48, "n_layer": 1, "n_head": 2, "n_positions": 32}
    transformers.CTRLLMHeadModel(transformers.CTRLConfig(**sizes)).bfloat16().save_pretrained(tmp_path / "ctrl")
    report = convert_with_readers(tmp_path / "ctrl", tmp_path / "ctrl-out", Recipe(SIX, "magnitude"))
    assert "transformer.w" in report.kept_dense and len(report.layers) == 6
    transformers.CTRLLMHeadModel.from_pretrained(tmp_path / "ctrl-out")
    with pytest.raises(UnsupportedError, match=r"transformer\.w is no linear layer of this class"):
        convert_with_readers(tmp_path / "ctrl", tmp_path / "no", Recipe(SIX, "magnitude", only=("transformer.w",)))

    source = tiny.build(tmp_path / "tied", "qwen2")
    tensors = models.read(source)
    models.edit_tensors(source, **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    with pytest.raises(UnsupportedError, match=r"lm_head is tied to another"):
        convert_with_readers(source, tmp_path / "no", Recipe(SIX, "magnitude", only=("lm_head", "*")))
    convert_with_readers(source, tmp_path / "out", Recipe(SIX, "magnitude"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_classifier_on_a_packed_body_is_saved_and_loaded_again(tmp_path):
    from transformers import AutoModelForSequenceClassification

    import slidesparse.integrations.transformers  # noqa: F401

    convert(tiny.build(tmp_path / "dense"), tmp_path / "packed", Recipe(SIX, "magnitude", "int8"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=3)
    model.score.weight.data.normal_()
    model.save_pretrained(tmp_path / "saved")
    assert "score" in ignored(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.score.weight, model.score.weight)


def test_tensors_without_a_place_in_the_class_stay_as_they_are(tmp_path):
    source = tiny.build(tmp_path / "dense")
    lora = "model.layers.0.self_attn.q_proj.lora_A"
    models.edit_tensors(source, **{f"{lora}.weight": torch.randn(8, 32).bfloat16()})
    report = convert_with_readers(source, tmp_path / "out", Recipe(SIX, "magnitude", "int8"))
    assert lora in report.kept_dense and len(report.layers) == 14
    other = models.config_of(source) | {"architectures": ["GPT2LMHeadModel"], "model_type": "llama"}
    assert len(convert_with_readers(models.write(tmp_path / "other", None, other), tmp_path / "b", Recipe(SIX, "magnitude")).layers) == 14


def test_what_the_class_asks_for_and_does_not_find_is_named(tmp_path):
    source = models.write(tmp_path / "headless", None, models.LLAMA | {"intermediate_size": 100, "tie_word_embeddings": False})
    assert convert_with_readers(source, tmp_path / "out", Recipe(SIX, "magnitude", form="dense")).missing == ["lm_head.weight"]


def test_experts_left_in_16_bits_are_told_by_the_names_that_vllm_asks_for(tmp_path):
    stack = "model.layers.0.block_sparse_moe.experts"
    for i, names in enumerate((["0.w1.weight", "0.w2.weight", "0.w3.weight", "1.w1.weight"], ["gate_up_proj", "down_proj"])):
        experts = {f"{stack}.{name}": torch.randn((8, 64) if "weight" in name else (2, 8, 64)).bfloat16() for name in names}
        source = models.write(tmp_path / f"{i}", models.llama_tensors() | experts)
        convert(source, tmp_path / f"twin{i}", Recipe(SIX, "magnitude", "int8", "dense"))
        assert {f"{stack}.0.{part}_proj" for part in ("gate", "up", "down")} <= set(ignored(tmp_path / f"twin{i}"))
        assert verify(tmp_path / f"twin{i}").ok


# ---------------------------------------------------------------------------------------------- what lies beside the weights


def test_folders_go_along_and_weights_that_are_not_read_are_named(tmp_path):
    source = models.write(tmp_path / "dense")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    (source / ".cache/huggingface").mkdir(parents=True)
    (source / "onnx").mkdir()
    shard = "model.fp16-00001-of-00001.safetensors"
    for name in ("pytorch_model.bin", "onnx/model.onnx", "adapter_model.safetensors", shard):
        (source / name).write_bytes(b"weights")
    index = "model.safetensors.index.fp16.json"  # of a variant: what it names are no further modules
    (source / index).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    (source / "labels.index.json").write_text("{}")
    report = convert(source, tmp_path / "out", Recipe(SIX, "magnitude"))
    assert report.left_out == ["adapter_model.safetensors", shard, index, "onnx", "pytorch_model.bin"]
    assert (tmp_path / "out/labels.index.json").exists()
    assert (tmp_path / "out/additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    assert not any((tmp_path / "out" / name).exists() for name in (*report.left_out, ".cache"))
    (source / "additional_chat_templates/gone.jinja").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"gone\.jinja is a link"):
        convert(source, tmp_path / "no", Recipe(SIX, "magnitude"))


def test_an_interrupted_run_leaves_no_folder_in_the_way(tmp_path, monkeypatch):
    source = models.write(tmp_path / "dense")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text("{}")

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slidesparse.checkpoint.staging.Staging.commit", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", Recipe(SIX, "magnitude"))
    monkeypatch.undo()
    assert (tmp_path / "out.incomplete/1_Pooling").is_dir()
    convert(source, tmp_path / "out", Recipe(Pattern.parse("4:6"), "magnitude"), overwrite=True)
    assert (tmp_path / "out/1_Pooling/config.json").is_file() and not (tmp_path / "out.incomplete").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ignore": ["re:*foo"]}, r"'re:\*foo' is no layer's name and no regular expression"),
        ({"ignore": [1]}, "1 is no layer's name"),
        ({"config_groups": {"group_0": {"weights": "int8"}}}, "weights is 'int8', which describes no scheme"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": [8]}}}}, "describes no scheme"),
    ],
)
def test_a_quantization_config_that_cannot_be_meant_is_one_line(tmp_path, change, told):
    source = models.write(tmp_path / "model", models.w8a8(models.llama_tensors()))
    config = models.config_of(source)
    base = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": base | change}))
    with pytest.raises(CheckpointError, match=told):
        convert(source, tmp_path / "out", Recipe(Pattern(6, 8), "magnitude"))


def test_a_class_that_cannot_be_built_stands_in_nobodys_way(tmp_path):
    source = models.write(tmp_path / "model", models.llama_tensors())
    config = models.config_of(source)
    (source / "config.json").write_text(json.dumps(config | {"pad_token_id": config["vocab_size"]}))
    convert_with_readers(source, tmp_path / "out", Recipe(Pattern(6, 8), "magnitude"))


def test_folders_behind_links_are_left_and_named(tmp_path):
    source = models.write(tmp_path / "model", models.llama_tensors())
    (source / "extra").mkdir()
    (source / "extra" / "up").symlink_to("..")
    report = convert(source, tmp_path / "out", Recipe(Pattern(6, 8), "magnitude"))
    assert report.left_out == ["extra"] and not (tmp_path / "out" / "extra").exists()
