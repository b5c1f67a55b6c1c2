"""Reading a layer block by block of rows, whatever form it is stored in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import pack
from ..errors import CheckpointError, WeightError
from ..format import Packed
from ..quant import canonical_nvfp4, check_finite, ternarize, unpack_ternary
from .layers import Form, Layer
from .tensorfile import TensorReader

BLOCK_WEIGHTS = 1 << 18
"""Weights per block: small enough that a block and its intermediates stay in the second-level cache."""


@dataclass
class Block:
    """Rows ``first … first + rows - 1`` of a layer: dense stored values ``[rows, K_stored]`` and the scales that belong to them.

    ``packed`` is the block as stored when the layer is packed.
    """

    first: int
    values: Tensor
    scale: Tensor | None = None
    packed: Packed | None = None

    def to(self, device: str) -> Block:
        """The same block on another device, without its packed form."""
        return Block(self.first, self.values.to(device), None if self.scale is None else self.scale.to(device))


GPU_BLOCK_WEIGHTS = 1 << 24
"""Weights per block on a GPU: large enough to hide the launches of a few dozen kernels."""


def row_ranges(n: int, k: int, device: str = "cpu") -> Iterator[tuple[int, int]]:
    """Cut ``n`` rows of ``k`` weights into blocks."""
    step = max(1, (BLOCK_WEIGHTS if device == "cpu" else GPU_BLOCK_WEIGHTS) // max(k, 1))
    return ((first, min(first + step, n)) for first in range(0, n, step))


def read_block(reader: TensorReader, layer: Layer, first: int, last: int, mean: float | None = None) -> Block:
    """Rows of a layer as dense values; ``mean`` is a BitNet master layer's mean magnitude (see `mean_magnitude`).

    Raises:
        CheckpointError: NaN or Inf, or packed tensors or scales that contradict the configuration; names layer and row.
    """
    try:
        block = _read_block(reader, layer, first, last, mean)
        check_finite(block.values, first_row=first)
        return block
    except WeightError as error:
        raise CheckpointError(f"{layer.main.path}: layer {layer.name}: {error}") from error


def _read_block(reader: TensorReader, layer: Layer, first: int, last: int, mean: float | None) -> Block:
    rows = last - first
    if layer.form is Form.TERNARY:
        scale = reader.read(layer.tensors["weight_scale"]).float().reshape(-1)
        if scale.numel() != 1:
            raise WeightError(f"weight_scale holds {scale.numel()} values, BitNet has one per tensor")
        scale = 1.0 / scale if layer.inverse_scale else scale
        return Block(first, _ternary_rows(reader, layer, first, last), scale.expand(rows, 1).contiguous())
    if layer.form is Form.MASTER and mean is not None:
        values = ternarize(reader.read_rows(layer.main, first, last), mean)
        return Block(first, values, torch.full((rows, 1), max(mean, 1e-5), dtype=torch.float32))
    scale = _read_scale(reader, layer, first, last)
    if layer.form is not Form.PACKED:
        values = reader.read_rows(layer.main, first, last)
        return Block(first, canonical_nvfp4(values) if layer.scheme is not None and layer.scheme.pair else values, scale)
    packed = Packed(
        reader.read_rows(layer.main, first, last),
        reader.read_rows(layer.tensors["weight_keep"], first, last),
        layer.scheme.pattern_stored(layer.pattern),
        layer.scheme.k_stored(layer.k),
    )
    pack.check_packed(packed, first_row=first)
    return Block(first, pack.restore(packed), scale, packed)


def _read_scale(reader: TensorReader, layer: Layer, first: int, last: int) -> Tensor | None:
    info = layer.tensors.get("weight_scale")
    if info is None:
        return None
    scale = reader.read_rows(info, first, last)
    scale = scale.float().view(last - first, 1) if layer.scheme.dynamic else scale
    pack.check_scale(scale, (last - first, scale.shape[1]), zero_allowed=layer.scheme.pair, first_row=first)
    return scale


def _ternary_rows(reader: TensorReader, layer: Layer, first: int, last: int) -> Tensor:
    """Rows of the unpacked matrix; each quarter of it lies in one bit pair of all packed rows."""
    quarter = layer.n // 4
    pieces = []
    while first < last:
        part = first // quarter
        stop = min(last, (part + 1) * quarter)
        packed = reader.read_rows(layer.main, first - part * quarter, stop - part * quarter)
        pieces.append(unpack_ternary(packed).view(4, stop - first, layer.k)[part])
        first = stop
    return torch.cat(pieces)


def mean_magnitude(reader: TensorReader, layer: Layer) -> float:
    """Mean |w| of a whole float layer, summed in float64."""
    total = sum(
        float(reader.read_rows(layer.main, first, last).abs().sum(dtype=torch.float64)) for first, last in row_ranges(layer.n, layer.k)
    )
    return total / max(layer.n * layer.k, 1)


def largest_magnitude(reader: TensorReader, layer: Layer) -> float:
    """max |w| of a whole float layer."""
    blocks = (reader.read_rows(layer.main, first, last) for first, last in row_ranges(layer.n, layer.k))
    return max((float(block.float().abs().max()) for block in blocks if block.numel()), default=0.0)
