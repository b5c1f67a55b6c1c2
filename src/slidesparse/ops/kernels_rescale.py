"""Triton kernel of the scale-and-bias pass over sums that a library could not scale itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rescale_kernel(
    acc, y, x_scale, w_scale, bias, n, stride,
    X: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """acc of row stride ``stride`` → y of rows of ``n``; a program takes ``BLOCK`` columns of one row.

    Three float32 operations, each rounded: compiled without contraction to fma.
    """
    # Programs that run together read neighbouring columns of the same rows.
    tiles = tl.cdiv(n, BLOCK)
    c = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    r = (tl.program_id(0) // tiles).to(tl.int64)
    inside = c < n
    value = tl.load(acc + r * stride + c, mask=inside, other=0).to(tl.float32)
    if W:
        value = value * tl.load(w_scale + c, mask=inside, other=0.0)
    if X:
        value = value * tl.load(x_scale + r)
    if BIAS:
        value = value + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + r * n + c, value.to(y.dtype.element_ty), mask=inside)
