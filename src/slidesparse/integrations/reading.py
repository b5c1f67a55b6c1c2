"""How other libraries read a compressed-tensors checkpoint: the modules of transformers' class, and compressed-tensors' own matching."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..checkpoint.configs import Reader


def find_reader(config: dict[str, Any], tensors: list[str]) -> Reader | None:
    """Every linear module of the class that config.json names; None without transformers, or where it does not know the class.

    The class is built without memory for its weights. ``tensors`` are the names of the stored ones.
    """
    if find_spec("transformers") is None or find_spec("compressed_tensors") is None:
        return None
    model = _empty(config)
    if model is None:
        return None
    from compressed_tensors.utils.match import match_name

    from .transformers_files import names_in_model

    target_of = names_in_model(model)
    layers = {}
    for tensor in tensors:
        layer, _, suffix = tensor.rpartition(".")
        if suffix in ("weight", "weight_packed"):
            target, _ = target_of(f"{layer}.weight")
            layers[target.removesuffix(".weight")] = layer
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return Reader({name: layers.get(name, name) for name in linear}, match_name)


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
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError, StrictDataclassError):
        return None
