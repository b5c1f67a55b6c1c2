"""Per-token quantisation, quantisation fused with the lift, and the lift alone, each a ``torch.library`` op.

On CUDA a Triton kernel runs, bitwise equal to the oracle; without Triton, on other devices and for types that the card cannot convert,
the oracle itself does. ``width`` pads the output's columns with zeros and ``rows`` its row count, as libraries want them.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

from .. import reference
from ..format import SCHEMES, Scheme
from ..pattern import Pattern
from .launch import CACHED_CHUNKS, Launch, row_launch
from .library import capability, define, runs_kernels

_INPUTS = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_SCHEME_OF = {scheme.dtype: scheme for scheme in SCHEMES.values() if scheme.dynamic}
_parsed = lru_cache(Pattern.parse)


def quantize(x: Tensor, scheme: Scheme, *, width: int | None = None, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Quantise each row as `reference.quantize` does: ``x [M, K]`` → q ``[M', width]`` (int8 or e4m3), scale float32 ``[M, 1]``.

    x is bfloat16, float16 or float32 with any row stride; ``width`` is K by default, columns past K are 0. M' is M rounded up to a
    multiple of ``rows``; what rows from M on hold is undefined.

    Raises:
        ValueError: the scheme does not quantise rows, x is not a matrix, ``width`` is smaller than K, or ``rows`` than 1.
    """
    dtype = checked(x, scheme)
    return torch.ops.slidesparse.quantize(x, dtype, checked_width(x, x.shape[-1], width, rows), rows)


def quantize_lift(
    x: Tensor, pattern: Pattern, scheme: Scheme, *, offset: int = 0, width: int | None = None, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """Quantise and lift each row: ``x [M, K]`` → ``reference.lift(q)`` of shape ``[M', width]``, scale float32 ``[M, 1]``.

    ``width`` is K' by default, columns past K' are 0; ``offset`` says how far into its first group the row begins; ``rows`` and M' as
    in `quantize`.

    Raises:
        ValueError: as `quantize`; the pattern's unit is not 1, or the offset lies outside a group.
    """
    dtype = checked(x, scheme)
    width = checked_width(x, slid_width(x.shape[-1], pattern, offset), width, rows)
    if moves_nothing(pattern, offset):
        return torch.ops.slidesparse.quantize(x, dtype, width, rows)
    return torch.ops.slidesparse.quantize_lift(x, str(pattern), dtype, offset, width, rows)


def lift(x: Tensor, pattern: Pattern, *, offset: int = 0, width: int | None = None, rows: int = 1) -> Tensor:
    """Lift each row as `reference.lift` does: ``x [M, K]`` of any type → ``[M', width]``; the keywords are those of `quantize_lift`.

    Raises:
        ValueError: x is not a matrix, the pattern's unit is not 1, the offset lies outside a group, ``width`` is smaller than K', or
            ``rows`` than 1.
    """
    return torch.ops.slidesparse.lift(
        x, str(pattern), offset, checked_width(x, slid_width(x.shape[-1], pattern, offset), width, rows), rows
    )


def checked(x: Tensor, scheme: Scheme) -> torch.dtype:
    """The type that the scheme quantises rows of x to; raises ValueError if it does not, or x is of no type that can be."""
    if not scheme.dynamic:
        raise ValueError(f"scheme {scheme.name} does not quantise rows")
    if x.dtype not in _INPUTS:
        raise ValueError(f"rows of {x.dtype} cannot be quantised: give bfloat16, float16 or float32")
    return scheme.dtype


def checked_width(x: Tensor, least: int, width: int | None, rows: int) -> int:
    """The output's width, ``least`` by default; raises ValueError unless x is a matrix, the width enough and ``rows`` positive."""
    if x.dim() != 2:
        raise ValueError(f"x must be a matrix [M, K], got shape {list(x.shape)}")
    if width is not None and width < least:
        raise ValueError(f"width {width} is smaller than the {least} columns that the rows take")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    return least if width is None else width


def slid_width(k: int, pattern: Pattern, offset: int = 0) -> int:
    """K' of a lifted row of ``k`` elements; raises ValueError for patterns of pairs and offsets outside a group."""
    if pattern.unit != 1:
        raise ValueError(f"pattern {pattern}: only patterns of single elements can be lifted, not of pairs")
    return pattern.slid_k(k, offset)


def moves_nothing(pattern: Pattern, offset: int) -> bool:
    """Whether the lift only pads rows: one window covers a group (2:4)."""
    return pattern.windows == 1 and not offset


def _padded(y: Tensor, width: int, rows: int) -> Tensor:
    m, k = y.shape
    if width == k and m % rows == 0:
        return y
    wide = torch.zeros(-(-m // rows) * rows, width, dtype=_INTEGERS[y.element_size()], device=y.device)
    wide[:m, :k] = y.view(wide.dtype)
    return wide.view(y.dtype)


def quantize_oracle(x: Tensor, dtype: torch.dtype, width: int, rows: int) -> tuple[Tensor, Tensor]:
    """`quantize` by plain torch."""
    q, scale = reference.quantize(x, _SCHEME_OF[dtype])
    return _padded(q, width, rows), scale


def quantize_lift_oracle(x: Tensor, pattern: str, dtype: torch.dtype, offset: int, width: int, rows: int) -> tuple[Tensor, Tensor]:
    """`quantize_lift` by plain torch."""
    q, scale = reference.quantize(x, _SCHEME_OF[dtype])
    return _padded(reference.lift(q, _parsed(pattern), offset), width, rows), scale


def _lift_oracle(x: Tensor, pattern: str, offset: int, width: int, rows: int) -> Tensor:
    return _padded(reference.lift(x.contiguous(), _parsed(pattern), offset), width, rows)


def empty_rows(x: Tensor, dtype: torch.dtype, width: int, rows: int) -> Tensor:
    """Memory for as many rows as x has, rounded up to a multiple of ``rows``."""
    m = x.shape[0]
    return x.new_empty((m if rows == 1 else (m + rows - 1) // rows * rows, width), dtype=dtype)


def _empty(x: Tensor, dtype: torch.dtype, width: int, rows: int) -> tuple[Tensor, Tensor]:
    return empty_rows(x, dtype, width, rows), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _quantize_cuda(x: Tensor, dtype: torch.dtype, width: int, rows: int) -> tuple[Tensor, Tensor]:
    if not runs_kernels(x.device, dtype):
        return quantize_oracle(x, dtype, width, rows)
    return launch_quantize(x, dtype, width, rows)


def _quantize_lift_cuda(x: Tensor, pattern: str, dtype: torch.dtype, offset: int, width: int, rows: int) -> tuple[Tensor, Tensor]:
    if not runs_kernels(x.device, dtype):
        return quantize_lift_oracle(x, pattern, dtype, offset, width, rows)
    return launch_quantize_lift(x, _parsed(pattern), dtype, offset, width, rows)


def _lift_cuda(x: Tensor, pattern: str, offset: int, width: int, rows: int) -> Tensor:
    if x.element_size() not in _INTEGERS or not runs_kernels(x.device, x.dtype):
        return _lift_oracle(x, pattern, offset, width, rows)
    return launch_lift(x, _parsed(pattern), offset, width, rows)


def in_rows(x: Tensor) -> Tensor:
    """x with elements of a row side by side, as kernels read it."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def overlaps(x: Tensor, launch: Launch) -> bool:
    """Whether this launch may begin before the kernel ahead of it has drained."""
    return launch.overlap and x.is_cuda and capability(x.device) >= (9, 0)


def arithmetic(dtype: torch.dtype, fused: bool) -> dict[str, object]:
    """What a kernel divides by and converts to; ``fused`` is False under the interpreter, whose fma rounds twice."""
    return {"BOUND": _SCHEME_OF[dtype].bound, "INT8": dtype == torch.int8, "FUSED": fused}


def can_hold_groups(pattern: Pattern, offset: int, width: int) -> bool:
    """Whether threads can hold whole groups and store their windows as words: 2:4 hardware, groups not split by an offset."""
    return (pattern.n, pattern.l) == (2, 4) and pattern.group <= 16 and not offset and width % 4 == 0


@lru_cache(maxsize=4096)
def tile(launch: Launch, k: int, width: int, group: int, windows: int) -> dict[str, object]:
    """How a kernel cuts rows of ``k`` elements into chunks, groups and vector loads; ``windows`` is 0 if nothing is lifted."""
    chunks = launch.chunks(-(-(k if windows else max(k, width)) // group))
    padding = width // 4 - -(-k // group) * windows if windows else 0
    return {
        "GROUP": group, "PART": gcd(group, 8), "WINDOWS": windows, "PAD_TILES": -(-padding // launch.span), "ROWS": launch.rows,
        "SPAN": launch.span, "CHUNKS": chunks, "CACHED": chunks * group <= CACHED_CHUNKS * 8, "num_warps": launch.warps,
    }  # fmt: skip


def _window_words(pattern: Pattern, offset: int, launch: Launch, width: int) -> dict[str, object]:
    lanes, words = gcd(pattern.l, 4), launch.span * 2
    return {
        "GROUP": pattern.group, "N": pattern.n, "L": pattern.l, "WINDOWS": pattern.windows, "OFFSET": offset, "LANES": lanes,
        "ROWS": launch.rows, "WORDS": words, "TILES": -(-width // (words * lanes)), "num_warps": launch.warps,
    }  # fmt: skip


def launch_quantize(
    x: Tensor, dtype: torch.dtype, width: int, rows: int = 1, launch: Launch | None = None, *, fused: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the quantise kernel on the current device and stream."""
    return _launch_groups(x, dtype, width, rows, launch, fused, 8, 0)


def _launch_groups(
    x: Tensor, dtype: torch.dtype, width: int, rows: int, launch: Launch | None, fused: bool, group: int, windows: int
) -> tuple[Tensor, Tensor]:
    from . import kernels_quantize as kernels

    x = in_rows(x)
    q, scale = _empty(x, dtype, width, rows)
    m, k = x.shape
    launch = launch or row_launch(m, -(-k // group))
    overlap = overlaps(x, launch)
    if m:
        kernels.quantize_kernel[(-(-m // launch.rows),)](
            x, q.view(torch.int32 if windows else torch.int8), scale, m, k, width // 4 if windows else width, x.stride(0),
            **arithmetic(dtype, fused), PDL=overlap, launch_pdl=overlap, **tile(launch, k, width, group, windows),
        )  # fmt: skip
    return q, scale


def launch_quantize_lift(
    x: Tensor, pattern: Pattern, dtype: torch.dtype, offset: int, width: int, rows: int = 1, launch: Launch | None = None, *,
    fused: bool = True, gather: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a quantise-and-lift kernel on the current device and stream; ``gather`` asks for the one that takes every pattern."""
    from . import kernels_quantize as kernels

    if can_hold_groups(pattern, offset, width) and not gather:
        return _launch_groups(x, dtype, width, rows, launch, fused, pattern.group, pattern.windows)
    x = in_rows(x)
    q, scale = _empty(x, dtype, width, rows)
    m, k = x.shape
    launch = launch or row_launch(m, -(-k // 8))
    overlap = overlaps(x, launch)
    if m:
        kernels.quantize_gather_kernel[(-(-m // launch.rows),)](
            x, q.view(torch.int8), scale, m, k, pattern.slid_k(k, offset), width, x.stride(0), **arithmetic(dtype, fused),
            SPAN=launch.span, CHUNKS=launch.chunks(-(-k // 8)), **_window_words(pattern, offset, launch, width),
            PDL=overlap, launch_pdl=overlap,
        )  # fmt: skip
    return q, scale


def launch_lift(x: Tensor, pattern: Pattern, offset: int, width: int, rows: int = 1, launch: Launch | None = None) -> Tensor:
    """Run the lift kernel on the current device and stream; where the lift only pads, a copy does."""
    from . import kernels_quantize as kernels

    y = empty_rows(x, x.dtype, width, rows)
    m, k = x.shape
    integer = _INTEGERS[x.element_size()]
    if moves_nothing(pattern, offset):
        y[:m, :k] = x
        y.view(integer)[:m, k:] = 0
        return y
    x = in_rows(x)
    launch = launch or row_launch(m, -(-k // 8))
    overlap = overlaps(x, launch)
    if m:
        kernels.lift_kernel[(-(-m // launch.rows),)](
            x.view(integer), y.view(integer), m, k, pattern.slid_k(k, offset), width, x.stride(0),
            **_window_words(pattern, offset, launch, width), PDL=overlap, launch_pdl=overlap,
        )  # fmt: skip
    return y


def _quantize_fake(x: Tensor, dtype: torch.dtype, width: int, rows: int) -> tuple[Tensor, Tensor]:
    return _empty(x, dtype, width, rows)


def _quantize_lift_fake(x: Tensor, pattern: str, dtype: torch.dtype, offset: int, width: int, rows: int) -> tuple[Tensor, Tensor]:
    return _empty(x, dtype, width, rows)


def _lift_fake(x: Tensor, pattern: str, offset: int, width: int, rows: int) -> Tensor:
    return empty_rows(x, x.dtype, width, rows)


define(
    "quantize(Tensor x, ScalarType dtype, SymInt width, int rows) -> (Tensor, Tensor)",
    oracle=quantize_oracle, cuda=_quantize_cuda, fake=_quantize_fake,
)  # fmt: skip
define(
    "quantize_lift(Tensor x, str pattern, ScalarType dtype, int offset, SymInt width, int rows) -> (Tensor, Tensor)",
    oracle=quantize_lift_oracle, cuda=_quantize_lift_cuda, fake=_quantize_lift_fake,
)  # fmt: skip
define(
    "lift(Tensor x, str pattern, int offset, SymInt width, int rows) -> Tensor",
    oracle=_lift_oracle, cuda=_lift_cuda, fake=_lift_fake,
)  # fmt: skip
