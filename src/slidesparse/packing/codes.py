"""Weights as integers: every unit (a weight or a pair) of a row becomes one integer code that is 0 exactly for zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern

_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NEGATIVE_ZERO = {
    torch.bfloat16: -0x8000,
    torch.float16: -0x8000,
    torch.float32: -0x80000000,
    torch.float64: -0x8000000000000000,
    torch.float8_e4m3fn: 0x80,
}


def integer_view(x: Tensor, unit: int = 1) -> Tensor:
    """Reinterpret ``[..., K]`` as integers ``[..., K/unit]``, one per unit; shares memory with a contiguous ``x``."""
    integer = _INT[x.dtype.itemsize * unit]
    if x.shape[-1] == 0:  # torch refuses to widen rows without columns
        return x.new_empty((*x.shape[:-1], 0), dtype=integer)
    return x.contiguous().view(integer)


def unit_codes(weight: Tensor, pattern: Pattern) -> Tensor:
    """Codes ``[N, K/unit]`` of ``weight [N, K]`` with −0.0 turned into +0.0, so that zero weights are exactly the zero codes.

    Raises:
        ValueError: K is not a whole number of units.
    """
    pattern.units(weight.shape[1])
    codes = integer_view(without_negative_zeros(weight))
    return codes if pattern.unit == 1 else integer_view(codes, pattern.unit)


def without_negative_zeros(weight: Tensor) -> Tensor:
    """The weights with −0.0 turned into +0.0; themselves where there is none."""
    codes, negative_zero = integer_view(weight), _NEGATIVE_ZERO.get(weight.dtype)
    if negative_zero is not None and bool((wrong := codes == negative_zero).any()):  # rare, and filling is dear
        return codes.masked_fill(wrong, 0).view(weight.dtype)
    return weight


def count_negative_zeros(weight: Tensor) -> int:
    """How many weights are −0.0."""
    negative_zero = _NEGATIVE_ZERO.get(weight.dtype)
    return 0 if negative_zero is None else int((integer_view(weight) == negative_zero).sum())


def pad_to_groups(codes: Tensor, pattern: Pattern, offset: int = 0) -> Tensor:
    """Codes ``[N, U]`` → ``[N, groups·group]``, zeros outside the row; the input itself when nothing is missing."""
    n, units = codes.shape
    width = pattern.groups(units * pattern.unit, offset) * pattern.group
    if width == units:
        return codes
    padded = codes.new_zeros(n, width)
    padded[:, offset : offset + units] = codes
    return padded


def by_position(groups: Tensor) -> Tensor:
    """``[M, group]`` → contiguous ``[group, M]``: the transposed copy.

    Row by row, which on a CPU is up to four times as fast as torch's own way for bytes and int16.
    """
    return torch.stack(groups.unbind(1))


def by_group(positions: Tensor) -> Tensor:
    """``[group, M]`` → contiguous ``[M, group]``: the way back from `by_position`."""
    return torch.stack(positions.unbind(0), dim=1)
