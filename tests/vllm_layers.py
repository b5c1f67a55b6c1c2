"""Layers of vLLM with parts of checkpoints to load into them; importing it needs vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.config import DeviceConfig, LoadConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

import models
from slidesparse import reference
from slidesparse.checkpoint import Recipe, convert
from slidesparse.format import MARKER, SCHEMES, PackedConfig, Scheme
from slidesparse.integrations import vllm as adapter
from slidesparse.packing import pack
from slidesparse.pattern import Pattern
from slidesparse.pruning import prune
from slidesparse.quantization import quantize_weight

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
DTYPE = torch.bfloat16


@dataclass
class Part:
    """One linear of a checkpoint: stored dense weights and what stands for them packed."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    pattern: Pattern

    def tensors(self, form: str) -> dict[str, Tensor]:
        """By suffix, in the packed or the dense form."""
        found = {"weight": self.weight}
        if form == "packed":
            packed = pack(self.weight, self.pattern)
            found = {"weight_values": packed.values, "weight_keep": packed.keep}
        if self.scale is not None:
            found["weight_scale"] = self.scale
        return found if self.bias is None else found | {"bias": self.bias}


def part(n: int, k: int, scheme: Scheme, pattern: str = "6:8", *, bias: bool = False) -> Part:
    weight, scale = quantize_weight(prune(torch.randn(n, k).to(DTYPE) * k**-0.5, Pattern.parse(pattern)), scheme)
    return Part(weight, scale, torch.randn(n).to(DTYPE) if bias else None, Pattern.parse(pattern))


def config_of(form: str, scheme: str, pattern: str = "6:8", **marker: object) -> adapter.SlideSparseConfig:
    """What vLLM makes of config.json."""
    if form == "packed":
        made = adapter.SlideSparseConfig.from_config(PackedConfig(Pattern.parse(pattern), SCHEMES[scheme], ["lm_head"]).to_dict() | marker)
    elif SCHEMES[scheme].dynamic:
        made = adapter.SlideSparseConfig.from_config(compressed_tensors(scheme) | {MARKER: {"pattern": pattern} | marker})
    else:
        made = adapter.SlideSparseConfig()
        made.maybe_update_config("", hf_config=type("Config", (), {MARKER: {"pattern": pattern} | marker}))
    made.packed_modules_mapping = MERGED
    return made


def compressed_tensors(scheme: str, strategy: str = "channel") -> dict:
    kind = "int" if scheme == "int8" else "float"
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": weights | {"strategy": "token", "dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def load(layer: nn.Module, parts: dict[object, Part], form: str) -> None:
    """Give a layer its tensors as a model's ``load_weights`` does, then let the method process them."""
    for shard_id, one in parts.items():
        for suffix, tensor in one.tensors(form).items():
            parameter = getattr(layer, suffix)
            parameter.weight_loader(parameter, tensor, *(() if shard_id is None else (shard_id,)))
    layer.quant_method.process_weights_after_loading(layer)


def oracle(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, scheme: Scheme, out: torch.dtype = DTYPE) -> Tensor:
    q, x_scale = reference.quantize(x, scheme) if scheme.dynamic else (x, None)
    return reference.linear(q, x_scale, weight, scale, bias, out)


def model_config(folder: Path) -> VllmConfig:
    """What vLLM knows of a small packed int8 model, which is written into the folder."""
    models.write(folder / "source")
    convert(folder / "source", folder / "packed", Recipe(Pattern(6, 8), "magnitude", "int8"))
    model = EngineArgs(model=str(folder / "packed"), skip_tokenizer_init=True, enforce_eager=True).create_model_config()
    device = DeviceConfig(device="cuda" if torch.cuda.is_available() else "cpu")
    return VllmConfig(model_config=model, device_config=device, load_config=LoadConfig())


@contextmanager
def alone(folder: Path, rank: Callable) -> Iterator[VllmConfig]:
    """`model_config`, in force, on a rank that is alone; ``rank`` is the fixture of that name."""
    rank(0, 1)
    adapter.register()
    made = model_config(folder)
    with set_current_vllm_config(made):
        yield made
