"""What of transformers is imported with `integrations`, private names too, and the attributes by which it and its models are told things.

Importing this imports transformers, so only `integrations` may. A name that is missing raises `UnsupportedError` with the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UnsupportedError
from .versions import lacks, not_imported

try:
    from transformers import AutoTokenizer, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, register_quantizer
    from transformers.utils import logging
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise UnsupportedError(not_imported("transformers", error)) from error

__all__ = ["INITIALISED", "AutoTokenizer", "HfQuantizer", "PreTrainedModel", "QuantizationConfigMixin", "gguf_tables", "ignored_keys",
           "logging", "names_when_loading", "names_when_saving", "register_method", "split_where_quantised", "tied_weights"]  # fmt: skip

HOOKS = ("_process_model_before_weight_loading", "_process_model_after_weight_loading")
"""Methods of `HfQuantizer` that transformers calls around the loading of weights."""


def register_method(name: str, config: type, quantizer: type) -> None:
    """Make a quantisation method known to transformers; does nothing the second time.

    Raises:
        UnsupportedError: transformers does not call the hooks by their names, so that models would load unchecked.
    """
    for hook in HOOKS:
        if not hasattr(HfQuantizer, hook):
            raise UnsupportedError(lacks("transformers", f"HfQuantizer.{hook}"))
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(name)(config)
        register_quantizer(name)(quantizer)


def names_when_loading(model: nn.Module, known: Mapping[str, object]) -> Callable[[str], tuple[str, bool]]:
    """What gives a stored tensor's name in the model, and whether transformers merges it with others there: its own steps at loading."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]

    def target_of(key: str) -> tuple[str, bool]:
        target, merged = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if target not in known and key in known:
            target, merged = rename_source_key(key, [], [], model.base_model_prefix, known)
        return target, merged is not None

    return target_of


def names_when_saving(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """The names that layers of a model get in its files: its own steps at saving, run on tensors that hold their place in the list."""
    places = {f"{layer}.weight": torch.tensor([place]) for place, layer in enumerate(layers)}
    reverted = revert_weight_conversion(model, places)
    return {layers[int(place)]: name.removesuffix(".weight") for name, place in reverted.items()}


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one's, with that one's name; empty where the model tells none."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def split_where_quantised() -> frozenset[str]:
    """Classes of modules with merged experts that transformers replaces by single layers where compressed-tensors is to read them."""
    try:
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as replaced
    except ImportError:
        return frozenset()
    return frozenset(name for name, entry in replaced.items() if "compressed-tensors" in entry["quantization_methods"])


def ignored_keys(model: nn.Module, kind: str) -> tuple[str, ...]:
    """Patterns of the names of tensors that may be ``missing`` or ``unexpected`` by the word of the model's author."""
    return tuple(getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ())


INITIALISED = "_is_hf_initialized"
"""The attribute of modules and parameters that transformers leaves as they are; where its name changed, they would be made anew."""


class GgufTables(NamedTuple):
    """How transformers reads GGUF: the keys it knows, what gives tensors their layout, names, and the file's parts."""

    GGUF_CONFIG_MAPPING: Mapping[str, Any]
    GGUF_TOKENIZER_MAPPING: Mapping[str, Mapping[str, str]]
    TENSOR_PROCESSORS: Mapping[str, Any]
    TensorProcessor: Any
    get_gguf_hf_weights_map: Callable[..., dict[str, str]]
    load_gguf_checkpoint: Callable[..., dict[str, Any]]


def gguf_tables() -> GgufTables:
    """transformers' side of GGUF; imported here, for those who import GGUF files only.

    Raises:
        UnsupportedError: a name is missing.
    """
    try:
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
        from transformers.modeling_gguf_pytorch_utils import (
            GGUF_TOKENIZER_MAPPING,
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            load_gguf_checkpoint,
        )
    except ImportError as error:
        raise UnsupportedError(not_imported("transformers", error)) from error
    return GgufTables(
        GGUF_CONFIG_MAPPING, GGUF_TOKENIZER_MAPPING, TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map, load_gguf_checkpoint
    )
