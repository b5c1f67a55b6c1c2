"""Triton kernels of per-token quantisation and of the lift, one program per block of rows.

A program cuts its rows into chunks of ``SPAN`` times eight elements, eight a thread, one vector load. The chunks of a row, if ``CACHED``,
stay in registers between finding the largest magnitude and dividing, so every element is read and divided once. A lifted window of 2:4
hardware is two neighbouring pairs of bytes: pair p starts window p - p // (group / 2), the last pair of a group none. Threads whose last
pair may start one read the pair behind it too.

Division. A correctly rounded x / s is a sequence of ten instructions with a slow path. Here each row divides once, r = 1 / s, and each
element multiplies. 16-bit elements multiply by r to 48 bits, kept as two floats: x · low is rounded, x · high is not (one fused
multiply-add), and for every 16-bit x, and every largest x of which s is made, that gives the same byte; tests try them all. Float32
elements correct x · r twice with exact residues, which gives the same float32 (Markstein's theorem: a faithful quotient, corrected with
the correctly rounded reciprocal, is correctly rounded) as long as no residue underflows. Rows so small or so large that one might are
first scaled by a power of two; quotients under 2^-11 may still lose bits, and both output types round them to zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..compat.triton import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(SM90: tl.constexpr):
    """Wait for the kernel before, and let the next kernel start: nothing is read or written until the one before is done.

    The order matters. The next kernel may read weights at once, and the one before may have written them.
    """
    if SM90:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def float32(x):
    """Exact widening; bfloat16 by its bits, because the interpreter's own conversion gets subnormals wrong (Triton 3.6)."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def no_magnitude(ROWS: tl.constexpr, SPAN: tl.constexpr, TYPE: tl.constexpr):
    """What `larger` begins with."""
    return tl.zeros([ROWS, SPAN, 8], tl.int32 if tl.float32 == TYPE else tl.int16)


@triton.jit
def larger(largest, value, SM90: tl.constexpr):
    """Elementwise the larger of magnitudes, as integers, and those of value: their bits order so, NaN and Inf above every number."""
    if value.dtype == tl.float32:
        return tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    elif SM90:
        # Two at a time, and in the type of value: its float32 form, if found here, would be kept and fill twice the registers.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 magnitude; and.b32 magnitude, $2, 0x7fff7fff; max.u16x2 $0, $1, magnitude; }", "=r,r,r",
            [largest, value.to(tl.int16, bitcast=True)], tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.maximum(largest, value.to(tl.int16, bitcast=True) & 0x7FFF)


@triton.jit
def row_scale(largest, BOUND: tl.constexpr, TYPE: tl.constexpr):
    """Magnitudes `larger` of ``TYPE`` → scale ``[ROWS]`` and what `_quantise` divides by, each ``[ROWS, 1, 1]``."""
    bits = tl.max(tl.max(largest.to(tl.int32), 2), 1)
    if tl.bfloat16 == TYPE:
        bits = bits << 16
    elif tl.float16 == TYPE:
        bits = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    finite = bits < 0x7F800000
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full(bits.shape, BOUND, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    # Below 2^-30 and above 2^60; 0 on a row with NaN or Inf.
    factor = tl.where(bits < 0x30800000, 1.2379400392853803e27, tl.where(bits > 0x5D800000, 5.421010862427522e-20, 1.0))
    divisor = tl.where(finite, scale * factor, 1.0)
    limit = tl.where(finite, divisor * BOUND, 0.0)
    extreme = tl.max((factor != 1.0).to(tl.int32), 0) > 0
    high = tl.div_rn(tl.full(bits.shape, 1.0, tl.float32), divisor)
    low = tl.fma(-high, divisor, 1.0)
    if tl.float32 != TYPE:
        # Rounded down, so that x · low has the sign of x, also of a zero.
        high = tl.where(low < 0.0, (high.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True), high)
        low = tl.fma(-high, divisor, 1.0) * high
    high, low, divisor = high[:, None, None], low[:, None, None], divisor[:, None, None]
    by = (high, low, divisor, factor[:, None, None], limit[:, None, None], extreme)
    return tl.where(finite, scale, float("nan")), by


@triton.jit
def _quantise(x, by, INT8: tl.constexpr, FUSED: tl.constexpr):
    """x of any float type ``[ROWS, …, …]`` → bytes (int8) of its quotient."""
    high, low, divisor, factor, limit, extreme = by
    x32 = float32(x)
    if extreme:
        # The limit is 0 on a poisoned row, and matters where the scale is subnormal and lost bits.
        x32 = tl.where(limit > 0.0, tl.minimum(tl.maximum(x32 * factor, -limit), limit), 0.0)
    if not FUSED:
        quotient = tl.div_rn(x32, divisor + tl.zeros_like(x32))
    elif x.dtype == tl.float32:
        quotient = x32 * high
        quotient = tl.fma(tl.fma(-quotient, divisor, x32), high, quotient)
        quotient = tl.fma(tl.fma(-quotient, divisor, x32), high, quotient)
        sign = x32.to(tl.int32, bitcast=True) & -0x80000000
        quotient = (quotient.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        quotient = tl.fma(x32, high + tl.zeros_like(x32), x32 * low)
    if INT8:
        # |x / s| exceeds the bound by a rounding error at most. Adding 1.5 · 2^23 rounds to nearest even, the integer in the low bits.
        return (quotient + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return quotient.to(tl.float8e4nv).to(tl.int8, bitcast=True)


@triton.jit
def columns(chunk, part, SPAN: tl.constexpr):
    """Columns ``[1, SPAN, 8]`` of a chunk; of part 1 ``[1, SPAN, 2]``, the pair behind each eight."""
    first = (chunk * SPAN + tl.arange(0, SPAN)) * 8
    lane = tl.arange(0, 8) if part == 0 else tl.arange(0, 2) + 8
    return (first[:, None] + lane[None, :])[None, :, :]


@triton.jit
def load(x, rows, column, m, k, stride):
    pointer = x + (rows * stride)[:, None, None] + column
    return tl.load(pointer, mask=(rows < m)[:, None, None] & (column < k), other=0.0)


@triton.jit
def load_chunk(x, rows, chunk, m, k, stride, SPAN: tl.constexpr, PARTS: tl.constexpr):
    """The parts of a chunk; 0 outside x."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (load(x, rows, columns(chunk, part, SPAN), m, k, stride),)  # noqa: RUF005
    return parts


@triton.jit
def _store_bytes(out, byte, rows, column, m, width):
    pointer = out + (rows * width)[:, None, None] + column
    tl.store(pointer, byte, mask=(rows < m)[:, None, None] & (column < width))


@triton.jit
def _neighbours(byte):
    """Bytes ``[ROWS, SPAN, n]`` → int32 ``[ROWS, SPAN, n / 2]``, each two neighbours."""
    even, odd = tl.split(byte.reshape(byte.shape[0], byte.shape[1], byte.shape[2] // 2, 2))
    return (even.to(tl.int32) & 255) | ((odd.to(tl.int32) & 255) << 8)


@triton.jit
def _store_windows(out, byte, behind, rows, chunk, m, k, width, SPAN: tl.constexpr, GROUP: tl.constexpr, COALESCED: tl.constexpr):
    """Store the windows of a chunk's bytes, and of the pairs behind each eight: words of two pairs side by side, in one group."""
    ROWS: tl.constexpr = byte.shape[0]
    HALF: tl.constexpr = GROUP // 2
    low, high = tl.split(_neighbours(byte).reshape(ROWS, SPAN, 2, 2))
    first, third = tl.split(low)
    second, fourth = tl.split(high)
    words = (first | (second << 16), second | (third << 16), third | (fourth << 16))
    if GROUP != 8:
        words = words + (fourth | (_neighbours(behind).reshape(ROWS, SPAN) << 16),)  # noqa: RUF005
    line, bound = out + (rows * width)[:, None], tl.cdiv(k, GROUP) * HALF
    if GROUP == 8 and not COALESCED:
        group = chunk * SPAN + tl.arange(0, SPAN)
        for i in tl.static_range(3):
            tl.store(line + (group * 3 + i)[None, :], words[i], mask=(rows < m)[:, None] & (group * 4 < bound)[None, :])
    else:
        words = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[len(words) - 1]))
        pair = chunk * SPAN * 4 + tl.arange(0, SPAN * 4)
        inside = (pair < bound) & (pair % HALF != HALF - 1)
        tl.store(line + (pair - pair // HALF)[None, :], words.reshape(ROWS, SPAN * 4), mask=(rows < m)[:, None] & inside[None, :])


@triton.jit
def store_chunk(
    q, parts, by, rows, chunk, m, k, width, INT8: tl.constexpr, FUSED: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    COALESCED: tl.constexpr,
):  # fmt: skip
    """Quantise a chunk, a tuple of parts of any float type, and store it: its bytes, or if there is a ``GROUP`` its windows."""
    byte = _quantise(parts[0], by, INT8, FUSED)
    if GROUP == 0:
        _store_bytes(q, byte, rows, columns(chunk, 0, SPAN), m, width)
    else:
        behind = _quantise(parts[1], by, INT8, FUSED) if len(parts) > 1 else byte
        _store_windows(q, byte, behind, rows, chunk, m, k, width, SPAN, GROUP, COALESCED)


@triton.jit
def store_padding(
    out, rows, m, k, width, GROUP: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Zero the words of lifted rows behind the last group, and those of its end that no chunk reached."""
    for tile in range(TILES):
        done = tl.minimum(tl.cdiv(k, GROUP) * (GROUP // 2), CHUNKS * SPAN * 4)
        word = (done - done // (GROUP // 2) + tile * SPAN + tl.arange(0, SPAN))[None, :]
        tl.store(out + (rows * width)[:, None] + word, tl.zeros([ROWS, SPAN], tl.int32), mask=(rows < m)[:, None] & (word < width))


@triton.jit(do_not_specialize=["m"])
def quantize_kernel(
    x, q, scale_out, m, k, width, stride,
    BOUND: tl.constexpr, INT8: tl.constexpr, FUSED: tl.constexpr, SM90: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    PAD_TILES: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr, CACHED: tl.constexpr,
    COALESCED: tl.constexpr,
):  # fmt: skip
    """x ``[m, k]`` of row stride ``stride`` → q ``[m, width]`` and scale_out ``[m]``; columns past the row's become 0.

    Without ``GROUP`` bytes are stored, with it (n:l is 2:4, no offset) words, one window each, and width counts them.
    """
    begin(SM90)
    q = q.to(tl.pointer_type(tl.int32 if GROUP else tl.int8), bitcast=True)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = no_magnitude(ROWS, SPAN, x.dtype.element_ty)
    values = ()
    if CACHED:
        for chunk in tl.static_range(CHUNKS):
            values = values + (load_chunk(x, rows, chunk, m, k, stride, SPAN, PARTS),)  # noqa: RUF005
        for chunk in tl.static_range(CHUNKS):
            largest = larger(largest, values[chunk][0], SM90)
    else:
        for chunk in range(CHUNKS):
            largest = larger(largest, load(x, rows, columns(chunk, 0, SPAN), m, k, stride), SM90)
    scale, by = row_scale(largest, BOUND, x.dtype.element_ty)
    tl.store(scale_out + rows, scale, mask=rows < m)
    if CACHED:
        for chunk in tl.static_range(CHUNKS):
            store_chunk(q, values[chunk], by, rows, chunk, m, k, width, INT8, FUSED, GROUP, SPAN, COALESCED)
    else:
        for chunk in range(CHUNKS):
            parts = load_chunk(x, rows, chunk, m, k, stride, SPAN, PARTS)
            store_chunk(q, parts, by, rows, chunk, m, k, width, INT8, FUSED, GROUP, SPAN, COALESCED)
    store_padding(q, rows, m, k, width, GROUP, ROWS, SPAN, CHUNKS, PAD_TILES)


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
    _store_bytes(out, value, rows, column[None, :, :], m, width)


@triton.jit(do_not_specialize=["m"])
def quantize_gather_kernel(
    x, q, scale_out, m, k, slid, width, stride,
    BOUND: tl.constexpr, INT8: tl.constexpr, FUSED: tl.constexpr, SM90: tl.constexpr,
    GROUP: tl.constexpr, N: tl.constexpr, L: tl.constexpr, WINDOWS: tl.constexpr, OFFSET: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """x ``[m, k]`` → q ``[m, width]``, any pattern and offset: the row is read again, from cache, in lifted order."""
    begin(SM90)
    q = q.to(tl.pointer_type(tl.int8), bitcast=True)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = no_magnitude(ROWS, SPAN, x.dtype.element_ty)
    for chunk in range(CHUNKS):
        largest = larger(largest, load(x, rows, columns(chunk, 0, SPAN), m, k, stride), SM90)
    scale, by = row_scale(largest, BOUND, x.dtype.element_ty)
    tl.store(scale_out + rows, scale, mask=rows < m)
    for tile in range(TILES):
        word = tile * WORDS + tl.arange(0, WORDS)
        value = _lifted(x, rows, word, m, k, slid, stride, GROUP, N, L, WINDOWS, OFFSET, LANES)
        _store_lifted(q, _quantise(value, by, INT8, FUSED), rows, word, m, width, LANES)


@triton.jit(do_not_specialize=["m"])
def lift_kernel(
    x, y, m, k, slid, width, stride, SM90: tl.constexpr,
    GROUP: tl.constexpr, N: tl.constexpr, L: tl.constexpr, WINDOWS: tl.constexpr, OFFSET: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """x ``[m, k]`` of any integer type → y ``[m, width]``: the lifted rows, 0 from ``slid`` on."""
    begin(SM90)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for tile in range(TILES):
        word = tile * WORDS + tl.arange(0, WORDS)
        value = _lifted(x, rows, word, m, k, slid, stride, GROUP, N, L, WINDOWS, OFFSET, LANES)
        _store_lifted(y, value, rows, word, m, width, LANES)
