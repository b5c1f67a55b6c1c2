"""Patterns of single layers: read from a file, found by a layer's name, and held against what serving engines merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import UnsupportedError
from ..format import merged_name
from ..pattern import Pattern
from ..select import matches


def read_overrides(path: str | Path) -> dict[str, Pattern]:
    """A JSON file that maps layers to patterns: ``{"*.down_proj": "8:10", "model.layers.3.self_attn.qkv_proj": "6:8"}``.

    Raises:
        UnsupportedError: the file cannot be read, is no such object, has an entry twice or one that is no pattern; the message says which.
    """
    try:
        # Pairs as a tuple: a dict would hide a name that is there twice, and JSON's own arrays are lists.
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)
    except OSError as error:
        raise UnsupportedError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, tuple):
        raise UnsupportedError(f'{path} must hold an object that maps layers to patterns, such as {{"*.down_proj": "8:10"}}')
    found: dict[str, Pattern] = {}
    for name, text in entries:
        if name in found:
            raise UnsupportedError(f"{path}: {name!r} is there twice: leave one")
        if text == "dense":
            raise UnsupportedError(f"{path}: {name!r}: dense is not a pattern: leave layers dense with --ignore")
        try:
            found[name] = Pattern.parse(text)
        except ValueError as error:
            raise UnsupportedError(f"{path}: {name!r}: {error}") from error
    return found


def override_of(layer: str, overrides: Mapping[str, Pattern]) -> Pattern | None:
    """What the entries say of one layer, None if nothing: its own name before that of its merged layer, before the last other match."""
    merged = merged_name(layer)
    found = [pattern for entry, pattern in overrides.items() if matches(layer, (entry,)) or matches(merged, (entry,))]
    return overrides.get(layer) or overrides.get(merged) or (found[-1] if found else None)


def check_overrides(patterns: Mapping[str, Pattern | None], overrides: Mapping[str, Pattern], source: Path) -> None:
    """Hold the entries against the layers to convert, given with the patterns they are to have (None: still to be detected).

    Raises:
        UnsupportedError: an entry means none of them, or gives parts of one merged layer different patterns.
    """
    wholes: dict[str, list[str]] = {}
    for layer in patterns:
        wholes.setdefault(merged_name(layer), []).append(layer)
    names = (*patterns, *wholes)
    for entry in overrides:
        if not any(matches(name, (entry,)) for name in names):
            raise UnsupportedError(f"overrides: {entry!r} matches no layer to convert: slidesparse inspect --layers {source} lists them")
    for whole, parts in wholes.items():
        if len({patterns[part] for part in parts}) > 1 and any(override_of(part, overrides) for part in parts):
            told = ", ".join(f"{part} ({patterns[part] or 'to be detected'})" for part in parts)
            raise UnsupportedError(
                f"overrides: {told}: serving engines merge these layers into one, which needs one pattern: name {whole} instead"
            )
