"""Sparse weights as compressed-tensors stored them until 0.14: kept values and one bit per position, of 16 or 8 bits.

``sparse-24-bitmask`` keeps two of every four weights, ``sparse-bitmask`` whatever is not zero. Neither is written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, WeightError
from ...packing.codes import integer_view
from ..layers import FLOATS, Block, Layer, float_scheme, tensors_of
from ..tensorfile import TensorInfo, TensorReader
from .compressed_tensors import Quantization, check_scales, read_quantization

_SUFFIXES = ("compressed", "bitmask", "shape", "row_offsets")


@dataclass(frozen=True)
class Bitmask(Layer):
    """A layer, or with ``vector`` another weight such as a norm's, in one row; what is not converted is restored."""

    vector: bool = False  # type: ignore[misc]  # here the file tells, in other formats the class
    holds, restored = "sparse weights with a bit mask", True

    @property
    def may_stay(self) -> tuple[str, ...]:  # type: ignore[override]
        """As the dense weights they are restored to."""
        return ("dense",) if self.scheme.dynamic else ("packed", "dense")

    @property
    def by_default(self) -> bool:  # type: ignore[override]
        """Whether it is a matrix."""
        return not self.vector

    def _read(self, reader: TensorReader, ranges: Iterable[tuple[int, int]]) -> Iterator[Block]:
        start, size = 0, self.main.dtype.itemsize
        for first, last in ranges:
            mask = self._mask(reader, first, last)
            counts = mask.sum(1)
            self._check_counts(reader, first, counts, start)
            count = int(counts.sum())
            values = reader.read_bytes(self.main, start * size, count * size).view(self.main.dtype)
            dense = torch.zeros(mask.shape, dtype=self.main.dtype)
            # As integers: torch does not index every 8-bit float.
            integer_view(dense)[mask] = integer_view(values)
            yield Block(first, dense, self._scale(reader, first, last))
            start += count
        if start != prod(self.main.shape):
            raise WeightError(f"compressed holds {prod(self.main.shape)} values, bitmask has {start} bits")

    def _mask(self, reader: TensorReader, first: int, last: int) -> Tensor:
        """Which weights of these rows are stored, bool ``[rows, K]``."""
        info = self.tensors["bitmask"]
        packed = reader.read(info).view(1, -1) if self.vector else reader.read_rows(info, first, last)
        bits = torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, bitorder="little").view(np.bool_))
        if bool(bits[:, self.k :].any()):
            raise WeightError(f"bitmask: bits are set behind the last weight, in rows {first} to {last - 1}")
        return bits[:, : self.k]

    def _check_counts(self, reader: TensorReader, first: int, counts: Tensor, start: int) -> None:
        """The bits of a row must be as many as it has values."""
        if "row_offsets" in self.tensors:
            told = reader.read_rows(self.tensors["row_offsets"], first, first + len(counts)).reshape(-1)
            wrong = told != start + counts.cumsum(0) - counts
        else:
            wrong = counts != self.main.shape[-1]
        if bool(wrong.any()) or start + int(counts.sum()) > prod(self.main.shape):
            row = first + int(wrong.int().argmax())
            raise WeightError(f"bitmask: row {row} has {int(counts[row - first])} bits, which is not how many values it has")


def find(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Layer]:
    """Layers by name; refuses tensors that are missing or contradict each other."""
    names = [tensor.removesuffix(".compressed") for tensor in tensors if tensor.endswith(".compressed")]
    layers: dict[str, Layer] = {}
    quantization = read_quantization(path, config, tensors) if names else None
    with TensorReader() as reader:
        for stored in names:
            name = stored.removesuffix(".weight")  # which the names held until compressed-tensors 0.7
            own = tensors_of(stored, _SUFFIXES, tensors) | tensors_of(name, ("weight_scale", "weight_zero_point"), tensors)
            layers[name] = _layer(name, own, quantization, reader)
    return layers


def _layer(name: str, own: dict[str, TensorInfo], quantization: Quantization | None, reader: TensorReader) -> Layer:
    main = own["compressed"]
    for suffix, dtypes in (("bitmask", ("U8",)), ("shape", ("I64", "I32"))):
        if suffix not in own or own[suffix].dtype_name not in dtypes:
            raise CheckpointError(f"{main.path}: layer {name} has no {suffix} of type {' or '.join(dtypes)} beside {main.name}")
    shape = tuple(int(size) for size in reader.read(own["shape"]).reshape(-1))
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise CheckpointError(f"{main.path}: layer {name} has the shape {list(shape)}: only matrices and vectors are read")
    n, k = (1, *shape)[-2:]
    if main.dtype_name in FLOATS:
        quantization = None
    elif quantization is None or main.dtype != quantization.scheme.dtype:
        raise CheckpointError(f"{main.path}: {main.name} is {main.dtype_name}, but config.json does not say so")
    layer = Bitmask(name, n, k, float_scheme(main) if quantization is None else quantization.scheme, own, vector=len(shape) == 1)
    wanted = {"bitmask": (*shape[:-1], -(-k // 8)), "compressed": (n, k // 2)}
    if "row_offsets" in own:
        del wanted["compressed"]
    for suffix, expected in wanted.items():
        found = own[suffix].shape
        if found != expected and not (layer.vector and prod(found) == prod(expected)):
            raise CheckpointError(f"{main.path}: {own[suffix].name} has shape {list(found)}, expected {list(expected)}")
    if "row_offsets" in own and prod(own["row_offsets"].shape) != n:
        raise CheckpointError(f"{main.path}: {own['row_offsets'].name} should hold {n} values")
    if quantization is not None:
        check_scales(layer, quantization)
    return layer
