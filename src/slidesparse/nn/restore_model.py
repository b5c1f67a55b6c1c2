"""The way back: the masked dense model of a packed one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..format import QUANT_METHOD
from ..select import matches
from .describe import write_config
from .linear import SlideSparseLinear


def restore_model(model: Any, *, only: Sequence[str] = ("*",), dtype: torch.dtype | None = None) -> Any:
    """Put a plain nn.Linear with the masked weights in the place of every packed layer of ``model``, in place, and return the model.

    ``only`` are names, globs or ``re:`` expressions of the layers that are meant.

    The weights have the type of the model around them, or ``dtype``: bit by bit those that were packed where that is the packed type,
    values times scales where they are quantised. They can be trained; nothing keeps their zeros then.

    Raises:
        ValueError: ``model`` is itself a packed layer.
        WeightError: packed tensors that are damaged.
    """
    if isinstance(model, SlideSparseLinear):
        raise ValueError("a lone packed layer cannot be swapped in place: dense_weight() gives its weights")
    made: dict[SlideSparseLinear, nn.Linear] = {}
    for name, layer in _packed(model):
        if not matches(name, only):
            continue
        parent, _, child = name.rpartition(".")
        if layer not in made:
            made[layer] = _dense(layer, dtype or layer.dtype)
        setattr(model.get_submodule(parent), child, made[layer])
    if made:
        _tell(model)
    return model


def _tell(model: Any) -> None:
    """Let the configuration tell what is packed: here, or on saving where transformers' quantiser does; nothing where nothing is."""
    config: Any = getattr(model, "config", None)
    told = getattr(config, "quantization_config", None)
    if _packed(model):
        if isinstance(told, dict) and told.get("quant_method") == QUANT_METHOD:
            write_config(model)
        return
    for module in list(model.modules()):
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is not None:  # transformers treats a model as quantised for as long as it has one
            quantizer.remove_quantization_config(module)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _packed(model: nn.Module) -> list[tuple[str, SlideSparseLinear]]:
    return [(name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, SlideSparseLinear)]


def _dense(layer: SlideSparseLinear, dtype: torch.dtype) -> nn.Linear:
    layer.check()
    weight = layer.dense_weight().to(dtype)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(device=weight.device, dtype=dtype))
    return linear.train(layer.training)
