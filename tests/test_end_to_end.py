"""Converted checkpoints of many architectures in transformers: the packed model computes what the masked dense one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slidesparse import reference
from slidesparse.checkpoint import Recipe, convert, verify
from slidesparse.nn import SlideSparseLinear, pack_model
from slidesparse.pattern import Pattern

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIX, FOURTEEN = Pattern.parse("6:8"), Pattern.parse("14:16")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,  # random models end texts where they please
}
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-bias": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {}),
    "bitnet": ("BitNetConfig", {}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "mamba": ("MambaConfig", {"state_size": 8, "intermediate_size": 128}),
}


def build(path: Path, name: str, **save: object) -> Path:
    """A random model of an architecture, saved as the hub has it."""
    kind, extra = ARCHITECTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SMALL | extra), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if parameter.dim() == 1 else 0))
            if name == "bitnet" and parameter.dim() == 2:
                parameter.copy_(reference.prune(parameter, FOURTEEN))  # natural zeros enough for 14:16
    model.save_pretrained(path, **save)
    return path


def load(path: Path) -> torch.nn.Module:
    import slidesparse.integrations.transformers

    assert slidesparse.integrations.transformers
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def tokens() -> torch.Tensor:
    return torch.randint(3, 128, (2, 9))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bitnet"])
def test_sixteen_bit_logits_are_those_of_the_masked_model(tmp_path, name):
    source = build(tmp_path / "dense", name)
    convert(source, tmp_path / "masked", Recipe(SIX, "magnitude", form="dense"))
    convert(source, tmp_path / "packed", Recipe(SIX, "magnitude", "bf16"))
    masked, packed = load(tmp_path / "masked"), load(tmp_path / "packed")
    for module in masked.modules():
        if isinstance(module, torch.nn.Linear):
            # Sums on a CPU depend on how their input lies in memory, and packed layers take one way only.
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    layers = [module for module in packed.modules() if isinstance(module, SlideSparseLinear)]
    assert len(layers) >= (8 if "moe" in name else 7 if name == "phi3" else 8)
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(masked(ids).logits, packed(ids).logits)
    assert torch.equal(masked.generate(ids, max_new_tokens=4, do_sample=False), packed.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["llama-tied-bias", "qwen3", "phi3"])
def test_eight_bit_models_generate_and_stay_close(tmp_path, name, scheme):
    source = build(tmp_path / "dense", name, max_shard_size="60KB")
    assert (source / "model.safetensors.index.json").exists()
    convert(source, tmp_path / "masked", Recipe(SIX, "magnitude", form="dense"))
    convert(source, tmp_path / "packed", Recipe(SIX, "magnitude", scheme))
    assert verify(tmp_path / "packed", tmp_path / "masked").ok
    masked, packed, ids = load(tmp_path / "masked"), load(tmp_path / "packed"), tokens()
    with torch.no_grad():
        want, got = masked(ids).logits.float(), packed(ids).logits.float()
    error = (want - got).norm() / want.norm()
    assert 0 < error < (0.25 if scheme == "int8" else 0.4), error  # a wrong layer would give about 1.4
    assert packed.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 13)


def test_dense_twin_through_compressed_tensors_is_packed_in_memory(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    source = build(tmp_path / "dense", "llama")
    convert(source, tmp_path / "twin", Recipe(SIX, "magnitude", "int8", form="dense"))
    convert(tmp_path / "twin", tmp_path / "packed", Recipe())
    twin, packed = load(tmp_path / "twin"), load(tmp_path / "packed")
    pack_model(twin)
    mine, theirs = ({name: m for name, m in model.named_modules() if isinstance(m, SlideSparseLinear)} for model in (packed, twin))
    assert len(mine) == 14 and mine.keys() == theirs.keys()
    for name, layer in mine.items():
        assert torch.equal(layer.weight_values, theirs[name].weight_values) and torch.equal(layer.weight_keep, theirs[name].weight_keep)
        # transformers rounds a twin's float32 scales to the model's type while it loads.
        assert torch.equal(layer.weight_scale.bfloat16().float(), theirs[name].weight_scale)


@pytest.mark.parametrize("kind", ["autobitlinear", "bitlinear", "master"])
def test_bitnet_keeps_its_function_and_generates(tmp_path, kind):
    """Against the same ternary weights in float32; the pattern removes none of them, so only activations are rounded."""
    source = build(tmp_path / "dense", "bitnet")
    config = json.loads((source / "config.json").read_text())
    if kind == "master":
        config["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
        (source / "config.json").write_text(json.dumps(config))
    else:
        _pack_ternary(source, config, kind)
    report = convert(source, tmp_path / "packed", Recipe(FOURTEEN, "magnitude", "int8"))
    verdict = verify(tmp_path / "packed", source)
    assert len(report.layers) == 14 and verdict.ok and not any(layer.masked_away for layer in verdict.layers)
    packed, ids = load(tmp_path / "packed"), tokens()
    assert any("sub_norm" in name for name, _ in packed.named_modules())
    exact = _ternary_reference(tmp_path / "dense", kind)
    with torch.no_grad():
        want, got = exact(ids).logits.float(), packed(ids).logits.float()
    assert (want - got).norm() / want.norm() < 0.25
    assert packed.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 13)


def _pack_ternary(source: Path, config: dict, linear_class: str) -> None:
    """Rewrite a master checkpoint as the hub's packed ternary files."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors[name].float()
        scale = weight.abs().mean()
        codes = ((weight / scale).round().clamp(-1, 1) + 1).to(torch.uint8).view(4, -1, weight.shape[1])
        tensors[name] = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
        tensors[f"{name}_scale"] = (1 / scale if linear_class == "bitlinear" else scale).reshape(1).float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    (source / "config.json").write_text(json.dumps(config))


def _ternary_reference(source: Path, kind: str) -> torch.nn.Module:
    """The BitNet model with its ternary weights written out as float32; activations are not quantised."""
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    model = transformers.AutoModelForCausalLM.from_config(transformers.BitNetConfig(**config), dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            continue
        state[name] = tensor.float()
        if "proj" not in name:
            continue
        if kind == "master":
            scale = tensor.float().abs().mean()
            state[name] = (tensor.float() / scale).round().clamp(-1, 1) * scale
        else:
            scale = tensors[f"{name}_scale"]
            codes = torch.cat([tensor >> shift & 3 for shift in (0, 2, 4, 6)]).float() - 1
            state[name] = codes / scale if kind == "bitlinear" else codes * scale
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.eval()
