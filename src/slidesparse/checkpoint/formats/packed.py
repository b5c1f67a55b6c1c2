"""This package's own stored form: kept values and keep-bits, with `PackedConfig` in config.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ... import packing
from ...errors import CheckpointError
from ...format import QUANT_METHOD, Packed, PackedConfig, packed_tensors
from ..layers import Block, Layer, check_tensors, tensors_of
from ..tensorfile import TensorInfo, TensorReader


class PackedLayer(Layer):
    """A packed layer, with its pattern."""

    holds = "packed"

    def _read(self, reader: TensorReader, ranges: Iterable[tuple[int, int]]) -> Iterator[Block]:
        pattern, k = self.stored_pattern, self.scheme.k_stored(self.k)
        for first, last in ranges:
            scale = self._scale(reader, first, last)
            values, keep = (reader.read_rows(self.tensors[part], first, last) for part in ("weight_values", "weight_keep"))
            packed = Packed(values, keep, pattern, k)
            packing.check_packed(packed, first_row=first)
            yield Block(first, packing.restore(packed), scale, packed)


def read_packed_config(path: Path, config: dict[str, Any]) -> PackedConfig | None:
    """The stored form's configuration, None for other checkpoints.

    Raises:
        CheckpointError: see `PackedConfig.from_dict`; the message names config.json.
    """
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        return None
    try:
        return PackedConfig.from_dict(quantization)
    except CheckpointError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error


def find(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Layer]:
    """Packed layers by name; refuses tensors that contradict each other or the configuration, and a checkpoint with none."""
    packed = read_packed_config(path, config)
    if packed is None:
        return {}
    layers: dict[str, Layer] = {}
    for tensor, info in tensors.items():
        name, _, suffix = tensor.rpartition(".")
        if suffix != "weight_values":
            continue
        if len(info.shape) != 2:
            raise CheckpointError(f"{info.path}: {tensor} has shape {list(info.shape)}, expected two dimensions")
        pattern, scheme, n = packed.pattern_of(name), packed.scheme, info.shape[0]
        stored = scheme.pattern_stored(pattern)
        k_full = info.shape[1] // (stored.kept * stored.unit) * pattern.group * pattern.unit
        k = packed.in_features.get(name, k_full)
        specs = packed_tensors(scheme, pattern, n, k)
        layers[name] = PackedLayer(name, n, k, scheme, tensors_of(name, (spec.suffix for spec in specs), tensors), pattern)
        scales = ("F8_E4M3",) if scheme.pair else ("F32",)
        check_tensors(layers[name], specs, scales, f" (pattern {pattern} with K = {k} in config.json)")
    if not layers:
        raise CheckpointError(f"{path}: config.json says {QUANT_METHOD}, but no tensor is packed (*.weight_values)")
    _check_claims(path, layers, tensors, packed)
    return layers


def _check_claims(path: Path, layers: dict[str, Layer], tensors: dict[str, TensorInfo], packed: PackedConfig) -> None:
    """Tensors and config.json must tell the same story about which layers are packed."""
    for tensor in tensors:
        name, _, suffix = tensor.rpartition(".")
        if name not in layers and suffix in ("weight_keep", "weight_scale", "weight_global_scale"):
            raise CheckpointError(f"{path}: tensor {tensor} belongs to no packed layer: {name}.weight_values is missing")
        if name in layers and suffix == "weight":
            raise CheckpointError(f"{path}: layer {name} is there twice, dense ({tensor}) and packed")
    for name in layers:
        if packed.ignores(name):
            raise CheckpointError(f"{path}: layer {name} is packed, but config.json lists it under ignore")
    for key, table in (("overrides", packed.overrides), ("in_features", packed.in_features)):
        for name in table.keys() - layers.keys():
            raise CheckpointError(f"{path}: config.json names {name} under {key}, but no such layer is packed")
