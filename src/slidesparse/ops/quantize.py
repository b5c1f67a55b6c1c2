"""Per-token quantisation, quantisation fused with the lift, and the lift alone, each a ``torch.library`` op.

On CUDA a Triton kernel runs, bitwise equal to the oracle; without Triton, on other devices and for types that the card cannot convert,
the oracle itself does. ``width`` pads the output's columns with zeros and ``rows`` its row count, as libraries want them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import reference
from ..format import SCHEMES, Scheme
from ..pattern import Pattern, parsed
from .launch import CALLS, Launch, allocate
from .library import define, runs_kernels
from .row_config import BOUNDS, RowConfig, gather_constants, is_hopper, row_config, row_constants

_INPUTS = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_SCHEME_OF = {scheme.dtype: scheme for scheme in SCHEMES.values() if scheme.dynamic}


def quantize(x: Tensor, scheme: Scheme, *, width: int | None = None, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Quantise each row as `reference.quantize` does: ``x [M, K]`` → q ``[M', width]`` (int8 or e4m3), scale float32 ``[M, 1]``.

    x is bfloat16, float16 or float32 with any row stride; ``width`` is K by default, columns past K are 0. M' is M rounded up to a
    multiple of ``rows``; what rows from M on hold is undefined.

    Raises:
        ValueError: the scheme does not quantise rows, x is not a matrix, ``width`` is smaller than K, or ``rows`` than 1.
    """
    dtype = checked(x, scheme)
    return quantize_op(x, dtype, checked_width(x, x.shape[-1], width, rows), rows)


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
        return quantize_op(x, dtype, width, rows)
    return quantize_lift_op(x, pattern.text, dtype, offset, width, rows)


def lift(x: Tensor, pattern: Pattern, *, offset: int = 0, width: int | None = None, rows: int = 1) -> Tensor:
    """Lift each row as `reference.lift` does: ``x [M, K]`` of any type → ``[M', width]``; the keywords are those of `quantize_lift`.

    Raises:
        ValueError: x is not a matrix, the pattern's unit is not 1, the offset lies outside a group, ``width`` is smaller than K', or
            ``rows`` than 1.
    """
    return _lift_op(x, pattern.text, offset, checked_width(x, slid_width(x.shape[-1], pattern, offset), width, rows), rows)


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
    wide = torch.zeros(padded_rows(m, rows), width, dtype=_INTEGERS[y.element_size()], device=y.device)
    wide[:m, :k] = y.view(wide.dtype)
    return wide.view(y.dtype)


def quantize_oracle(x: Tensor, dtype: torch.dtype, width: int, rows: int) -> tuple[Tensor, Tensor]:
    """`quantize` by plain torch."""
    q, scale = reference.quantize(x, _SCHEME_OF[dtype])
    return _padded(q, width, rows), scale


def quantize_lift_oracle(x: Tensor, pattern: str, dtype: torch.dtype, offset: int, width: int, rows: int) -> tuple[Tensor, Tensor]:
    """`quantize_lift` by plain torch."""
    q, scale = reference.quantize(x, _SCHEME_OF[dtype])
    return _padded(reference.lift(q, parsed(pattern), offset), width, rows), scale


def _lift_oracle(x: Tensor, pattern: str, offset: int, width: int, rows: int) -> Tensor:
    return _padded(reference.lift(x.contiguous(), parsed(pattern), offset), width, rows)


def padded_rows(m: int, rows: int) -> int:
    """``m`` rounded up to a multiple of ``rows``."""
    return m if rows == 1 else (m + rows - 1) // rows * rows


def fake(x: Tensor, dtype: torch.dtype, width: int, rows: int) -> tuple[Tensor, Tensor]:
    """What stands for the result of `quantize` while nothing is computed."""
    m = x.shape[0]
    return x.new_empty((padded_rows(m, rows), width), dtype=dtype), x.new_empty((m, 1), dtype=torch.float32)


def empty(x: Tensor, dtype: torch.dtype, width: int, rows: int) -> tuple[Tensor, Tensor]:
    """Memory for what `quantize` gives."""
    m = x.shape[0]
    return allocate(x, padded_rows(m, rows), width, dtype), allocate(x, m, 1, torch.float32)


def _quantize_cuda(x: Tensor, dtype: torch.dtype, width: int, rows: int) -> tuple[Tensor, Tensor]:
    if not runs_kernels(x.device, dtype):
        return quantize_oracle(x, dtype, width, rows)
    return launch_quantize(x, dtype, width, rows)


def _quantize_lift_cuda(x: Tensor, pattern: str, dtype: torch.dtype, offset: int, width: int, rows: int) -> tuple[Tensor, Tensor]:
    if not runs_kernels(x.device, dtype):
        return quantize_lift_oracle(x, pattern, dtype, offset, width, rows)
    return launch_quantize_lift(x, parsed(pattern), dtype, offset, width, rows)


def _lift_cuda(x: Tensor, pattern: str, offset: int, width: int, rows: int) -> Tensor:
    if x.element_size() not in _INTEGERS or not runs_kernels(x.device, x.dtype):
        return _lift_oracle(x, pattern, offset, width, rows)
    return launch_lift(x, parsed(pattern), offset, width, rows)


def in_rows(x: Tensor) -> Tensor:
    """x with elements of a row side by side, as kernels read it."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def can_pair(pattern: Pattern, offset: int, width: int) -> bool:
    """Whether windows are words of two pairs that start where loads do: 2:4 hardware, no offset."""
    return (pattern.n, pattern.l) == (2, 4) and not offset and width % 4 == 0


def quantize_call(
    x: Tensor, pattern: Pattern | None, dtype: torch.dtype, offset: int, width: int, config: RowConfig | None = None, *,
    compiled: bool = True, gather: bool = False,
) -> Launch:  # fmt: skip
    """The launch, to be called with x, q and scale, that quantises rows like those of x, and lifts them if there is a pattern.

    Elements of a row lie side by side. ``gather`` asks for the kernel that takes every pattern.
    """
    if pattern is None or (can_pair(pattern, offset, width) and not gather):
        group = 0 if pattern is None else pattern.group
        return _groups_call(x.shape, x.stride(0), x.dtype, x.device, dtype, width, config, compiled, group)
    return _gather_call(x.shape, x.stride(0), x.dtype, x.device, dtype, pattern, offset, width, config, compiled)


def launch_quantize(
    x: Tensor, dtype: torch.dtype, width: int, rows: int = 1, config: RowConfig | None = None, *, compiled: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the quantise kernel on the current device and stream."""
    return launch_quantize_lift(x, None, dtype, 0, width, rows, config, compiled=compiled)


def launch_quantize_lift(
    x: Tensor, pattern: Pattern | None, dtype: torch.dtype, offset: int, width: int, rows: int = 1, config: RowConfig | None = None, *,
    compiled: bool = True, gather: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a kernel of `quantize_call` on the current device and stream."""
    x = in_rows(x)
    q, scale = empty(x, dtype, width, rows)
    if x.shape[0]:
        quantize_call(x, pattern, dtype, offset, width, config, compiled=compiled, gather=gather)(x, q, scale)
    return q, scale


@lru_cache(CALLS)
def _groups_call(
    shape: tuple[int, int], stride: int, x_dtype: torch.dtype, device: torch.device, dtype: torch.dtype, width: int,
    config: RowConfig | None, compiled: bool, group: int,
) -> Launch:  # fmt: skip
    from .kernels_quantize import quantize_kernel

    m, k = shape
    config = config or row_config(m, k, group)
    numbers = (m, k, width // 4 if group else width, stride)
    return Launch(
        quantize_kernel, (-(-m // config.rows),), numbers, row_constants(config, k, width, group, dtype, compiled, is_hopper(device))
    )


@lru_cache(CALLS)
def _gather_call(
    shape: tuple[int, int], stride: int, x_dtype: torch.dtype, device: torch.device, dtype: torch.dtype, pattern: Pattern, offset: int,
    width: int, config: RowConfig | None, compiled: bool,
) -> Launch:  # fmt: skip
    from .kernels_quantize import quantize_gather_kernel

    m, k = shape
    config = config or row_config(m, k)
    constants = gather_constants(config, pattern, offset, width, is_hopper(device)) | {
        "BOUND": BOUNDS[dtype], "INT8": dtype == torch.int8, "FUSED": compiled, "SPAN": config.span, "CHUNKS": -(-k // (8 * config.span)),
    }  # fmt: skip
    return Launch(quantize_gather_kernel, (-(-m // config.rows),), (m, k, pattern.slid_k(k, offset), width, stride), constants)


def launch_lift(x: Tensor, pattern: Pattern, offset: int, width: int, rows: int = 1, config: RowConfig | None = None) -> Tensor:
    """Run the lift kernel on the current device and stream; where the lift only pads, a copy does."""
    m, k = x.shape
    y = allocate(x, padded_rows(m, rows), width, x.dtype)
    integer = _INTEGERS[x.element_size()]
    if moves_nothing(pattern, offset):
        y[:m, :k] = x
        y.view(integer)[:m, k:] = 0
        return y
    x = in_rows(x)
    if m:
        _lift_call(x.shape, x.stride(0), integer, x.device, pattern, offset, width, config)(x.view(integer), y.view(integer))
    return y


@lru_cache(CALLS)
def _lift_call(
    shape: tuple[int, int], stride: int, integer: torch.dtype, device: torch.device, pattern: Pattern, offset: int, width: int,
    config: RowConfig | None,
) -> Launch:  # fmt: skip
    from .kernels_quantize import lift_kernel

    m, k = shape
    config = config or row_config(m, k)
    constants = gather_constants(config, pattern, offset, width, is_hopper(device))
    return Launch(lift_kernel, (-(-m // config.rows),), (m, k, pattern.slid_k(k, offset), width, stride), constants)


quantize_op = define(
    "quantize(Tensor x, ScalarType dtype, SymInt width, int rows) -> (Tensor, Tensor)",
    oracle=quantize_oracle, cuda=_quantize_cuda, fake=fake,
)  # fmt: skip
quantize_lift_op = define(
    "quantize_lift(Tensor x, str pattern, ScalarType dtype, int offset, SymInt width, int rows) -> (Tensor, Tensor)",
    oracle=quantize_lift_oracle, cuda=_quantize_lift_cuda, fake=lambda x, pattern, dtype, offset, width, rows: fake(x, dtype, width, rows),
)  # fmt: skip
_lift_op = define(
    "lift(Tensor x, str pattern, int offset, SymInt width, int rows) -> Tensor",
    oracle=_lift_oracle, cuda=_lift_cuda, fake=lambda x, pattern, offset, width, rows: x.new_empty((padded_rows(x.shape[0], rows), width)),
)  # fmt: skip
