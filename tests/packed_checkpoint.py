"""Writing small checkpoints for the tests: random models, masked and packed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slidesparse.format import SCHEMES, PackedConfig
from slidesparse.packing import pack
from slidesparse.pattern import Pattern
from slidesparse.pruning import prune
from slidesparse.quantization import nvfp4_global_scale, quantize_nvfp4, quantize_weight
from slidesparse.select import matches

Tensors = dict[str, torch.Tensor]


@dataclass
class Written:
    """What was written: the masked dense model, and the tensors and configuration of its packed form."""

    model: PreTrainedModel
    tensors: Tensors
    config: PackedConfig
    directory: Path
    layers: list[str] = field(default_factory=list)


def random_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with weights large enough for its logits to differ from token to token."""
    # Not .to(dtype), which would round the rotary embedding's frequencies too.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3)
    return model


def write(
    config: PretrainedConfig,
    directory: Path,
    *,
    scheme: str = "bf16",
    pattern: str = "6:8",
    overrides: dict[str, str] | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    shards: int = 1,
    change: Callable[[Tensors, dict], None] | None = None,
) -> Written:
    """A random model of this configuration, its linear layers masked in memory and packed in ``directory``.

    ``overrides`` maps globs to patterns; ``change`` may damage tensors and config.json before they are written.
    """
    kind, dtype = SCHEMES[scheme], torch.float16 if scheme == "fp16" else torch.bfloat16
    model = random_model(config, dtype)
    packed = PackedConfig(Pattern.parse(pattern), kind, list(ignore))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for target in model.all_tied_weights_keys:
        tensors.pop(target, None)
    written = Written(model, tensors, packed, directory)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or matches(name, list(ignore)) or f"{name}.weight" not in tensors:
            continue
        for glob, text in (overrides or {}).items():
            if matches(name, [glob]):
                packed.overrides[name] = Pattern.parse(text)
        own = packed.pattern_of(name)
        if module.in_features % (own.group * own.unit):
            packed.in_features[name] = module.in_features
        module.weight.data = prune(module.weight.data, own)
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in pack_layer(module.weight.data, own, scheme).items()})
        written.layers.append(name)
    save(written, shards, change)
    return written


def pack_layer(weight: torch.Tensor, pattern: Pattern, scheme: str) -> Tensors:
    """The stored tensors of one masked layer."""
    kind, scales = SCHEMES[scheme], {}
    if kind.pair:
        global_scale = torch.tensor([nvfp4_global_scale(float(weight.float().abs().max()))])
        values, scales["weight_scale"] = quantize_nvfp4(weight, float(global_scale))
        scales["weight_global_scale"] = global_scale
    else:
        values, scale = quantize_weight(weight, kind)
        scales = {} if scale is None else {"weight_scale": scale}
    stored = pack(values, kind.pattern_stored(pattern))
    return {"weight_values": stored.values, "weight_keep": stored.keep, **scales}


def save(written: Written, shards: int = 1, change: Callable[[Tensors, dict], None] | None = None) -> None:
    """Write tensors and config.json."""
    config = json.loads(written.model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(written.model).__name__]
    config["dtype"] = str(written.model.dtype).removeprefix("torch.")
    config["quantization_config"] = written.config.to_dict()
    tensors = dict(written.tensors)
    if change is not None:
        change(tensors, config)
    written.directory.mkdir(parents=True, exist_ok=True)
    (written.directory / "config.json").write_text(json.dumps(config))
    names, index = sorted(tensors), {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        # Round robin, so that the tensors of one layer lie in different shards.
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        index |= dict.fromkeys(part, file)
        save_file(part, written.directory / file, metadata={"format": "pt"})
    if shards > 1:
        (written.directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
