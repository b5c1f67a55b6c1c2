"""The configuration of a packed form, told from the layers of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ..errors import UnsupportedError
from ..format import PackedConfig
from ..select import matches
from .linear import SlideSparseLinear


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
