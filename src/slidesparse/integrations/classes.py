"""The class of a model: the one that config.json names, one of transformers' own by kind, or code that the model brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_KINDS = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")


def named_class(config: dict[str, Any]) -> Any:
    """transformers' class that config.json names under ``architectures``; None where it has none of that name for this type of model."""
    import transformers

    for name in config.get("architectures") or ():
        kind = getattr(transformers, str(name), None)
        own = getattr(getattr(kind, "config_class", None), "model_type", None)
        if own is not None and own == config.get("model_type"):
            return kind
    return None


def auto_class(config: dict[str, Any]) -> Any:
    """transformers' loader of the code that a model brings; that of causal language models where it brings none."""
    import transformers

    brings = config.get("auto_map") or {}
    return getattr(transformers, next((kind for kind in _KINDS if kind in brings), _KINDS[0]))


def check_code(path: Path, config: dict[str, Any], trusted: bool) -> None:
    """Refuse a model that only code of its own can open, where that may not run.

    Raises:
        CheckpointError: names the class.
    """
    from transformers import CONFIG_MAPPING

    brings = config.get("auto_map") or {}
    if brings and not trusted and config.get("model_type") not in CONFIG_MAPPING:
        told = ", ".join(sorted({str(code).rpartition("--")[2] for code in brings.values()}))
        raise CheckpointError(
            f"{path} is opened by Python files of its own ({told}), which are not run unasked: read them, then give --trust-remote-code "
            "(in Python trust_remote_code=True)"
        )
