"""Dense quantised weights with scales, as llm-compressor writes them: W8A8 per channel and token, or NVFP4 with 16-bit activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...format import SCHEMES, Scheme, dense_tensors
from ...quant import canonical_nvfp4
from ..layers import FLOATS, Block, Layer, check_tensors, matrices, tensors_of
from ..tensorfile import TensorInfo, TensorReader

METHOD = "compressed-tensors"


class Quantized(Layer):
    """A layer with dense quantised weights and their scales."""

    holds, may_stay = "dense quantised weights with scales", ("dense",)

    def _read(self, reader: TensorReader, ranges: Iterable[tuple[int, int]]) -> Iterator[Block]:
        for first, last in ranges:
            scale, values = self._scale(reader, first, last), reader.read_rows(self.main, first, last)
            yield Block(first, canonical_nvfp4(values) if self.scheme.pair else values, scale)


def find(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Layer]:
    """Quantised layers by name; refuses other schemes, zero points, and tensors that contradict the configuration."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        return {}
    scheme, layers = _scheme(path, quantization), {}
    for name, suffix, info in matrices(tensors):
        if info.dtype_name in FLOATS and suffix == "weight":
            continue  # left as it was
        if f"{name}.weight_zero_point" in tensors:
            raise CheckpointError(f"{info.path}: layer {name} has zero points; only symmetric weights are supported")
        n, k = info.shape[0], info.shape[1] * (2 if scheme.pair else 1)
        own = tensors_of(name, (suffix, "weight_scale", "weight_global_scale"), tensors)
        layers[name] = Quantized(name, n, k, scheme, own)
        check_tensors(layers[name], dense_tensors(scheme, n, k), ("F8_E4M3",) if scheme.pair else FLOATS)
    return layers


def _scheme(path: Path, quantization: dict[str, Any]) -> Scheme:
    """The scheme of a configuration; refuses all but those that are computed exactly."""
    for key in ("transform_config", "kv_cache_scheme"):
        if quantization.get(key):
            raise CheckpointError(f"{path}: compressed-tensors checkpoints with {key} are not supported")
    sparsity = quantization.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{path}: sparse compressed-tensors weights ({sparsity['format']}) are not supported: save them dense")
    groups = list((quantization.get("config_groups") or {}).values())
    if not groups or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{path}: quantization_config.config_groups describes no scheme")
    schemes = {_scheme_of_group(path, group) for group in groups}
    if len(schemes) != 1:
        raise CheckpointError(f"{path}: compressed-tensors checkpoints with {len(schemes)} different schemes are not supported")
    return SCHEMES[schemes.pop()]


def _scheme_of_group(path: Path, group: dict[str, Any]) -> str:
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"), weights.get("symmetric", True))
    if kind == (4, "float", "tensor_group", True) and activations is None:
        return "nvfp4"
    dynamic = activations and tuple(activations.get(key) for key in ("num_bits", "type", "strategy", "dynamic"))
    names = {(8, "int", "channel", True): "int8", (8, "float", "channel", True): "fp8"}
    if kind not in names or dynamic != (8, kind[1], "token", True):
        raise CheckpointError(
            f"{path}: compressed-tensors scheme {weights.get('num_bits')}-bit {weights.get('type')} {weights.get('strategy')} is not "
            "supported: W8A8 int8 or fp8 with symmetric per-channel weights and dynamic per-token activations is"
        )
    return names[kind]
