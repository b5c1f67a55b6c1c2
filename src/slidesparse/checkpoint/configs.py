"""config.json of what we write: the packed form, the portable dense twin, and masked 16-bit checkpoints."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from ..format import BLOCK, MARKER, PackedConfig
from ..pattern import Pattern
from .recipe import LayerPlan, Recipe
from .source import Checkpoint

_COMPRESSED_FORMAT = {"int8": "int-quantized", "fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized"}

_CONFIG_DTYPE = {"bf16": "bfloat16", "fp16": "float16"}


def output_config(checkpoint: Checkpoint, recipe: Recipe, plans: list[LayerPlan]) -> dict[str, Any]:
    """The output's config.json."""
    config = copy.deepcopy(checkpoint.config)
    config.pop(MARKER, None)
    config.pop("quantization_config", None)
    converted = {plan.layer.name for plan in plans}
    ignore = [name for name in checkpoint.layers if name not in converted]
    # A tied head has no tensor of its own, yet a loader must know that it stays dense.
    ignore += [] if "lm_head" in converted or "lm_head" in ignore else ["lm_head"]
    pattern, overrides = _common_pattern(plans)
    scheme = plans[0].scheme
    if scheme.name in _CONFIG_DTYPE and any(plan.scheme is not plan.layer.scheme for plan in plans):
        # The weights' new type is the model's: a loader would cast them, or all activations, from the old one.
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            config[key] = _CONFIG_DTYPE[scheme.name]
    if recipe.form == "packed":
        ragged = {p.layer.name: p.layer.k for p in plans if p.layer.k % (p.pattern.group * p.pattern.unit)}
        config["quantization_config"] = PackedConfig(pattern, scheme, ignore, overrides, ragged).to_dict()
        return config
    marker: dict[str, Any] = {"pattern": str(pattern), "overrides": {name: str(p) for name, p in overrides.items()}, "ignore": ignore}
    if scheme.name in _COMPRESSED_FORMAT:
        config["quantization_config"] = _compressed_tensors(scheme.name, ignore)
        if pattern is not None:
            config["quantization_config"][MARKER] = marker
    elif pattern is not None:
        config[MARKER] = marker
    return config


def _common_pattern(plans: list[LayerPlan]) -> tuple[Pattern | None, dict[str, Pattern]]:
    """The pattern most weights obey, and the layers that obey another."""
    if any(plan.pattern is None for plan in plans):
        return None, {}
    weights: Counter[Pattern] = Counter()
    for plan in plans:
        weights[plan.pattern] += plan.layer.n * plan.layer.k
    common = weights.most_common(1)[0][0]
    return common, {plan.layer.name: plan.pattern for plan in plans if plan.pattern != common}


def _compressed_tensors(name: str, ignore: list[str]) -> dict[str, Any]:
    """W8A8 or NVFP4A16 as llm-compressor writes it (compressed-tensors 0.17 and later)."""
    kind = "int" if name == "int8" else "float"
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "group_size": None, "strategy": "channel", "dynamic": False}
    activations: dict[str, Any] | None = weights | {"strategy": "token", "dynamic": True}
    if name == "nvfp4":
        weights |= {"num_bits": 4, "group_size": BLOCK, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        activations = None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": _COMPRESSED_FORMAT[name],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "ignore": ignore,
    }
