"""Triton kernels of per-token quantisation and of the lift, one program per block of rows.

A chunk is ``BLOCK`` columns of a program's rows; ``CHUNKS`` of them cover a row and, if ``CACHED``, stay in registers between finding
the largest magnitude and dividing. Only the layer's lifted form reads elements twice, and then the row is in the L1 cache.

Division. A correctly rounded x / s is a sequence of ten instructions with a slow path. The fused form divides once per row, r = 1/s,
and corrects x·r twice with exact residues, which gives the same float32 (Markstein's theorem: a faithful quotient, corrected with the
correctly rounded reciprocal, is correctly rounded) as long as no residue underflows. Rows where one might take the plain division.
Quotients under 2^-11 may still lose bits: both output types round them to zero, whose sign is restored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _float32(x):
    """Exact widening; bfloat16 by its bits, because the interpreter's own conversion gets subnormals wrong (Triton 3.6)."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _row_scale(largest, BOUND: tl.constexpr, FUSED: tl.constexpr):
    """Magnitudes float32 ``[ROWS, BLOCK]`` → per row the scale, its reciprocal and the bound to clamp to (0 on a row with NaN or Inf),
    and whether any row needs the plain division: NaN or Inf, zeros only, or values so extreme that residues may underflow."""
    # Bits of magnitudes order as integers, NaN and Inf above every number.
    bits = tl.max(largest.to(tl.int32, bitcast=True), 1)
    finite = bits < 0x7F800000
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full(bits.shape, BOUND, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where(finite, scale, float("nan"))
    inverse = tl.div_rn(tl.full(bits.shape, 1.0, tl.float32), scale)
    # 2^-30 and 2^60 as bits.
    plain = tl.max(((bits < 0x30800000) | (bits > 0x5D800000)).to(tl.int32), 0) > 0 if FUSED else True
    return scale, inverse, tl.where(finite, BOUND, 0.0), plain


@triton.jit
def _quantise(x, scale, inverse, bound, plain, INT8: tl.constexpr):
    """x of any float type → bytes (int8) of its quotient; the row's numbers broadcast against it."""
    x32 = _float32(x)
    if plain:
        quotient = tl.div_rn(x32, scale + tl.zeros_like(x32))
        # A poisoned row has the bound 0.
        quotient = tl.where(bound > 0.0, tl.minimum(tl.maximum(quotient, -bound), bound), 0.0)
    else:
        # |x / s| exceeds the bound by a rounding error at most, which the conversions take.
        quotient = x32 * inverse
        quotient = tl.fma(tl.fma(-quotient, scale, x32), inverse, quotient)
        quotient = tl.fma(tl.fma(-quotient, scale, x32), inverse, quotient)
        if not INT8:
            sign = x32.to(tl.int32, bitcast=True) & -0x80000000
            quotient = (quotient.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    if INT8:
        # Adding 1.5 · 2^23 rounds to nearest even and leaves the integer in the low bits.
        return (quotient + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return quotient.to(tl.float8e4nv).to(tl.int8, bitcast=True)


@triton.jit
def _load(x, rows, columns, m, k, stride):
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _larger(largest, value):
    return tl.maximum(largest, tl.abs(_float32(value)), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_kernel(
    x, q, scale_out, m, k, width, stride,
    BOUND: tl.constexpr, INT8: tl.constexpr, FUSED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """x ``[m, k]`` of row stride ``stride`` → q int8 ``[m, width]``, scale_out ``[m]``; columns from k on become 0."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    values = ()
    if CACHED:
        for chunk in tl.static_range(CHUNKS):
            values = values + (_load(x, rows, chunk * BLOCK + lane, m, k, stride),)  # noqa: RUF005
        for chunk in tl.static_range(CHUNKS):
            largest = _larger(largest, values[chunk])
    else:
        for chunk in range(CHUNKS):
            largest = _larger(largest, _load(x, rows, chunk * BLOCK + lane, m, k, stride))
    scale, inverse, bound, plain = _row_scale(largest, BOUND, FUSED)
    tl.store(scale_out + rows, scale, mask=rows < m)
    scale, inverse, bound = scale[:, None], inverse[:, None], bound[:, None]
    out = q + rows[:, None] * width
    if CACHED:
        for chunk in tl.static_range(CHUNKS):
            byte = _quantise(values[chunk], scale, inverse, bound, plain, INT8)
            column = chunk * BLOCK + lane[None, :]
            tl.store(out + column, byte, mask=(rows < m)[:, None] & (column < width))
    else:
        for chunk in range(CHUNKS):
            value = _load(x, rows, chunk * BLOCK + lane, m, k, stride)
            byte = _quantise(value, scale, inverse, bound, plain, INT8)
            column = chunk * BLOCK + lane[None, :]
            tl.store(out + column, byte, mask=(rows < m)[:, None] & (column < width))


@triton.jit
def _lifted(x, rows, word, m, k, slid, stride, GROUP: tl.constexpr, N: tl.constexpr, L: tl.constexpr, WINDOWS: tl.constexpr,
            OFFSET: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Elements of the lifted rows by words of ``LANES`` that stand side by side in the source, 0 outside it: ``[ROWS, words, LANES]``."""
    lane = tl.arange(0, LANES)[None, :]
    group, slot = word // (WINDOWS * (L // LANES)), word % (WINDOWS * (L // LANES))
    first = group * GROUP + (slot // (L // LANES)) * N + (slot % (L // LANES)) * LANES
    source = first[:, None] + lane
    inside = (source < k + OFFSET) & ((word * LANES)[:, None] + lane < slid)
    if OFFSET > 0:
        inside = inside & (source >= OFFSET)
        source = source - OFFSET
    pointer = x + (rows * stride)[:, None, None] + source[None, :, :]
    return tl.load(pointer, mask=(rows < m)[:, None, None] & inside[None, :, :], other=0)


@triton.jit
def _store_lifted(out, value, rows, word, m, width, LANES: tl.constexpr):
    column = (word * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    pointer = out + (rows * width)[:, None, None] + column[None, :, :]
    tl.store(pointer, value, mask=(rows < m)[:, None, None] & (column < width)[None, :, :])


@triton.jit
def quantize_lift_kernel(
    x, q, scale_out, m, k, slid, width, stride,
    BOUND: tl.constexpr, INT8: tl.constexpr, FUSED: tl.constexpr,
    GROUP: tl.constexpr, N: tl.constexpr, L: tl.constexpr, WINDOWS: tl.constexpr, OFFSET: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """x ``[m, k]`` → q int8 ``[m, width]``: the quantised rows lifted to ``slid`` columns, 0 from there on; scale_out ``[m]``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    if UNROLL:
        values = ()
        for chunk in tl.static_range(CHUNKS):
            values = values + (_load(x, rows, chunk * BLOCK + lane, m, k, stride),)  # noqa: RUF005
        for chunk in tl.static_range(CHUNKS):
            largest = _larger(largest, values[chunk])
    else:
        for chunk in range(CHUNKS):
            largest = _larger(largest, _load(x, rows, chunk * BLOCK + lane, m, k, stride))
    scale, inverse, bound, plain = _row_scale(largest, BOUND, FUSED)
    tl.store(scale_out + rows, scale, mask=rows < m)
    scale, inverse, bound = scale[:, None, None], inverse[:, None, None], bound[:, None, None]
    for tile in range(TILES):
        word = tile * WORDS + tl.arange(0, WORDS)
        value = _lifted(x, rows, word, m, k, slid, stride, GROUP, N, L, WINDOWS, OFFSET, LANES)
        byte = _quantise(value, scale, inverse, bound, plain, INT8)
        _store_lifted(q, byte, rows, word, m, width, LANES)


@triton.jit
def quantize_lift8_kernel(
    x, q, scale_out, m, k, slid, width, stride,
    BOUND: tl.constexpr, INT8: tl.constexpr, FUSED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, PAD_TILES: tl.constexpr,
):  # fmt: skip
    """`quantize_lift_kernel` for 6:8 on 2:4 hardware, no offset: a thread holds whole groups, so every byte is divided once.

    q is int32 ``[m, width / 4]``, one window a word; slid and width count words.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    values = ()
    for chunk in tl.static_range(CHUNKS):
        values = values + (_load(x, rows, chunk * BLOCK + lane, m, k, stride),)  # noqa: RUF005
    for chunk in tl.static_range(CHUNKS):
        largest = _larger(largest, values[chunk])
    scale, inverse, bound, plain = _row_scale(largest, BOUND, FUSED)
    tl.store(scale_out + rows, scale, mask=rows < m)
    scale, inverse, bound = scale[:, None], inverse[:, None], bound[:, None]
    out = q + rows[:, None] * width
    for chunk in tl.static_range(CHUNKS):
        byte = _quantise(values[chunk], scale, inverse, bound, plain, INT8)
        even, odd = tl.split(byte.reshape(ROWS, BLOCK // 8, 4, 2))
        pairs = (even.to(tl.int32) & 255) | ((odd.to(tl.int32) & 255) << 8)
        low, high = tl.split(pairs.reshape(ROWS, BLOCK // 8, 2, 2))
        first, third = tl.split(low)
        second, fourth = tl.split(high)
        word = 3 * (chunk * (BLOCK // 8) + tl.arange(0, BLOCK // 8))[None, :]
        inside = (rows < m)[:, None] & (word < slid)
        tl.store(out + word, first | (second << 16), mask=inside)
        tl.store(out + word + 1, second | (third << 16), mask=inside)
        tl.store(out + word + 2, third | (fourth << 16), mask=inside)
    for tile in range(PAD_TILES):
        pad = slid + tile * BLOCK + lane[None, :]
        tl.store(out + pad, tl.zeros([ROWS, BLOCK], tl.int32), mask=(rows < m)[:, None] & (pad < width))


@triton.jit
def lift_kernel(
    x, y, m, k, slid, width, stride,
    GROUP: tl.constexpr, N: tl.constexpr, L: tl.constexpr, WINDOWS: tl.constexpr, OFFSET: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """x ``[m, k]`` of any integer type → y ``[m, width]``: the lifted rows, 0 from ``slid`` on."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for tile in range(TILES):
        word = tile * WORDS + tl.arange(0, WORDS)
        value = _lifted(x, rows, word, m, k, slid, stride, GROUP, N, L, WINDOWS, OFFSET, LANES)
        _store_lifted(y, value, rows, word, m, width, LANES)
