"""Names of layers in the files that a model's ``save_pretrained`` writes, for those who must not import transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any


def names_in_files(model: Any, layers: Sequence[str]) -> dict[str, str]:
    """The names that layers get in the files; their own but in models of transformers, which is imported where there is such a model.

    Raises:
        UnsupportedError: this version of transformers does not tell them.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {layer: layer for layer in layers}
    found: dict[str, str] = import_module(".transformers", __package__).names_when_saving(model, layers)
    return found
