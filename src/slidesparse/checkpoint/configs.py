"""config.json of what we write, from the tensors that lie in the files: the packed form, the portable dense twin, masked checkpoints."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ..errors import CheckpointError, UnsupportedError
from ..format import BLOCK, MARKER, SCHEMES, PackedConfig
from ..pattern import Pattern
from ..select import NOT_LINEAR, matches
from .formats.compressed_tensors import METHOD, NO_LAYER
from .layers import FLOATS, matrices
from .recipe import LayerPlan, Recipe
from .source import Checkpoint
from .tensorfile import DTYPE_NAMES, TensorInfo

_COMPRESSED_FORMAT = {"int8": "int-quantized", "fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized"}

_EXPERTS = re.compile(r"(.+\.experts)(?:\.0)?\.\w+(?<!_scale)(?<!_bias)(?:\.weight)?")
"""Weights of a first expert, or of all in one tensor."""

_CONFIG_DTYPE = {"bf16": "bfloat16", "fp16": "float16"}


def same_name(module: str, entry: str) -> bool:
    """How compressed-tensors matches a module with an entry of ``targets`` or ``ignore``: the whole name, or ``re:`` at its start."""
    return re.match(entry[3:], module) is not None if entry.startswith("re:") else module == entry


@dataclass(frozen=True)
class Reader:
    """How others will read a checkpoint.

    ``modules`` are the linear ones by their names there, with their names in the files; ``match`` is how names are matched; ``fixed`` are
    layers, by their names in the files, that have to stay as they are, each with what it is; ``heads`` are those behind the body of the
    model; ``merged`` are parts of one tensor there, as experts are; ``split`` are modules that hold merged tensors in these files, and
    single layers where weights are quantised; ``unplaced`` are tensors that have no place there, ``missing`` ones that are asked for;
    ``shapes`` are N and K of the linear modules, ``placed`` the shapes of other tensors, by their names in the files.
    """

    modules: Mapping[str, str]
    match: Callable[[str, str], bool] = same_name
    fixed: Mapping[str, str] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()
    merged: frozenset[str] = frozenset()
    split: tuple[str, ...] = ()
    unplaced: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    placed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


FindReader = Callable[[dict[str, Any], list[str]], Reader | None]
"""Called with config.json and the names of the tensors; None where the class of model is not known."""


def of_class(reader: Reader | None) -> TypeGuard[Reader]:
    """Whether the class of model is known, and the files are its own."""
    return reader is not None and bool(reader.modules)


def stored_layers(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, str], list[str]]:
    """Matrices as they lie in the files: those with scales, with the name of their scheme, and those in floating point without."""
    quantised: dict[str, str] = {}
    floating: list[str] = []
    schemes = {DTYPE_NAMES[scheme.dtype]: name for name, scheme in SCHEMES.items()}
    sparse = (
        (name.removesuffix(".compressed").removesuffix(".weight"), "", info)
        for name, info in tensors.items()
        if name.endswith(".compressed")
    )
    for name, _, info in (*matrices(tensors), *sparse):
        if f"{name}.weight_scale" in tensors:
            quantised[name] = schemes.get(info.dtype_name, info.dtype_name)
        elif info.dtype_name in FLOATS:
            floating.append(name)
    return quantised, floating


def output_config(
    checkpoint: Checkpoint, recipe: Recipe, plans: list[LayerPlan], tensors: Mapping[str, TensorInfo], reader: Reader | None = None
) -> dict[str, Any]:
    """The output's config.json; ``tensors`` are those of the output."""
    config = copy.deepcopy(checkpoint.config)
    config.pop(MARKER, None)
    config.pop("quantization_config", None)
    quantised, floating = stored_layers(tensors)
    converted = {plan.layer.name for plan in plans}
    pattern, overrides = _common_pattern(plans)
    if recipe.scheme in _CONFIG_DTYPE and any(plan.scheme is not plan.layer.scheme for plan in plans):
        # The weights' new type is the model's: a loader would cast them, or all activations, from the old one.
        config |= {key: _CONFIG_DTYPE[recipe.scheme] for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}}
        for part in config.values():  # such as text_config, which a loader of that part alone reads
            if isinstance(part, dict):
                part |= {key: _CONFIG_DTYPE[recipe.scheme] for key in ("dtype", "torch_dtype") if part.get(key)}
    if recipe.form == "packed":
        if pattern is None:
            raise UnsupportedError(f"{checkpoint.path}: the packed form needs a pattern for every layer that is converted")
        own = [(plan.layer, overrides.get(plan.layer.name, pattern)) for plan in plans]
        ragged = {layer.name: layer.k for layer, p in own if layer.k % (p.group * p.unit)}
        # Whoever loads it must know that what has no place was no part of the packed form.
        unplaced = unplaced_of(checkpoint, reader)
        ignore = _with_head(list(dict.fromkeys((*floating, *unplaced))), converted)
        packed = PackedConfig(pattern, plans[0].scheme, ignore, overrides, ragged)
        config["quantization_config"] = packed.to_dict()
        return config
    unclaimed = _with_head([name for name in checkpoint.layers if name not in converted], converted)
    marker = {"pattern": str(pattern), "overrides": {name: str(p) for name, p in overrides.items()}, "ignore": unclaimed}
    if quantised:
        # Readers match entries with the names of modules, which are not those in the files in every class of model.
        modules = [] if reader is None else [module for module, layer in reader.modules.items() if layer not in quantised]
        ignore = _with_head(list(dict.fromkeys((*floating, *modules, *_first_experts(tensors)))), quantised.keys())
        merged = reader is not None and bool(reader.merged - quantised.keys())
        config["quantization_config"] = _compressed_tensors(next(iter(quantised.values())), ignore, merged)
        if pattern is not None:
            config["quantization_config"][MARKER] = marker
    elif pattern is not None:
        config[MARKER] = marker
    return config


def unplaced_of(checkpoint: Checkpoint, reader: Reader | None) -> tuple[str, ...]:
    """Tensors that no layer takes: by the class, or by their names where the class is not known or the files are not its own."""
    return reader.unplaced if of_class(reader) else tuple(checkpoint.strays)


def contradictions(config: dict[str, Any], tensors: Mapping[str, TensorInfo], reader: Reader | None = None) -> list[str]:
    """Linear modules of which a compressed-tensors configuration says something else than the files, a sentence each."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        return []
    quantised, floating = stored_layers(tensors)
    if not of_class(reader):
        linear = [name for name in floating if not matches(name, NOT_LINEAR)]
        reader = Reader({name: name for name in (*quantised, *linear)})
    targets = {target for group in (quantization.get("config_groups") or {}).values() for target in group.get("targets") or ()}
    ignore = quantization.get("ignore") or []
    found = []
    for module, layer in reader.modules.items():
        meant = "Linear" in targets or any(reader.match(module, target) for target in targets)
        claimed = meant and not any(reader.match(module, entry) for entry in ignore)
        if claimed and layer not in quantised:
            found.append(f"config.json says that {module} is quantised; in the files it is not: list it under ignore")
        elif layer in quantised and not claimed:
            found.append(f"{module} is quantised in the files; config.json says that it is not: take it out of ignore")
    return found


def check_shapes(checkpoint: Checkpoint, reader: Reader) -> None:
    """The linear layers of the class must lie in the files, as weights of their shapes; its other tensors in theirs.

    Raises:
        CheckpointError: names the layer or tensor.
    """
    found = {f"tensor {name}": (checkpoint.tensors[name].shape, shape) for name, shape in reader.placed.items()}
    for name, shape in reader.shapes.items():
        layer = checkpoint.layers.get(name)
        if layer is None:
            told = f"layer {name} should be linear weights {list(shape)}, but its tensor cannot be read as such"
            raise CheckpointError(f"{checkpoint.path}: {told}")
        found[f"layer {name}"] = ((layer.n, layer.k), shape)
    for name, (has, needs) in found.items():
        if has != needs:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {list(has)}, the class that config.json names needs {list(needs)}: "
                "fetch config.json and weights of one model"
            )


def _first_experts(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names by which vLLM asks whether experts are quantised, of those that are not: three of the first, whatever the files call them."""
    stacks = {found[1]: info for name, info in tensors.items() if (found := _EXPERTS.fullmatch(name)) is not None}
    return [f"{stack}.0.{part}_proj" for stack, info in stacks.items() if info.dtype_name in FLOATS for part in ("gate", "up", "down")]


def _with_head(ignore: list[str], elsewhere: Any) -> list[str]:
    """A tied head has no tensor of its own, yet a loader must know that it stays dense."""
    return ignore if "lm_head" in elsewhere or "lm_head" in ignore else [*ignore, "lm_head"]


def _common_pattern(plans: list[LayerPlan]) -> tuple[Pattern | None, dict[str, Pattern]]:
    """The pattern most weights obey, and the layers that obey another."""
    known = [(plan.layer, plan.pattern) for plan in plans if plan.pattern is not None]
    if len(known) < len(plans):
        return None, {}
    weights: Counter[Pattern] = Counter()
    for layer, pattern in known:
        weights[pattern] += layer.n * layer.k
    common = weights.most_common(1)[0][0]
    return common, {layer.name: pattern for layer, pattern in known if pattern != common}


def _compressed_tensors(name: str, ignore: list[str], merged: bool) -> dict[str, Any]:
    """W8A8 or NVFP4A16 as llm-compressor writes it (compressed-tensors 0.17 and later).

    ``merged``: there are experts in 16 bits that readers merge. transformers takes them for quantised by the group that names experts, or
    the first one, whatever ``ignore`` says, and passes weights without scales on as they are for fp8 only. So there is such a group.
    """
    kind = "int" if name == "int8" else "float"
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "group_size": None, "strategy": "channel", "dynamic": False}
    activations: dict[str, Any] | None = weights | {"strategy": "token", "dynamic": True}
    if name == "nvfp4":
        weights |= {"num_bits": 4, "group_size": BLOCK, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        activations = None
    groups: dict[str, dict[str, Any]] = {}
    groups["group_0"] = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    if merged and name != "fp8":
        plain = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "strategy": "channel", "dynamic": False}
        groups["unquantized_experts"] = {
            "targets": [NO_LAYER],
            "weights": plain,
            "input_activations": plain | {"strategy": "token", "dynamic": True},
            "output_activations": None,
            "format": _COMPRESSED_FORMAT["fp8"],
        }
    return {
        "quant_method": METHOD,
        "format": _COMPRESSED_FORMAT[name],
        "quantization_status": "compressed",
        "config_groups": groups,
        "kv_cache_scheme": None,
        "ignore": ignore,
    }
