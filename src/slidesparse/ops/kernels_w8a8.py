"""Triton kernels of the int8 linear layer: exact int32 sums of one output tile a program, then scales and bias in float32.

Where few tokens make the layer a read of the weights, the product is computed transposed: a tensor core's tile has at least 64 rows
(16 without warp groups) but as few as 8 columns, so the weights are its rows and the tokens its columns. Where output tiles are fewer
than multiprocessors, K is split: programs store partial sums, and a second kernel adds them; integers, so any order is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(tile, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Row and column of a tile; runs of tiles share ``GROUP`` rows of tiles, so that what they read stays in the L2 cache."""
    run = tile // (GROUP * n_tiles)
    rows = tl.minimum(m_tiles - run * GROUP, GROUP)
    inside = tile % (GROUP * n_tiles)
    return run * GROUP + inside % rows, inside // rows


@triton.jit
def _block(x, row, column, rows, k, stride, ROWS: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """``[ROWS, BK]`` of the int8 matrix ``[rows, k]``, 0 past k; rows past the last hold anything."""
    if DESCRIPTOR:
        block = x.load([row, column])
    else:
        r = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        c = column + tl.arange(0, BK)
        pointer = x + r[:, None] * stride + c[None, :]
        block = tl.load(pointer) if EVEN else tl.load(pointer, mask=c[None, :] < k, other=0)
    return block


@triton.jit
def _sums(q, w, row, column, first, steps, q_rows, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
          SWAP: tl.constexpr, EVEN: tl.constexpr, DESCRIPTOR: tl.constexpr):  # fmt: skip
    """Exact int32 sums of one tile over ``steps`` blocks of K from ``first`` on: ``[BM, BN]``, or ``[BN, BM]`` if ``SWAP``."""
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.int32)
    for i in range(steps):
        step = first + i
        a = _block(q, row, step * BK, q_rows, k, k, BM, BK, EVEN, DESCRIPTOR)
        b = _block(w, column, step * BK, n, k, k, BN, BK, EVEN, DESCRIPTOR)
        acc = tl.dot(b, a.T, acc, out_dtype=tl.int32) if SWAP else tl.dot(a, b.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _factors(x_scale, w_scale, bias, r, c, m, n, BIAS: tl.constexpr):
    """Scales and bias of the tokens ``r`` and outputs ``c``."""
    x = tl.load(x_scale + r, mask=r < m, other=0.0)
    w = tl.load(w_scale + c, mask=c < n, other=0.0)
    b = tl.load(bias + c, mask=c < n, other=0.0) if BIAS else w
    return x, w, b


@triton.jit
def _finish(acc, y, x, w, b, r, c, inside, n, BIAS: tl.constexpr):
    """Scale, add the bias and store sums of the tokens ``r`` and outputs ``c`` that are ``inside``; everything broadcasts.

    Three float32 operations, each rounded: the kernels are compiled without contraction to fma.
    """
    value = acc.to(tl.float32) * w * x
    if BIAS:
        value = value + b.to(tl.float32)
    tl.store(y + r.to(tl.int64) * n + c, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _emit(acc, y, x_scale, w_scale, bias, row, column, part, m, n, SPLIT: tl.constexpr, BIAS: tl.constexpr, PIECES: tl.constexpr):
    """Finish the tile ``acc [BM, BN]``, or store its partial sums, in ``PIECES``: small ones spare registers and shared memory."""
    if PIECES > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1))
        _emit(left, y, x_scale, w_scale, bias, row, column, part, m, n, SPLIT, BIAS, PIECES // 2)
        _emit(right, y, x_scale, w_scale, bias, row, column + HALF, part, m, n, SPLIT, BIAS, PIECES // 2)
    else:
        r, c = (row + tl.arange(0, acc.shape[0]))[:, None], (column + tl.arange(0, acc.shape[1]))[None, :]
        if SPLIT > 1:
            tl.store(y + (part * m + r).to(tl.int64) * n + c, acc, mask=(r < m) & (c < n))
        else:
            x, w, b = _factors(x_scale, w_scale, bias, r, c, m, n, BIAS)
            _finish(acc, y, x, w, b, r, c, (r < m) & (c < n), n, BIAS)


@triton.jit(do_not_specialize=["q_rows", "m", "steps"])
def tile_kernel(
    q, w, y, x_scale, w_scale, bias, q_rows, m, n, k, steps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    SWAP: tl.constexpr, EVEN: tl.constexpr, DESCRIPTOR: tl.constexpr, BIAS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One output tile, or one of ``SPLIT`` parts of its sums, a program.

    q int8 ``[q_rows, k]`` and w int8 ``[n, k]`` as tensor descriptors or pointers; y ``[m, n]``, or int32 ``[SPLIT, m, n]``; ``steps``
    blocks of K a program. What changes from call to call is no reason to compile again.
    """
    m_tiles, n_tiles = tl.cdiv(m, BM), tl.cdiv(n, BN)
    tile, part = tl.program_id(0) % (m_tiles * n_tiles), tl.program_id(0) // (m_tiles * n_tiles)
    i, j = _place(tile, m_tiles, n_tiles, GROUP)
    row, column = i * BM, j * BN
    if SWAP:
        r, c = (row + tl.arange(0, BM))[None, :], (column + tl.arange(0, BN))[:, None]
        if SPLIT == 1:
            # Ahead of the loop: a short one would otherwise end by waiting for them.
            x, u, b = _factors(x_scale, w_scale, bias, r, c, m, n, BIAS)
        acc = _sums(q, w, row, column, part * steps, steps, q_rows, n, k, BM, BN, BK, SWAP, EVEN, DESCRIPTOR)
        if SPLIT == 1:
            _finish(acc, y, x, u, b, r, c, (r < m) & (c < n), n, BIAS)
        else:
            tl.store(y + (part * m + r).to(tl.int64) * n + c, acc, mask=(r < m) & (c < n))
    else:
        acc = _sums(q, w, row, column, part * steps, steps, q_rows, n, k, BM, BN, BK, SWAP, EVEN, DESCRIPTOR)
        _emit(acc, y, x_scale, w_scale, bias, row, column, part, m, n, SPLIT, BIAS, PIECES)


@triton.jit(do_not_specialize=["m"])
def sum_kernel(part, y, x_scale, w_scale, bias, m, n, SPLIT: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """Partial sums int32 ``[SPLIT, m, n]`` → y ``[m, n]``; a program takes ``BLOCK`` columns of one row."""
    blocks = tl.cdiv(n, BLOCK)
    r = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.int32)
    for s in tl.static_range(SPLIT):
        acc += tl.load(part + (s * m + r).to(tl.int64) * n + c, mask=c < n, other=0)
    x, w, b = _factors(x_scale, w_scale, bias, r, c, m, n, BIAS)
    _finish(acc, y, x, w, b, r, c, c < n, n, BIAS)
