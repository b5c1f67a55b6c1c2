"""The formats in which checkpoints keep their linear layers: each finds its layers, reads their rows, and says what it refuses."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...format import QUANT_METHOD
from ..layers import WEIGHTS_IN, WITH_WEIGHTS, Layer, check_quantised, check_zero_points, tensors_of
from ..tensorfile import TensorInfo
from . import bitmask, bitnet, compressed_tensors, floating, packed

FORMATS = {
    QUANT_METHOD: (packed.find,),
    bitnet.METHOD: (bitnet.find,),
    compressed_tensors.METHOD: (compressed_tensors.find, bitmask.find),
    None: (floating.find,),
}
"""Functions that find a format's layers, by the ``quant_method`` that declares the format. A checkpoint may mix formats:
of those that find a layer the first has it.

Each is called with the folder, config.json and the tensors that are left, and raises `CheckpointError` for what it refuses.
"""

# Model types that store weights [K, N]: groups along the last axis would run over output features.
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


def find_layers(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Layer]:
    """Every linear layer by name, in tensor order.

    Raises:
        CheckpointError: transposed or otherwise quantised weights, or tensors whose shapes contradict each other.
    """
    transposed = _transposed(config, tensors)
    if transposed:
        raise CheckpointError(
            f"{path}: {transposed} stores its linear weights transposed ([K, N], transformers' Conv1D), which nothing here reads: take a "
            "model with nn.Linear layers"
        )
    # Some tools write the second key, beside the first or alone.
    key = "quantization_config" if config.get("quantization_config") else "quantization"
    given = config.get(key)
    quantization = given if isinstance(given, dict) else {}
    method = quantization.get("quant_method")
    if method not in FORMATS or (method is None and quantization):
        told = f"by {method!r}" if method else f"in an unknown way ({key}: {', '.join(sorted(quantization))})"
        check_quantised(path, tensors, told, key)
        raise CheckpointError(f"{path}: weights quantised {told} cannot be read; start from the 16-bit checkpoint")
    found: dict[str, Layer] = {}
    for find in chain.from_iterable(FORMATS.values()):
        found |= find(path, config, {tensor: info for tensor, info in tensors.items() if tensor.rpartition(".")[0] not in found})
    _check_alone(found, tensors)
    by_tensor = {layer.main.name: layer for layer in found.values()}
    return {by_tensor[tensor].name: by_tensor[tensor] for tensor in tensors if tensor in by_tensor}


def _check_alone(layers: dict[str, Layer], tensors: dict[str, TensorInfo]) -> None:
    """A layer is there once; beside plain weights nothing says that they are stored in another way."""
    for name, layer in layers.items():
        main = layer.main
        twice = [other for other in tensors_of(name, WEIGHTS_IN, tensors).values() if other.name != main.name]
        if twice:
            raise CheckpointError(f"{main.path}: layer {name} is there twice ({main.name} and {twice[0].name}): remove one of them")
        beside = tensors_of(name, WITH_WEIGHTS, tensors) if layer.plain else {}
        for other in beside.values():
            if other.name not in {info.name for info in layer.tensors.values()}:
                raise CheckpointError(
                    f"{main.path}: {main.name} is {main.dtype_name} with {other.name} beside it, so it was saved before it was compressed: "
                    "save it compressed, or start from the 16-bit checkpoint"
                )
        if layer.plain and "weight_zero_point" not in layer.tensors and f"{name}.weight_zero_point" in tensors:
            check_zero_points(name, tensors[f"{name}.weight_zero_point"])


def _transposed(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> str | None:
    """The model type or layer that shows that weights are transposed: a type anywhere in the configuration, or a bias of K values."""
    if config.get("model_type") in _TRANSPOSED:
        return str(config["model_type"])
    for value in config.values():
        if isinstance(value, dict) and (found := _transposed(value, {})):
            return found
    for tensor, info in tensors.items():
        layer = tensor.removesuffix(".weight")
        bias = tensors.get(f"{layer}.bias")
        if layer.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc") and bias is not None and len(info.shape) == 2:
            n, k = info.shape
            if bias.shape == (k,) and n != k:
                return layer
    return None
