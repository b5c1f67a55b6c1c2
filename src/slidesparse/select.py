"""Which layers are meant: names, globs and regular expressions, and the names of matrices that are no plain linear layers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

NOT_LINEAR = (
    *("*embed*", "*wte", "*wpe", "shared", "*.shared", "*relative_attention_bias*"),
    *("re:.*norm[^.]*$", "*router*", "*.gate", "*.gate.*", "*shared_expert_gate", "*.experts.*"),
    *("*.lora_A*", "*.lora_B*", "*.lora_embedding_*"),
)
"""Names of matrices that are no plain linear layers: embeddings, norms, routers, expert stacks, which loaders merge, and adapters."""

DEFAULT_IGNORE = ("lm_head", "*.lm_head", "*output_layer", *NOT_LINEAR)
"""Layers not pruned or packed by default: those above, and heads. `Recipe.only` takes a head by its exact name."""


def matches(layer: str, patterns: Iterable[str]) -> bool:
    """Whether a layer name is meant by one of the entries: an exact name, a glob, or a regular expression behind ``re:``.

    Raises:
        ValueError: an entry is not a valid regular expression.
    """
    for entry in patterns:
        if entry.startswith("re:"):
            try:
                if re.match(entry[3:], layer):
                    return True
            except re.error as error:
                raise ValueError(f"bad regular expression {entry!r}: {error}") from error
        elif layer == entry or fnmatch.fnmatchcase(layer, entry):
            return True
    return False
