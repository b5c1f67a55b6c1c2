"""Small checkpoint directories made of random tensors, in the hub's layout, without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slidesparse.quantization import quantize_weight

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_tensors(
    dtype: torch.dtype = torch.bfloat16, *, hidden: int = 64, inner: int = 100, layers: int = 2, bias: bool = False
) -> dict[str, Tensor]:
    """Weights of a small Llama: ``inner`` = 100 makes the last group of down_proj ragged for 6:8."""
    tensors = {"model.embed_tokens.weight": torch.randn(96, hidden), "model.norm.weight": torch.ones(hidden)}
    for i in range(layers):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(shape) * 0.1
            if bias and name.startswith("self_attn") and "o_proj" not in name:
                tensors[f"model.layers.{i}.{name}.bias"] = torch.randn(shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def fitting(tensors: dict[str, Tensor]) -> dict:
    """The configuration of a Llama with these weights."""
    up = tensors.get("model.layers.0.mlp.up_proj.weight")
    return LLAMA if up is None else LLAMA | {"intermediate_size": up.shape[0], "hidden_size": up.shape[1]}


def write(path: Path, tensors: dict[str, Tensor] | None = None, config: dict | None = None, shards: int = 1) -> Path:
    """Write a checkpoint directory with a tokenizer-like side file."""
    tensors = llama_tensors() if tensors is None else tensors
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(fitting(tensors) | {"dtype": "bfloat16"} if config is None else config))
    (path / "tokenizer.json").write_text('{"side": "file"}')
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = list(tensors)
    weight_map = {name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, path / shard, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return path


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory, through the safetensors library."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def config_of(path: Path) -> dict:
    """config.json."""
    return json.loads((path / "config.json").read_text())


def edit_config(path: Path, **changes: object) -> None:
    """Change keys of ``quantization_config``."""
    config = config_of(path)
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, **changes: Tensor) -> None:
    """Rewrite model.safetensors with some tensors replaced."""
    tensors = read(path) | changes
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def w8a8(tensors: dict[str, Tensor], leave: tuple[str, ...] = (), kind: str = "int8") -> dict[str, Tensor]:
    """The same tensors with their linear layers in 8 bits, as llm-compressor stores them; heads and experts too, all but ``leave``."""
    out = dict(tensors)
    for name, weight in tensors.items():
        layer = name.removesuffix(".weight")
        if weight.dim() == 2 and "embed" not in name and not name.endswith("mlp.gate.weight") and layer not in leave:
            out[name], out[f"{layer}.weight_scale"] = quantize_weight(weight, kind)
    return out


def w8a8_config(ignore: tuple[str, ...] = ("lm_head",), kind: str = "int8", **changes: object) -> dict:
    """config.json of such a checkpoint; ``changes`` of its weights (``weights=…``), activations, or of quantization_config."""
    values = {"num_bits": 8, "type": "int" if kind == "int8" else "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    weights = values | changes.pop("weights", {})
    activations = changes.pop("activations", {})
    activations = None if activations is None else values | {"strategy": "token", "dynamic": True} | activations
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    return LLAMA | {"dtype": "bfloat16", "quantization_config": quantization | {"ignore": list(ignore)} | changes}
