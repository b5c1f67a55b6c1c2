"""The Triton kernel that puts slid weights into tiles; `slidesparse.ops.sm90.layout.tile` is its oracle."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _positions(word, MAGNITUDE: tl.constexpr):
    """Where the two values of a window lie: its non-zeros, and neighbours where there are fewer than two."""
    mask = (word & MAGNITUDE) != 0
    mask = mask | (((word >> 8) & MAGNITUDE) != 0) * 2 | (((word >> 16) & MAGNITUDE) != 0) * 4 | (((word >> 24) & MAGNITUDE) != 0) * 8
    lowest = tl.where(mask & 1 != 0, 0, tl.where(mask & 2 != 0, 1, tl.where(mask & 4 != 0, 2, 3)))
    highest = tl.where(mask & 8 != 0, 3, tl.where(mask & 4 != 0, 2, tl.where(mask & 2 != 0, 1, 0)))
    alone = lowest >= highest
    first = tl.where(mask == 0, 0, tl.where(alone, tl.minimum(lowest, 2), lowest))
    second = tl.where(mask == 0, 1, tl.where(alone, tl.minimum(lowest, 2) + 1, highest))
    return first, second


@triton.jit
def tile_kernel(slid, out, n, windows, across, MAGNITUDE: tl.constexpr):
    """One half of a tile, 64 rows by 32 windows: ``slid [N, K' / 4]`` in words → values uint16 and metadata int32 of ``out``."""
    half, step = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 64)[:, None, None]
    block = tl.arange(0, 4)[None, :, None]
    inside = tl.arange(0, 8)[None, None, :]
    rows, window = half * 64 + row, step * 32 + block * 8 + inside
    word = tl.load(slid + rows.to(tl.int64) * windows + window, mask=(rows < n) & (window < windows), other=0)
    first, second = _positions(word, MAGNITUDE)
    values = ((word >> (8 * first)) & 255) | (((word >> (8 * second)) & 255) << 8)
    start = ((half // 2).to(tl.int64) * across + step) * 10240 + (half % 2) * 5120
    place = row * 64 + (block ^ ((row >> 1) & 3)) * 16 + inside * 2
    tl.store((out + start + place).to(tl.pointer_type(tl.int16)), values.to(tl.int16))
    words = tl.sum((first | (second << 2)) << (4 * inside), axis=2)
    row, block = tl.arange(0, 64)[:, None], tl.arange(0, 4)[None, :]
    thread = (row >> 4) * 32 + (row & 7) * 4 + (block & 1) * 2 + ((row >> 3) & 1)
    tl.store((out + start + 4096 + (block >> 1) * 512 + thread * 4).to(tl.pointer_type(tl.int32)), words)
