"""Per-token quantisation, quantisation fused with the lift, and the lift alone, each a ``torch.library`` op.

On CUDA a Triton kernel runs, bitwise equal to the oracle; without Triton, on other devices and for types that the card cannot convert,
the oracle itself does. ``width`` pads the output's columns with zeros, as libraries want them.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from .. import reference
from ..format import SCHEMES, Scheme
from ..pattern import Pattern
from .launch import CACHED_CHUNKS, Launch, row_launch
from .library import define, runs_kernels

_INPUTS = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_SCHEME_OF = {scheme.dtype: scheme for scheme in SCHEMES.values() if scheme.dynamic}


def quantize(x: Tensor, scheme: Scheme, *, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise each row as `reference.quantize` does: ``x [M, K]`` → q ``[M, width]`` (int8 or e4m3), scale float32 ``[M, 1]``.

    x is bfloat16, float16 or float32 with any row stride; ``width`` is K by default, columns past K are 0.

    Raises:
        ValueError: the scheme does not quantise rows, x is not a matrix, or ``width`` is smaller than K.
    """
    return torch.ops.slidesparse.quantize(x, _checked(x, scheme), _width(x, x.shape[-1], width))


def quantize_lift(x: Tensor, pattern: Pattern, scheme: Scheme, *, offset: int = 0, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise and lift each row: ``x [M, K]`` → ``reference.lift(q)`` of shape ``[M, width]``, scale float32 ``[M, 1]``.

    ``width`` is K' by default, columns past K' are 0; ``offset`` says how far into its first group the row begins.

    Raises:
        ValueError: as `quantize`; the pattern's unit is not 1, or the offset lies outside a group.
    """
    dtype = _checked(x, scheme)
    return torch.ops.slidesparse.quantize_lift(x, str(pattern), dtype, offset, _width(x, _slid_k(x, pattern, offset), width))


def lift(x: Tensor, pattern: Pattern, *, offset: int = 0, width: int | None = None) -> Tensor:
    """Lift each row as `reference.lift` does: ``x [M, K]`` of any type → ``[M, width]``; ``offset``, ``width`` as in `quantize_lift`.

    Raises:
        ValueError: x is not a matrix, the pattern's unit is not 1, the offset lies outside a group, or ``width`` is smaller than K'.
    """
    return torch.ops.slidesparse.lift(x, str(pattern), offset, _width(x, _slid_k(x, pattern, offset), width))


def _checked(x: Tensor, scheme: Scheme) -> torch.dtype:
    if not scheme.dynamic:
        raise ValueError(f"scheme {scheme.name} does not quantise rows")
    if x.dtype not in _INPUTS:
        raise ValueError(f"rows of {x.dtype} cannot be quantised: give bfloat16, float16 or float32")
    return scheme.dtype


def _width(x: Tensor, least: int, width: int | None) -> int:
    if x.dim() != 2:
        raise ValueError(f"x must be a matrix [M, K], got shape {list(x.shape)}")
    if width is not None and width < least:
        raise ValueError(f"width {width} is smaller than the {least} columns that the rows take")
    return least if width is None else width


def _slid_k(x: Tensor, pattern: Pattern, offset: int) -> int:
    if pattern.unit != 1:
        raise ValueError(f"pattern {pattern}: only patterns of single elements can be lifted, not of pairs")
    return pattern.slid_k(x.shape[-1], offset)


def _padded(y: Tensor, width: int) -> Tensor:
    if y.shape[1] == width:
        return y
    wide = torch.zeros(y.shape[0], width, dtype=_INTEGERS[y.element_size()], device=y.device)
    wide[:, : y.shape[1]] = y.view(wide.dtype)
    return wide.view(y.dtype)


def _quantize_oracle(x: Tensor, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    q, scale = reference.quantize(x, _SCHEME_OF[dtype])
    return _padded(q, width), scale


def _quantize_lift_oracle(x: Tensor, pattern: str, dtype: torch.dtype, offset: int, width: int) -> tuple[Tensor, Tensor]:
    q, scale = reference.quantize(x, _SCHEME_OF[dtype])
    return _padded(reference.lift(q, Pattern.parse(pattern), offset), width), scale


def _lift_oracle(x: Tensor, pattern: str, offset: int, width: int) -> Tensor:
    return _padded(reference.lift(x.contiguous(), Pattern.parse(pattern), offset), width)


def _empty(x: Tensor, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], width), dtype=dtype), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _quantize_cuda(x: Tensor, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    if not runs_kernels(x.device, dtype):
        return _quantize_oracle(x, dtype, width)
    return launch_quantize(x, dtype, width)


def _quantize_lift_cuda(x: Tensor, pattern: str, dtype: torch.dtype, offset: int, width: int) -> tuple[Tensor, Tensor]:
    if not runs_kernels(x.device, dtype):
        return _quantize_lift_oracle(x, pattern, dtype, offset, width)
    return launch_quantize_lift(x, Pattern.parse(pattern), dtype, offset, width)


def _lift_cuda(x: Tensor, pattern: str, offset: int, width: int) -> Tensor:
    if x.element_size() not in _INTEGERS or not runs_kernels(x.device, x.dtype):
        return _lift_oracle(x, pattern, offset, width)
    return launch_lift(x, Pattern.parse(pattern), offset, width)


def _arithmetic(dtype: torch.dtype, fused: bool) -> dict[str, object]:
    """What a kernel divides by and converts to; ``fused`` is False under the interpreter, whose fma rounds twice."""
    return {"BOUND": _SCHEME_OF[dtype].bound, "INT8": dtype == torch.int8, "FUSED": fused}


def _window_words(pattern: Pattern, offset: int) -> dict[str, int]:
    lanes = gcd(pattern.l, 4)
    shape = {"GROUP": pattern.group, "N": pattern.n, "L": pattern.l, "WINDOWS": pattern.windows}
    return {**shape, "OFFSET": offset, "LANES": lanes}


def launch_quantize(
    x: Tensor, dtype: torch.dtype, width: int, launch: Launch | None = None, *, fused: bool = True
) -> tuple[Tensor, Tensor]:
    """Run the quantise kernel on the current device and stream."""
    from . import kernels_quantize as kernels

    x = x if x.stride(1) == 1 else x.contiguous()
    q, scale = _empty(x, dtype, width)
    m, k = x.shape
    launch = launch or row_launch(width)
    if m:
        chunks = launch.chunks(width)
        kernels.quantize_kernel[(-(-m // launch.rows),)](
            x, q.view(torch.int8), scale, m, k, width, x.stride(0), **_arithmetic(dtype, fused),
            ROWS=launch.rows, BLOCK=launch.block, CHUNKS=chunks, CACHED=chunks <= CACHED_CHUNKS, num_warps=launch.warps,
        )  # fmt: skip
    return q, scale


def launch_quantize_lift(
    x: Tensor, pattern: Pattern, dtype: torch.dtype, offset: int, width: int, launch: Launch | None = None, *,
    fused: bool = True, local: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a quantise-and-lift kernel on the current device and stream; ``local`` picks the one whose threads hold whole groups."""
    from . import kernels_quantize as kernels

    x = x if x.stride(1) == 1 else x.contiguous()
    q, scale = _empty(x, dtype, width)
    m, k = x.shape
    if not m:
        return q, scale
    launch, slid = launch or row_launch(k, lifted=True), pattern.slid_k(k, offset)
    grid, chunks = (-(-m // launch.rows),), launch.chunks(k)
    tile = {"ROWS": launch.rows, "BLOCK": launch.block, "CHUNKS": chunks, "num_warps": launch.warps}
    able = (pattern.group, pattern.n, pattern.l) == (8, 2, 4) and not offset and width % 4 == 0 and chunks <= CACHED_CHUNKS
    if able and local is not False:
        kernels.quantize_lift8_kernel[grid](
            x, q.view(torch.int32), scale, m, k, slid // 4, width // 4, x.stride(0), **_arithmetic(dtype, fused), **tile,
            PAD_TILES=-(-(width - slid) // (4 * launch.block)),
        )  # fmt: skip
        return q, scale
    words, windows = max(1, launch.block // 4), _window_words(pattern, offset)
    kernels.quantize_lift_kernel[grid](
        x, q.view(torch.int8), scale, m, k, slid, width, x.stride(0), **_arithmetic(dtype, fused), **windows, **tile,
        UNROLL=chunks <= CACHED_CHUNKS, WORDS=words, TILES=-(-width // (words * windows["LANES"])),
    )  # fmt: skip
    return q, scale


def launch_lift(x: Tensor, pattern: Pattern, offset: int, width: int, launch: Launch | None = None) -> Tensor:
    """Run the lift kernel on the current device and stream."""
    from . import kernels_quantize as kernels

    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty((x.shape[0], width))
    m, k = x.shape
    launch = launch or row_launch(k, lifted=True)
    if m:
        integer, words, windows = _INTEGERS[x.element_size()], max(1, launch.block // 4), _window_words(pattern, offset)
        kernels.lift_kernel[(-(-m // launch.rows),)](
            x.view(integer), y.view(integer), m, k, pattern.slid_k(k, offset), width, x.stride(0), **windows,
            ROWS=launch.rows, WORDS=words, TILES=-(-width // (words * windows["LANES"])), num_warps=launch.warps,
        )  # fmt: skip
    return y


def _quantize_fake(x: Tensor, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    return _empty(x, dtype, width)


def _quantize_lift_fake(x: Tensor, pattern: str, dtype: torch.dtype, offset: int, width: int) -> tuple[Tensor, Tensor]:
    return _empty(x, dtype, width)


def _lift_fake(x: Tensor, pattern: str, offset: int, width: int) -> Tensor:
    return x.new_empty((x.shape[0], width))


define(
    "quantize(Tensor x, ScalarType dtype, int width) -> (Tensor, Tensor)",
    oracle=_quantize_oracle, cuda=_quantize_cuda, fake=_quantize_fake,
)  # fmt: skip
define(
    "quantize_lift(Tensor x, str pattern, ScalarType dtype, int offset, int width) -> (Tensor, Tensor)",
    oracle=_quantize_lift_oracle, cuda=_quantize_lift_cuda, fake=_quantize_lift_fake,
)  # fmt: skip
define("lift(Tensor x, str pattern, int offset, int width) -> Tensor", oracle=_lift_oracle, cuda=_lift_cuda, fake=_lift_fake)
