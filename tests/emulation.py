"""What Triton's interpreter lacks of compiled kernels: multiply-adds that round once, PTX instructions, conversions to nearest even.

With these, the branches that only compiled kernels take run on a CPU, and are held to the oracle there. For a process of its own: the
interpreter is changed for good.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.generic]


def exact_fma(x: Array, y: Array, z: Array) -> Array:
    """x · y + z of float32, rounded once, to nearest even.

    Float64 holds the product exactly. The sum is rounded to odd, which loses nothing that a second rounding to less than half the bits
    could miss (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    with np.errstate(all="ignore"):
        product, addend = np.broadcast_arrays(x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64))
        total = product + addend
        behind = total - product
        error = (product - (total - behind)) + (addend - behind)  # two_sum: the sum is total + error exactly
        bits = total.view(np.int64)
        step = np.where((error > 0) == (total > 0), 1, -1)
        odd = np.where((error != 0) & np.isfinite(total) & (bits & 1 == 0), bits + step, bits)
        return odd.view(np.float64).astype(np.float32)


def rounded(x: Array, dtype: torch.dtype) -> Array:
    """Float32 to a 16-bit type or e4m3, to nearest even, as the interpreter stores them; beyond the largest, e4m3 saturates."""
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    if dtype == torch.float8_e4m3fn:
        tensor = torch.where(tensor.isnan(), tensor, tensor.clamp(-448, 448))
        return tensor.to(dtype).view(torch.uint8).numpy()
    return tensor.to(dtype).numpy() if dtype == torch.float16 else tensor.to(dtype).view(torch.int16).numpy().view(np.uint16)


def widened(x: Array) -> Array:
    """Float16, or bfloat16 as the interpreter stores it, to float32."""
    return x.astype(np.float32) if x.dtype == np.float16 else (x.astype(np.uint32) << 16).view(np.float32)


def two_halves(operation: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """An operation of two 16-bit floats, rounded once: float64 holds sums and products of two."""

    def run(a: Array, b: Array) -> Array:
        with np.errstate(all="ignore"):
            exact = torch.from_numpy(operation(widened(a).astype(np.float64), widened(b).astype(np.float64)))
        dtype = torch.float16 if a.dtype == np.float16 else torch.bfloat16
        # Sums that float64 cannot hold have a term that is far too small to matter.
        made = exact.to(dtype)
        return made.numpy() if dtype == torch.float16 else made.view(torch.int16).numpy().view(np.uint16)

    return run


def bytes_selected(low: Array, high: Array, selector: Array) -> Array:
    """``prmt.b32`` with four numbers below 8."""
    stream = low.astype(np.uint64) | (high.astype(np.uint64) << 32)
    picked = np.zeros_like(low)
    for lane in range(4):
        number = (selector >> (4 * lane)) & 7
        picked |= (((stream >> (number.astype(np.uint64) * 8)) & 255) << (8 * lane)).astype(low.dtype)
    return picked


def larger_magnitude(largest: Array, value: Array) -> Array:
    """``max.u16x2`` of the first and the second without its sign."""
    return np.maximum(largest.view(np.uint16), value.view(np.uint16) & 0x7FFF).view(largest.dtype)


INSTRUCTIONS: dict[str, Callable[..., Array]] = {
    "prmt.b32 $0, $1, $2, $3;": bytes_selected,
    "{ .reg .b32 magnitude; and.b32 magnitude, $2, 0x7fff7fff; max.u16x2 $0, $1, magnitude; }": larger_magnitude,
    "xor.b32 $0, $1, $2;": lambda a, b: (a.view(np.uint16) ^ b.view(np.uint16)).view(a.dtype),
    "add.rn.bf16x2 $0, $1, $2;": two_halves(np.add),
    "add.rn.f16x2 $0, $1, $2;": two_halves(np.add),
    "mul.rn.bf16x2 $0, $1, $2;": two_halves(np.multiply),
    "mul.rn.f16x2 $0, $1, $2;": two_halves(np.multiply),
    "ex2.approx.ftz.f32 $0, $1;": np.exp2,
    "rcp.approx.ftz.f32 $0, $1;": np.reciprocal,
}
"""PTX that kernels name, by what it says."""


def install() -> None:
    """Teach the interpreter of this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from slidesparse.ops import kernels_quantize

    narrow = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float8e4nv: torch.float8_e4m3fn}
    plain_cast, plain_convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast(builder, source, kind, otherwise, *rest):
        if source.dtype.scalar == tl.float32 and kind.scalar in narrow:
            return TensorHandle(rounded(source.data, narrow[kind.scalar]), kind.scalar)
        if source.dtype.scalar == tl.bfloat16 and kind.scalar == tl.float32:
            return TensorHandle(widened(source.data), tl.float32)
        return otherwise(builder, source, kind, *rest)

    class Made:
        def __init__(self, handle: TensorHandle) -> None:
            self.handle = handle

        def get_result(self, number: int) -> TensorHandle:
            return self.handle

    def inline(builder, text, constraints, values, types, pure, pack):
        made = INSTRUCTIONS[text](*(value.data for value in values))
        return Made(TensorHandle(made, (types[0] if types else values[0].dtype).scalar))

    InterpreterBuilder.cast_impl = lambda builder, source, kind: cast(builder, source, kind, plain_cast)
    InterpreterBuilder.create_fp_to_fp = lambda builder, source, kind, mode: cast(builder, source, kind, plain_convert, mode)
    InterpreterBuilder.create_fma = lambda builder, x, y, z: TensorHandle(exact_fma(x.data, y.data, z.data), z.dtype.scalar)
    InterpreterBuilder.create_inline_asm = inline
    # Programs run one after the other anyway.
    kernels_quantize.gdc_wait = kernels_quantize.gdc_launch_dependents = lambda: None
