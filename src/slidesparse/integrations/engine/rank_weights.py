"""One rank's weights of a layer, by blocks of rows: packed weights are checked and cut, dense ones packed, others made up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import PatternError, WeightError
from ...format import Packed, Scheme
from ...packing import Shard, check_packed, check_scale, detect
from ...pattern import Pattern
from ...pruning import prune
from ...quantization import check_finite, quantize_weight

_BLOCK = 1 << 20
"""Weights per block of rows. What is derived on the way takes up to 16 bytes for each, and so stays below the 20 MB from which on
allocators of engines split no block: all layers' checks then share a few blocks, and none of these ends up under a smaller tensor."""


def blank(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to load weights into, filled with a value that no weight has: a row that keeps it was never loaded."""
    return torch.full(shape, -128 if dtype == torch.int8 else torch.nan, dtype=dtype)


def check_loaded(stored: Tensor) -> None:
    """Refuse rows that nothing was loaded into, and float weights that are not finite.

    Raises:
        WeightError: names the first such row.
    """
    for first, rows in _blocks(stored):
        untouched = (rows == -128) if rows.dtype == torch.int8 else rows.float().isnan()
        missing = untouched.all(-1)
        if bool(missing.any()):
            raise WeightError(f"row {first + int(missing.nonzero()[0])} was not in the checkpoint")
        check_finite(rows, first_row=first)


def cut(stored: Packed, scale: Tensor | None, shard: Shard) -> Packed:
    """The shard's own columns of the packed groups that it touches, checked.

    Raises:
        WeightError: keep-bits, values or scales are damaged, or were not loaded.
    """
    check_loaded(stored.values)
    for first, values in _blocks(stored.values):
        keep = stored.keep[first : first + values.shape[0]]
        check_packed(replace(stored, values=values, keep=keep), first_row=first)
    if scale is not None:
        check_scale(scale, (stored.n, 1))
    if shard.whole:
        return stored
    blocks = ((first, values, stored.keep[first : first + values.shape[0]]) for first, values in _blocks(stored.values))
    return _joined([shard.cut(replace(stored, values=values, keep=keep)) for _, values, keep in blocks])


def pack(weight: Tensor, scale: Tensor | None, k: int, start: int, candidates: Sequence[Pattern]) -> tuple[Packed, Shard]:
    """Pack a rank's dense columns ``[N, columns]``, which begin at ``start`` of ``k``, by the first candidate that they obey.

    Raises:
        PatternError: the columns obey no candidate; names row, group and values for the last one.
        WeightError: weights or scales are damaged, or were not loaded.
    """
    check_loaded(weight)
    if scale is not None:
        check_scale(scale, (weight.shape[0], 1))
    try:
        pattern = detect(_blocks(weight), candidates, start=start)
    except PatternError as nearest:
        raise nearest.reworded(f"obeys none of {', '.join(map(str, candidates))}: {nearest}") from nearest
    shard = Shard(pattern, k, start, start + weight.shape[1])
    return _joined([shard.pack(rows) for _, rows in _blocks(weight)]), shard


def made_up(n: int, shard: Shard, scheme: Scheme, device: torch.device) -> tuple[Packed, Tensor | None]:
    """Random weights of the shape and pattern, with their scales, for measurements without a checkpoint."""
    blocks: list[Packed] = []
    scales: list[Tensor] = []
    for first in range(0, n, rows := max(1, _BLOCK // shard.columns)):
        weight = torch.randn(min(rows, n - first), shard.columns, dtype=torch.float32, device=device) * shard.k**-0.5
        values, scale = quantize_weight(prune(weight, shard.pattern, offset=shard.offset // shard.pattern.unit), scheme)
        blocks.append(shard.pack(values))
        scales += [] if scale is None else [scale]
    return _joined(blocks), torch.cat(scales) if scales else None


def _blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _BLOCK // max(rows.shape[1], 1))
    return ((first, rows[first : first + step]) for first in range(0, rows.shape[0], step))


def _joined(blocks: list[Packed]) -> Packed:
    if len(blocks) == 1:
        return blocks[0]
    values = torch.cat([block.values.view(torch.uint8) for block in blocks]).view(blocks[0].values.dtype)
    return replace(blocks[0], values=values, keep=torch.cat([block.keep for block in blocks]))
