"""A packed model that was changed in memory: what it is saved as is true and loads again, and the way back to a dense one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import slidesparse
import tiny
from architectures import ARCHITECTURES, apart, load, outputs
from slidesparse import Pattern, Recipe, convert, pack_model, restore_model, verify
from slidesparse.errors import PatternError, UnsupportedError
from slidesparse.nn import SlideSparseLinear
from slidesparse.pruning import prune
from slidesparse.tolerance import check_bitwise

IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1]])


def packed_model(folder: Path, scheme: str | None = None, **recipe: object):
    """A tiny Llama with a head of its own, packed, as from_pretrained gives it."""
    import slidesparse.integrations.transformers  # noqa: F401

    tiny.build(folder / "dense")
    convert(folder / "dense", folder / "packed", Recipe(tiny.SIX, "magnitude", scheme, **recipe))
    return AutoModelForCausalLM.from_pretrained(folder / "packed")


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SlideSparseLinear)]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def again(model, folder: Path):
    model.save_pretrained(folder)
    found, told = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    return found


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_dequantize_gives_the_masked_model(scheme: str | None, tmp_path: Path) -> None:
    model = packed_model(tmp_path, scheme)
    before, weights = logits(model), {name: model.get_submodule(name).weight for name in packed_layers(model)}
    assert model.dequantize() is model and not packed_layers(model) and not hasattr(model.config, "quantization_config")
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is nn.Linear
        check_bitwise(model.get_submodule(name).weight.detach(), weight.as_subclass(torch.Tensor))
    assert apart(before.float(), logits(model).float()) <= (0.1 if scheme else 0.0)
    saved = again(model, tmp_path / "saved")
    check_bitwise(logits(saved), logits(model))
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    model.model.layers[0].mlp.up_proj.weight.requires_grad_()  # it can be trained
    model(IDS).logits.sum().backward()


def test_restore_model_shares_what_was_shared() -> None:
    layer = SlideSparseLinear.from_dense(torch.zeros(8, 16, dtype=torch.bfloat16), pattern="6:8", scheme="bf16")
    model = restore_model(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2] and type(model[0]) is nn.Linear and model[0].weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dense_weight"):
        restore_model(layer)


def test_a_restored_model_is_a_plain_one_to_transformers(tmp_path: Path) -> None:
    model = restore_model(packed_model(tmp_path))
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")
    assert getattr(model, "hf_quantizer", None) is None and getattr(model, "quantization_method", None) is None
    assert model.half().model.layers[0].mlp.up_proj.weight.dtype == torch.float16


@torch.no_grad()
def packed_in_memory(name: str, patterns: dict[str, str]):
    """A model as its class makes it, layers masked by the pattern of the first part of a name that fits, and packed."""
    model = ARCHITECTURES[name].build()
    for layer, module in model.named_modules():
        pattern = next((Pattern.parse(text) for part, text in patterns.items() if part in layer), None)
        if pattern is not None and isinstance(module, nn.Linear):
            module.weight.copy_(prune(module.weight, pattern))
    return pack_model(model, ignore=("*lm_head", "*vision*", "*projector*"))


def test_layers_of_a_model_packed_in_memory_put_back(tmp_path: Path) -> None:
    import slidesparse.integrations.transformers  # noqa: F401

    model = packed_in_memory("llama", {"q_proj": "2:4", "": "6:8"})
    restore_model(model, only=["*q_proj"])
    saved = again(model, tmp_path / "saved")
    assert packed_layers(saved) == packed_layers(model) and not any("q_proj" in name for name in packed_layers(saved))
    assert not quantization(tmp_path / "saved")["overrides"]
    check_bitwise(logits(saved), logits(model))


def test_packed_in_memory_and_saved_under_the_names_of_files(tmp_path: Path) -> None:
    import slidesparse.integrations.transformers  # noqa: F401

    model = packed_in_memory("llava", {"q_proj": "2:4", "": "8:10"})
    model.save_pretrained(tmp_path)
    told = quantization(tmp_path)
    assert told["overrides"] and told["in_features"], "a layer of another pattern, and a ragged one"
    assert verify(tmp_path).ok
    llava = ARCHITECTURES["llava"]
    check_bitwise(outputs(load(llava, tmp_path), llava), outputs(model, llava))


def test_a_dense_layer_put_back(tmp_path: Path) -> None:
    model = packed_model(tmp_path, "int8")
    name = "model.layers.1.mlp.down_proj"
    model.model.layers[1].mlp.down_proj = nn.Linear(52, 32, bias=False, dtype=torch.bfloat16)
    saved = again(model, tmp_path / "saved")
    assert name in quantization(tmp_path / "saved")["ignore"] and name not in quantization(tmp_path / "saved")["in_features"]
    assert name not in packed_layers(saved) and len(packed_layers(saved)) == 13
    check_bitwise(logits(saved), logits(model))


def test_a_layer_of_another_pattern_put_in(tmp_path: Path) -> None:
    model = packed_model(tmp_path)
    model.model.layers[0].mlp.up_proj = SlideSparseLinear.from_dense(
        torch.eye(52, 32).bfloat16(), pattern=Pattern.parse("2:4"), scheme="bf16"
    )
    saved = again(model, tmp_path / "saved")
    assert quantization(tmp_path / "saved")["overrides"] == {"model.layers.0.mlp.up_proj": "2:4"}
    check_bitwise(logits(saved), logits(model))
    model.model.layers[0].mlp.up_proj = SlideSparseLinear.from_dense(torch.eye(52, 32).bfloat16(), pattern="2:4", scheme="int8")
    with pytest.raises(UnsupportedError, match="bf16 and int8: this model has no packed form"):
        model.save_pretrained(tmp_path / "no")


@pytest.mark.parametrize("head", ["dense", "packed", "tied"])
def test_resized_embeddings(head: str, tmp_path: Path) -> None:
    if head == "tied":
        import slidesparse.integrations.transformers  # noqa: F401

        convert(tiny.build(tmp_path / "dense", "qwen2"), tmp_path / "packed", Recipe(tiny.SIX, "magnitude"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    else:
        model = packed_model(tmp_path, only=("lm_head", "*") if head == "packed" else ())
    restore_model(model, only=("lm_head",))  # transformers takes a plain linear only
    model.resize_token_embeddings(tiny.WORDS + 8)
    saved = again(model, tmp_path / "saved")
    assert saved.config.vocab_size == tiny.WORDS + 8 and logits(saved).shape[-1] == tiny.WORDS + 8
    assert "lm_head" not in packed_layers(saved)
    check_bitwise(logits(saved), logits(model))


def test_a_body_alone(tmp_path: Path) -> None:
    model = packed_model(tmp_path, overrides={"*.down_proj": Pattern.parse("8:10")})
    body = AutoModel.from_pretrained(tmp_path / "packed")
    saved = again(body, tmp_path / "saved")
    with torch.no_grad():
        check_bitwise(saved(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "part"), [("llama", "model"), ("llava", "model.language_model"), ("qwen2-vl", "model.visual"), ("t5", "encoder")]
)
def test_a_model_inside_saved_alone(name: str, part: str, tmp_path: Path) -> None:
    import slidesparse.integrations.transformers  # noqa: F401

    architecture = ARCHITECTURES[name]
    architecture.build().save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", Recipe(Pattern.parse("4:6"), "magnitude", "int8"))  # ragged, so names are told
    model = load(architecture, tmp_path / "packed")
    inner = model.get_submodule(part)
    saved = again(inner, tmp_path / "inner")
    assert packed_layers(saved) == packed_layers(inner) and verify(tmp_path / "inner").ok
    for key, tensor in inner.state_dict().items():
        check_bitwise(saved.state_dict()[key], tensor)
    model.save_pretrained(tmp_path / "saved")
    told = json.loads((tmp_path / "saved/config.json").read_text())
    assert told.pop("quantization_config") == quantization(tmp_path / "packed") and "quantization_config" not in json.dumps(told)
    check_bitwise(outputs(load(architecture, tmp_path / "saved"), architecture), outputs(model, architecture))


@pytest.mark.parametrize("name", ["mixtral", "qwen2-vl", "gemma3", "t5", "llama4-text"])
def test_saved_again_under_the_names_of_files(name: str, tmp_path: Path) -> None:
    import slidesparse.integrations.transformers  # noqa: F401

    architecture = ARCHITECTURES[name]
    architecture.build().save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", Recipe(tiny.SIX, "magnitude", "int8"))
    model = load(architecture, tmp_path / "packed")
    model.save_pretrained(tmp_path / "saved")
    assert quantization(tmp_path / "saved") == quantization(tmp_path / "packed")
    check_bitwise(outputs(load(architecture, tmp_path / "saved"), architecture), outputs(model, architecture))


def test_a_twin_that_was_changed_does_not_load_half_dense(tmp_path: Path) -> None:
    tiny.build(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "twin", Recipe(tiny.SIX, "magnitude", form="dense"))
    (file,) = (tmp_path / "twin").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][3, :8] = 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PatternError, match=r"layer model\.layers\.0\.mlp\.down_proj: row 3, group 0"):
        slidesparse.load(tmp_path / "twin", tokenizer=False)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_twin_names_what_it_leaves_alone_as_the_files_do(scheme: str | None, tmp_path: Path) -> None:
    ARCHITECTURES["gemma3"].build().save_pretrained(tmp_path / "dense")
    recipe = Recipe(tiny.SIX, "magnitude", scheme, form="dense", ignore=("vision_tower.*",))
    convert(tmp_path / "dense", tmp_path / "twin", recipe)
    model, _ = slidesparse.load(tmp_path / "twin", tokenizer=False)
    assert packed_layers(model) and not any("vision_tower" in name for name in packed_layers(model))
