"""How other libraries read a checkpoint: which modules transformers' class has, and how compressed-tensors matches their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.configs import Reader, same_name
from ..checkpoint.layers import WEIGHTS_IN
from ..errors import UnsupportedError
from ..select import NOT_LINEAR, matches


def find_reader(config: dict[str, Any], tensors: list[str], code: Path | None = None) -> Reader | None:
    """The modules of the class that config.json names; None without transformers, or where it does not know the class.

    The class is built without memory for its weights. ``tensors`` are the names of the stored ones; ``code`` is the model's
    folder, where Python files in it may be run.
    """
    model = _empty(config, code) if find_spec("transformers") is not None else None
    if model is None:
        return None
    from ..compat.transformers import split_where_quantised, tied_weights
    from .linears import acts_linear, head_layers, written_layers
    from .transformers_files import may_be_left_over, missing_tensors, names_in_model

    target_of, merged = names_in_model(model), set[str]()
    layers: dict[str, str] = {}
    targets: dict[str, str] = {}
    plain: dict[str, str] = {}
    for tensor in tensors:
        layer, _, suffix = tensor.rpartition(".")
        stored = f"{layer.removesuffix('.weight')}.weight" if suffix in WEIGHTS_IN else tensor
        target, with_others = target_of(stored)
        targets[target] = tensor
        if suffix in WEIGHTS_IN:
            layer = stored.removesuffix(".weight")
            layers[target.removesuffix(".weight")] = layer
            merged |= {layer} if with_others else set()
        if stored == tensor and not with_others:
            plain[target] = tensor
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    if not linear & layers.keys():
        return Reader({}, _matching(), missing=tuple(missing_tensors(model, targets)))  # the files are of another class
    tied = {name.removesuffix(".weight") for pair in tied_weights(model).items() for name in pair}
    written = written_layers(model)
    fixed = {}
    for name, layer in layers.items():
        if name not in linear and layer not in merged:
            fixed[layer] = "is no linear layer of this class of model"
        elif name in tied:
            fixed[layer] = "is tied to another"
        elif name in written:
            fixed[layer] = "has weights that its model writes into"
        elif name in linear and not acts_linear(modules[name]):
            fixed[layer] = f"is a {type(modules[name]).__name__}, which computes something else than a linear layer"
    expected = model.state_dict()
    unplaced = tuple(tensor for name, tensor in targets.items() if name not in expected and not may_be_left_over(name, model))
    split = {name for name, module in modules.items() if type(module).__name__ in split_where_quantised()}
    split &= {target.rpartition(".")[0] for target in targets}
    heads = frozenset(layers[name] for name in head_layers(model) & layers.keys())
    linears = {name: name for name in modules if name in linear}
    linears |= {name: layer for name, layer in layers.items() if name in linears}
    missing = tuple(missing_tensors(model, targets))
    alone = {name: layer for name, layer in layers.items() if name in linear and layer not in merged}
    shapes = {layer: (modules[name].out_features, modules[name].in_features) for name, layer in alone.items()}
    others = {name: tensor for name, tensor in plain.items() if name in expected and name.removesuffix(".weight") not in linear}
    placed = {tensor: tuple(expected[name].shape) for name, tensor in others.items()}
    return Reader(linears, _matching(), fixed, heads, frozenset(merged), tuple(sorted(split)), unplaced, missing, shapes, placed)


@dataclass(frozen=True)
class Described:
    """What a configuration alone tells: N and K of the linear layers, heads aside, and the shapes of all weights, both by name."""

    linears: dict[str, tuple[int, int]]
    weights: dict[str, tuple[int, ...]]


def described(config: dict[str, Any]) -> Described:
    """The model that a configuration alone describes.

    Raises:
        UnsupportedError: transformers is not installed, or cannot build the model; the message says what to give instead.
    """
    if find_spec("transformers") is None:
        raise UnsupportedError("config.json alone is read by transformers: pip install 'slidesparse[hf]', or give shapes NxK")
    if not config.get("architectures"):
        raise UnsupportedError("config.json names no class under `architectures`: add it, or give a folder with weights, or shapes NxK")
    model = _empty(config, None)
    if model is None:
        kind = next(iter(config["architectures"]))
        raise UnsupportedError(f"transformers cannot build {kind} from config.json alone: give a folder with weights, or shapes NxK")
    from .linears import acts_linear, head_layers

    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        raise UnsupportedError(f"{type(model).__name__} has Conv1D in place of nn.Linear: take a model with nn.Linear layers")
    heads = head_layers(model)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in heads and not matches(name, NOT_LINEAR) and acts_linear(module)
    }
    return Described(linears, {name: tuple(weight.shape) for name, weight in model.named_parameters()})


def _matching() -> Callable[[str, str], bool]:
    if find_spec("compressed_tensors") is None:
        return same_name
    from compressed_tensors.utils.match import match_name

    return match_name


def _empty(config: dict[str, Any], code: Path | None) -> nn.Module | None:
    """The model of a configuration, on no device; None where transformers cannot build it."""
    import transformers

    from .classes import auto_class, named_class
    from .linears import FAILURES

    kind, own = named_class(config), code is not None and "auto_map" in config
    if kind is None and not own:
        return None
    try:
        with torch.device("meta"):
            if own:
                plain = transformers.AutoConfig.from_pretrained(code, trust_remote_code=True)
                plain.__dict__.pop("quantization_config", None)
                return auto_class(config).from_config(plain, trust_remote_code=True)
            return kind(transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if key != "quantization_config"}))
    except FAILURES:
        return None
