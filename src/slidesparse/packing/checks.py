"""The checks a loader makes before trusting packed tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import WeightError
from ..format import Packed
from .pack import unpack_keep

_BLOCK = 1 << 20
"""Bytes of keep-bits that are unpacked at once, to eight times as many."""


def check_packed(packed: Packed, scale: Tensor | None = None, *, first_row: int = 0) -> None:
    """Check shapes, keep-bit counts, unused bits, and scales before anything indexes from them.

    ``first_row`` is added to the rows in messages where ``packed`` is a block of more.

    Raises:
        WeightError: names what is wrong: shape, row and group of a wrong bit count, or the row of a bad scale.
    """
    pattern, n = packed.pattern, packed.n
    claim = f"pattern {pattern} with K = {packed.k} needs"
    values_shape, keep_shape = [n, pattern.packed_k(packed.k)], [n, pattern.keep_bytes(packed.k)]
    if list(packed.values.shape) != values_shape:
        raise WeightError(f"weight_values has shape {list(packed.values.shape)}, {claim} {values_shape}")
    if packed.keep.dtype != torch.uint8 or list(packed.keep.shape) != keep_shape:
        raise WeightError(f"weight_keep is {packed.keep.dtype} {list(packed.keep.shape)}, {claim} torch.uint8 {keep_shape}")
    rows = max(1, _BLOCK // max(1, packed.keep.shape[1]))
    for start in range(0, n, rows):
        block = replace(packed, values=packed.values[start : start + rows], keep=packed.keep[start : start + rows])
        _check_counts(block, first_row + start)
    unused = packed.keep.shape[1] * 8 - pattern.groups(packed.k) * pattern.group
    if unused and bool((packed.keep[:, -1] >> (8 - unused)).any()):
        row = int((packed.keep[:, -1] >> (8 - unused)).nonzero()[0])
        raise WeightError(f"weight_keep: row {first_row + row} sets unused bits at its end")
    if scale is not None:
        check_scale(scale, (n, 1), first_row=first_row)


def _check_counts(packed: Packed, first_row: int) -> None:
    pattern = packed.pattern
    counts = unpack_keep(packed).unflatten(1, (-1, pattern.group)).sum(-1, dtype=torch.uint8)
    wrong = counts != pattern.kept
    if bool(wrong.any()):
        row, group = (int(i) for i in wrong.nonzero()[0])
        where = f"weight_keep: row {first_row + row}, group {group}"
        raise WeightError(f"{where} has {int(counts[row, group])} keep-bits, pattern {pattern} needs {pattern.kept}")


def check_scale(
    scale: Tensor, shape: tuple[int, int], name: str = "weight_scale", *, zero_allowed: bool = False, first_row: int = 0
) -> None:
    """Scales must have the shape, be finite and positive (``zero_allowed``: not negative).

    Raises:
        WeightError: names the first offending row and its value.
    """
    if tuple(scale.shape) != shape:
        raise WeightError(f"{name} has shape {list(scale.shape)}, expected {list(shape)}")
    values = scale.float()
    bad = ~(torch.isfinite(values) & ((values >= 0) if zero_allowed else (values > 0)))
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        wanted = "not negative" if zero_allowed else "positive"
        raise WeightError(f"{name}: row {first_row + row} holds {float(values[row, column])}; scales must be finite and {wanted}")
