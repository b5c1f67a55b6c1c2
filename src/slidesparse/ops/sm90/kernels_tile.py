"""The Triton kernel that puts slid weights into tiles; `slidesparse.ops.sm90.layout.tile` is its oracle."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _positions(word, SIZE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """Where the two values of a window lie: its non-zeros, and neighbours where there are fewer than two."""
    mask = (word & MAGNITUDE) != 0
    mask = mask | (((word >> (8 * SIZE)) & MAGNITUDE) != 0) * 2
    mask = mask | (((word >> (16 * SIZE)) & MAGNITUDE) != 0) * 4 | (((word >> (24 * SIZE)) & MAGNITUDE) != 0) * 8
    lowest = tl.where(mask & 1 != 0, 0, tl.where(mask & 2 != 0, 1, tl.where(mask & 4 != 0, 2, 3)))
    highest = tl.where(mask & 8 != 0, 3, tl.where(mask & 4 != 0, 2, tl.where(mask & 2 != 0, 1, 0)))
    alone = lowest >= highest
    first = tl.where(mask == 0, 0, tl.where(alone, tl.minimum(lowest, 2), lowest))
    second = tl.where(mask == 0, 1, tl.where(alone, tl.minimum(lowest, 2) + 1, highest))
    return first, second


@triton.jit
def tile_kernel(slid, out, n, windows, across, SIZE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """One half of a tile: ``slid [N, K' / 4]`` in windows of four values of SIZE bytes → values and metadata of ``out``."""
    half, step = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 64)[:, None, None]
    block = tl.arange(0, 4)[None, :, None]
    inside = tl.arange(0, 8 // SIZE)[None, None, :]
    rows, window = half * 64 + row, step * (32 // SIZE) + block * (8 // SIZE) + inside
    word = tl.load(slid + rows.to(tl.int64) * windows + window, mask=(rows < n) & (window < windows), other=0)
    first, second = _positions(word, SIZE, MAGNITUDE)
    ones: tl.constexpr = (1 << (8 * SIZE)) - 1
    values = ((word >> (8 * SIZE * first)) & ones) | (((word >> (8 * SIZE * second)) & ones) << (8 * SIZE))
    start = ((half // 2).to(tl.int64) * across + step) * (8192 + 2048 // SIZE) + (half % 2) * (4096 + 1024 // SIZE)
    place = row * 64 + (block ^ ((row >> 1) & 3)) * 16 + inside * (2 * SIZE)
    pair: tl.constexpr = tl.int16 if SIZE == 1 else tl.int32
    tl.store((out + start + place).to(tl.pointer_type(pair)), values.to(pair))
    words = tl.sum((first | (second << 2)) << (4 * inside), axis=2)
    row, block = tl.arange(0, 64)[:, None], tl.arange(0, 4)[None, :]
    thread, other = (row >> 4) * 32 + (row & 7) * 4, (row >> 3) & 1
    if SIZE == 1:
        place = (block >> 1) * 512 + (thread + (block & 1) * 2 + other) * 4
        tl.store((out + start + 4096 + place).to(tl.pointer_type(tl.int32)), words)
    else:
        place = (thread + block) * 4 + other * 2
        tl.store((out + start + 4096 + place).to(tl.pointer_type(tl.int16)), words.to(tl.int16))
