"""Triton kernel of the scale-and-bias pass over sums that a library could not scale itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rescale_kernel(
    acc, y, x_scale, w_scale, bias, m, n, stride, tiles,
    X: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """acc of row stride ``stride`` → y ``[m, n]``; a program takes ``BLOCK`` columns of ``ROWS`` rows, whose scales it loads once.

    Three float32 operations, each rounded: compiled without contraction to fma.
    """
    # Programs that run together read neighbouring columns of the same rows.
    c = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    inside = c < n
    if W:
        w = tl.load(w_scale + c, mask=inside, other=0.0)
    if BIAS:
        b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        r = first + i
        value = tl.load(acc + r * stride + c, mask=inside & (r < m), other=0).to(tl.float32)
        if W:
            value = value * w
        if X:
            value = value * tl.load(x_scale + r, mask=r < m, other=0.0)
        if BIAS:
            value = value + b
        tl.store(y + r * n + c, value.to(y.dtype.element_ty), mask=inside & (r < m))
