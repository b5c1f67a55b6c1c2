"""Triton kernels that quantise, and lift, what RMSNorm or SwiGLU make of a row, without writing it in between.

Rows are cut as in `kernels_quantize`. Every rounding to the type of x that the unfused layers make is made here too, so only sums and
the exponential can differ from them. Compile without fusing multiplications and additions: that would skip roundings.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_quantize import begin, columns, float32, larger, load, no_magnitude, row_scale, store_chunk, store_padding


@triton.jit
def _rounded(x32, like, FUSED: tl.constexpr):
    """Round float32 to the type of ``like``; the interpreter's own conversion to bfloat16 cuts bits off (Triton 3.6)."""
    if FUSED or like.dtype != tl.bfloat16:
        return x32.to(like.dtype)
    else:
        bits = x32.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return tl.where(x32 == x32, nearest, tl.full(x32.shape, 0x7FC0, tl.int16).to(tl.bfloat16, bitcast=True))


@triton.jit
def _sum(a, b, FUSED: tl.constexpr, SM90: tl.constexpr):
    """a + b in their type. To round to float32 first, as torch does, changes nothing: that sum is exact, or b far too small to matter."""
    if SM90 and a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("add.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], a.dtype, is_pure=True, pack=2)
    elif SM90 and a.dtype == tl.float16:
        return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], a.dtype, is_pure=True, pack=2)
    else:
        return _rounded(float32(a) + float32(b), a, FUSED)


@triton.jit
def _product(a, b, FUSED: tl.constexpr, SM90: tl.constexpr):
    """a · b in their type; float32 holds the product of 16-bit elements exactly, so it is rounded once either way."""
    if SM90 and a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], a.dtype, is_pure=True, pack=2)
    elif SM90 and a.dtype == tl.float16:
        return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], a.dtype, is_pure=True, pack=2)
    else:
        return _rounded(float32(a) * float32(b), a, FUSED)


@triton.jit
def _norm_inputs(
    x, residual, rows, chunk, m, k, stride, residual_stride,
    PARTS: tl.constexpr, SPAN: tl.constexpr, SUMMED: tl.constexpr, FUSED: tl.constexpr, SM90: tl.constexpr,
):  # fmt: skip
    """The parts of a chunk of h = x, plus the residual if ``SUMMED``."""
    parts = ()
    for part in tl.static_range(PARTS):
        column = columns(chunk, part, SPAN)
        value = load(x, rows, column, m, k, stride)
        if SUMMED:
            value = _sum(value, load(residual, rows, column, m, k, residual_stride), FUSED, SM90)
        parts = parts + (value,)  # noqa: RUF005
    return parts


@triton.jit
def _store_total(total, value, rows, chunk, m, k, SPAN: tl.constexpr):
    column = columns(chunk, 0, SPAN)
    tl.store(total + (rows * k)[:, None, None] + column, value, mask=(rows < m)[:, None, None] & (column < k))


@triton.jit
def _more_squares(squares, value):
    value = float32(value)
    return tl.fma(value, value, squares)


@triton.jit
def _weights(weight, chunk, k, PARTS: tl.constexpr, SPAN: tl.constexpr):
    parts = ()
    for part in tl.static_range(PARTS):
        column = columns(chunk, part, SPAN)
        parts = parts + (tl.load(weight + column, mask=column < k, other=0.0),)  # noqa: RUF005
    return parts


@triton.jit
def _normed(parts, weights, square, inverse, FUSED: tl.constexpr, SM90: tl.constexpr):
    """A chunk times the row's inverse root mean square, rounded, times the weight, rounded; ``square`` is the row's sum of squares."""
    result = ()
    for part in tl.static_range(len(parts)):
        value = parts[part]
        if FUSED and value.dtype != tl.float32:
            # The float32 form that was squared is to be forgotten: kept, it fills twice the registers. A sum of squares has no sign, and
            # where it is NaN the row is poisoned anyway.
            zero = (square.to(tl.int32, bitcast=True) >> 31).to(tl.int16).to(value.dtype, bitcast=True)[:, None, None]
            value = tl.inline_asm_elementwise("xor.b32 $0, $1, $2;", "=r,r,r", [value, zero], value.dtype, is_pure=True, pack=2)
        normed = _rounded(float32(value) * inverse, value, FUSED)
        result = result + (_product(normed, weights[part], FUSED, SM90),)  # noqa: RUF005
    return result


@triton.jit(do_not_specialize=["m"])
def rms_norm_quantize_kernel(
    x, weight, residual, total, q, scale_out, m, k, width, stride, residual_stride, eps,
    SUMMED: tl.constexpr, BOUND: tl.constexpr, INT8: tl.constexpr, FUSED: tl.constexpr, SM90: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, PAD_TILES: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr, CACHED: tl.constexpr,
    COALESCED: tl.constexpr,
):  # fmt: skip
    """x, residual ``[m, k]``, weight ``[k]`` → total ``[m, k]``, q and scale_out as `quantize_kernel`."""
    begin(SM90)
    q = q.to(tl.pointer_type(tl.int32 if GROUP else tl.int8), bitcast=True)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros([ROWS, SPAN, 8], tl.float32)
    largest = no_magnitude(ROWS, SPAN, x.dtype.element_ty)
    values, weights = (), ()
    if CACHED:
        for chunk in tl.static_range(CHUNKS):
            parts = _norm_inputs(x, residual, rows, chunk, m, k, stride, residual_stride, PARTS, SPAN, SUMMED, FUSED, SM90)
            values = values + (parts,)  # noqa: RUF005
            weights = weights + (_weights(weight, chunk, k, PARTS, SPAN),)  # noqa: RUF005
        for chunk in tl.static_range(CHUNKS):
            squares = _more_squares(squares, values[chunk][0])
            # Not before: no load passes a store that may be to the same place.
            if SUMMED:
                _store_total(total, values[chunk][0], rows, chunk, m, k, SPAN)
    else:
        for chunk in range(CHUNKS):
            parts = _norm_inputs(x, residual, rows, chunk, m, k, stride, residual_stride, 1, SPAN, SUMMED, FUSED, SM90)
            squares = _more_squares(squares, parts[0])
            if SUMMED:
                _store_total(total, parts[0], rows, chunk, m, k, SPAN)
    square = tl.sum(tl.sum(squares, 2), 1)
    inverse = tl.rsqrt(square / k + eps)[:, None, None]
    normed = ()
    if CACHED:
        for chunk in tl.static_range(CHUNKS):
            parts = _normed(values[chunk], weights[chunk], square, inverse, FUSED, SM90)
            largest = larger(largest, parts[0], SM90)
            normed = normed + (parts,)  # noqa: RUF005
    else:
        for chunk in range(CHUNKS):
            parts = _norm_inputs(x, residual, rows, chunk, m, k, stride, residual_stride, 1, SPAN, SUMMED, FUSED, SM90)
            parts = _normed(parts, _weights(weight, chunk, k, 1, SPAN), square, inverse, FUSED, SM90)
            largest = larger(largest, parts[0], SM90)
    scale, by = row_scale(largest, BOUND, x.dtype.element_ty)
    tl.store(scale_out + rows, scale, mask=rows < m)
    if CACHED:
        for chunk in tl.static_range(CHUNKS):
            store_chunk(q, normed[chunk], by, rows, chunk, m, k, width, INT8, FUSED, GROUP, SPAN, COALESCED)
    else:
        for chunk in range(CHUNKS):
            parts = _norm_inputs(x, residual, rows, chunk, m, k, stride, residual_stride, PARTS, SPAN, SUMMED, FUSED, SM90)
            parts = _normed(parts, _weights(weight, chunk, k, PARTS, SPAN), square, inverse, FUSED, SM90)
            store_chunk(q, parts, by, rows, chunk, m, k, width, INT8, FUSED, GROUP, SPAN, COALESCED)
    store_padding(q, rows, m, k, width, GROUP, ROWS, SPAN, CHUNKS, PAD_TILES)


@triton.jit
def _sigmoid(x, FUSED: tl.constexpr):
    """1 / (1 + exp(-x)) to about two units in the last place; ``FUSED`` skips the steps that would keep subnormal results."""
    if FUSED:
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], tl.float32, is_pure=True, pack=1)
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gated(x, rows, chunk, m, k, stride, PARTS: tl.constexpr, SPAN: tl.constexpr, FUSED: tl.constexpr, SM90: tl.constexpr):
    """The parts of a chunk of silu(gate), rounded, times up, rounded; x holds the gates, k elements a row, then the ups."""
    parts = ()
    for part in tl.static_range(PARTS):
        column = columns(chunk, part, SPAN)
        value = load(x, rows, column, m, k, stride)
        up = load(x + k, rows, column, m, k, stride)
        gate = float32(value)
        gate = _rounded(gate * _sigmoid(gate, FUSED), value, FUSED)
        parts = parts + (_product(gate, up, FUSED, SM90),)  # noqa: RUF005
    return parts


@triton.jit(do_not_specialize=["m"])
def silu_mul_quantize_kernel(
    x, q, scale_out, m, k, width, stride,
    BOUND: tl.constexpr, INT8: tl.constexpr, FUSED: tl.constexpr, SM90: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    PAD_TILES: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, CHUNKS: tl.constexpr, CACHED: tl.constexpr,
    COALESCED: tl.constexpr,
):  # fmt: skip
    """x ``[m, 2k]``, gates first → q and scale_out as in `quantize_kernel`."""
    begin(SM90)
    q = q.to(tl.pointer_type(tl.int32 if GROUP else tl.int8), bitcast=True)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = no_magnitude(ROWS, SPAN, x.dtype.element_ty)
    values = ()
    if CACHED:
        for chunk in tl.static_range(CHUNKS):
            parts = _gated(x, rows, chunk, m, k, stride, PARTS, SPAN, FUSED, SM90)
            largest = larger(largest, parts[0], SM90)
            values = values + (parts,)  # noqa: RUF005
    else:
        for chunk in range(CHUNKS):
            parts = _gated(x, rows, chunk, m, k, stride, 1, SPAN, FUSED, SM90)
            largest = larger(largest, parts[0], SM90)
    scale, by = row_scale(largest, BOUND, x.dtype.element_ty)
    tl.store(scale_out + rows, scale, mask=rows < m)
    if CACHED:
        for chunk in tl.static_range(CHUNKS):
            store_chunk(q, values[chunk], by, rows, chunk, m, k, width, INT8, FUSED, GROUP, SPAN, COALESCED)
    else:
        for chunk in range(CHUNKS):
            parts = _gated(x, rows, chunk, m, k, stride, PARTS, SPAN, FUSED, SM90)
            store_chunk(q, parts, by, rows, chunk, m, k, width, INT8, FUSED, GROUP, SPAN, COALESCED)
    store_padding(q, rows, m, k, width, GROUP, ROWS, SPAN, CHUNKS, PAD_TILES)
