"""The configuration of a packed form, told from the layers of a model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..compat.saving import names_in_files
from ..errors import UnsupportedError
from ..format import PackedConfig
from ..select import matches
from .linear import SlideSparseLinear

_LOG = logging.getLogger(__name__)


def write_config(model: Any) -> None:
    """Let the configuration of a model that can be saved tell the packed form; otherwise its files could not be read back."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    quantized = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and hasattr(module, "weight_scale")]
    try:
        found = model_config(model)
        if quantized:
            raise UnsupportedError(f"layer {quantized[0]} is quantised and not packed")
    except UnsupportedError as reason:
        _LOG.warning("this model cannot be saved in one packed form: %s", reason)
        return
    if found is not None:
        config.quantization_config = found.to_dict()


def model_config(model: nn.Module, before: PackedConfig | None = None) -> PackedConfig | None:
    """`packed_config` of a model's linear layers, by the names they get in its files; None where no layer is packed.

    Raises:
        UnsupportedError: they are of several schemes, or transformers does not tell the names.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | SlideSparseLinear)}
    layers = {name: module for name, module in linears.items() if isinstance(module, SlideSparseLinear)}
    if not layers:
        return None
    name_of = names_in_files(model, list(linears))
    dense = [name_of[name] for name in linears if name not in layers]
    return packed_config({name_of[name]: module for name, module in layers.items()}, dense, before)


def packed_config(layers: Mapping[str, SlideSparseLinear], dense: Iterable[str], before: PackedConfig | None = None) -> PackedConfig:
    """What is true of these packed layers and of the linear ones that are ``dense``, by their names in the files.

    ``before`` is what the files said: it stays where it is true, and its entries of ``ignore`` that mean no packed layer stay in any case.

    Raises:
        UnsupportedError: no layer is packed, or they are of several schemes, which no one checkpoint holds.
    """
    schemes = {layer.scheme.name: layer.scheme for layer in layers.values()}
    if len(schemes) != 1:
        told = f"layers are packed as {' and '.join(sorted(schemes))}" if schemes else "no layer is packed"
        raise UnsupportedError(f"{told}: this model has no packed form; restore_model makes it a dense one")
    common = Counter(layer.pattern for layer in layers.values()).most_common(1)[0][0]
    overrides = {name: layer.pattern for name, layer in layers.items() if layer.pattern != common}
    ragged = {name: layer.in_features for name, layer in layers.items() if layer.in_features % (layer.pattern.group * layer.pattern.unit)}
    found = PackedConfig(common, next(iter(schemes.values())), [], overrides, ragged)
    if before is not None:
        found.ignore = [entry for entry in before.ignore if not any(matches(name, (entry,)) for name in layers)]
    found.ignore += [name for name in dense if not found.ignores(name)]
    return before if before is not None and _same(before, found, layers) else found


def _same(before: PackedConfig, found: PackedConfig, layers: Iterable[str]) -> bool:
    """Whether both say the same of these layers, however they say it."""
    if (before.scheme, before.ignore, before.in_features) != (found.scheme, found.ignore, found.in_features):
        return False
    return before.overrides.keys() <= set(layers) and all(before.pattern_of(name) == found.pattern_of(name) for name in layers)
