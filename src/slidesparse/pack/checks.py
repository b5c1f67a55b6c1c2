"""Does it obey? Pattern detection on dense weights and the checks a loader makes before trusting packed tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import PatternError, WeightError
from ..format import Packed
from ..pattern import KNOWN, Pattern
from .codes import pad_to_groups, unit_codes
from .packing import unpack_keep


def find_violation(weight: Tensor, pattern: Pattern, offset: int = 0, *, first_row: int = 0) -> PatternError | None:
    """The first group of ``weight [N, K]`` with more non-zero units than the pattern keeps, or None.

    The error carries row, group and the group's values; ``first_row`` is added to the row where the weights are a block of more.
    """
    codes = pad_to_groups(unit_codes(weight, pattern), pattern, offset)
    excess = (codes != 0).unflatten(1, (-1, pattern.group)).sum(-1, dtype=torch.uint8) > pattern.kept
    if not bool(excess.any()):
        return None
    row, group = (int(i) for i in excess.nonzero()[0])
    start = max((group * pattern.group - offset) * pattern.unit, 0)
    stop = ((group + 1) * pattern.group - offset) * pattern.unit
    values = tuple(weight[row, start:stop].float().tolist())
    nonzero = int((codes[row].view(-1, pattern.group)[group] != 0).sum())
    shown = ", ".join(f"{value:.4g}" for value in values)
    return PatternError(
        f"row {first_row + row}, group {group} (columns {start}–{min(stop, weight.shape[1]) - 1}): {nonzero} non-zero, "
        f"pattern {pattern} keeps {pattern.kept} of {pattern.group}: [{shown}]",
        row=first_row + row,
        group=group,
        values=values,
    )


def detect(blocks: Iterable[tuple[int, Tensor]], candidates: Iterable[Pattern] = KNOWN, *, start: int = 0) -> Pattern:
    """The first candidate (tightest first by default) that a matrix obeys, given as blocks ``(first row, rows [R, K])`` in order.

    ``start`` is the column at which these rows begin where they are a part of wider ones.

    Raises:
        PatternError: it obeys none; the first violation of the last candidate.
        ValueError: there are no candidates.
    """
    remaining, blocks = list(candidates), iter(blocks)
    if not remaining:
        raise ValueError("no candidates to look for")
    last, nearest = remaining[-1], None
    block = next(blocks, None)
    while block is not None:
        (first, rows), block = block, next(blocks, None)
        for pattern in tuple(remaining):
            offset = start % (pattern.group * pattern.unit) // pattern.unit
            violation = find_violation(rows, pattern, offset, first_row=first)
            if violation is None and block is None:
                return pattern  # these were the last rows: what comes behind need not be looked at
            if violation is not None:
                remaining.remove(pattern)
                nearest = violation if pattern == last else nearest
        if not remaining:
            raise nearest
    return remaining[0]


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
    counts = unpack_keep(packed).unflatten(1, (-1, pattern.group)).sum(-1, dtype=torch.uint8)
    if bool((counts != pattern.kept).any()):
        row, group = (int(i) for i in (counts != pattern.kept).nonzero()[0])
        where = f"weight_keep: row {first_row + row}, group {group}"
        raise WeightError(f"{where} has {int(counts[row, group])} keep-bits, pattern {pattern} needs {pattern.kept}")
    unused = packed.keep.shape[1] * 8 - pattern.groups(packed.k) * pattern.group
    if unused and bool((packed.keep[:, -1] >> (8 - unused)).any()):
        row = int((packed.keep[:, -1] >> (8 - unused)).nonzero()[0])
        raise WeightError(f"weight_keep: row {first_row + row} sets unused bits at its end")
    if scale is not None:
        check_scale(scale, (n, 1), first_row=first_row)


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
        raise WeightError(f"{name}: row {first_row + row} holds {float(values[row, column])}; scales must be finite and positive")
