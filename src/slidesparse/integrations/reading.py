"""How other libraries read a checkpoint: which modules transformers' class has, and how compressed-tensors matches their names."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..checkpoint.configs import Reader, same_name
from ..errors import UnsupportedError
from ..select import DEFAULT_IGNORE, matches


def find_reader(config: dict[str, Any], tensors: list[str]) -> Reader | None:
    """The modules of the class that config.json names; None without transformers, or where it does not know the class.

    The class is built without memory for its weights. ``tensors`` are the names of the stored ones.
    """
    model = _empty(config) if find_spec("transformers") is not None else None
    if model is None:
        return None
    from ..compat.transformers import tied_weights
    from .transformers_files import names_in_model

    target_of, layers, merged = names_in_model(model), {}, set()
    for tensor in tensors:
        layer, _, suffix = tensor.rpartition(".")
        if suffix in ("weight", "weight_packed", "weight_values", "compressed"):
            layer = layer.removesuffix(".weight")
            target, with_others = target_of(f"{layer}.weight")
            layers[target.removesuffix(".weight")] = layer
            merged |= {layer} if with_others else set()
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    if not linear & layers.keys():
        return None  # the files are of another class
    tied = {name.removesuffix(".weight") for pair in tied_weights(model).items() for name in pair}
    fixed = {layer for name, layer in layers.items() if name in tied or name not in linear} - merged
    return Reader({name: layers.get(name, name) for name in modules if name in linear}, _matching(), frozenset(fixed))


def linear_layers(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """N and K of the linear layers, heads aside, of the model that a configuration alone describes, by name.

    Raises:
        UnsupportedError: transformers is not installed, or cannot build the model; the message says what to give instead.
    """
    if find_spec("transformers") is None:
        raise UnsupportedError("config.json alone is read by transformers: pip install 'slidesparse[hf]', or give shapes NxK")
    model = _empty(config)
    if model is None:
        kind = next(iter(config.get("architectures") or ()), config.get("model_type", "unknown"))
        raise UnsupportedError(f"transformers cannot build {kind} from config.json alone: give a folder with weights, or shapes NxK")
    modules = model.named_modules()
    found = {name: (module.out_features, module.in_features) for name, module in modules if isinstance(module, nn.Linear)}
    return {name: shape for name, shape in found.items() if not matches(name, DEFAULT_IGNORE)}


def _matching() -> Callable[[str, str], bool]:
    if find_spec("compressed_tensors") is None:
        return same_name
    from compressed_tensors.utils.match import match_name

    return match_name


def _empty(config: dict[str, Any]) -> nn.Module | None:
    """The model of a configuration, on no device; None where transformers cannot build it."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    architecture = next(iter(config.get("architectures") or ()), "")
    kind, plain = getattr(transformers, str(architecture), None), {k: v for k, v in config.items() if k != "quantization_config"}
    if kind is None or "auto_map" in config:
        return None
    try:
        with torch.device("meta"):
            return kind(transformers.AutoConfig.for_model(**plain))
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        StrictDataclassError,
    ):
        return None
