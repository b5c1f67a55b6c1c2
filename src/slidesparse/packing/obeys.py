"""Whether dense weights obey one pattern, and which of several candidates they obey."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import PatternError
from ..pattern import KNOWN, Pattern
from .codes import pad_to_groups, unit_codes


def find_violation(weight: Tensor, pattern: Pattern, offset: int = 0, *, first_row: int = 0) -> PatternError | None:
    """The first group of ``weight [N, K]`` with more non-zero units than the pattern keeps, or None.

    The error carries row, group and the group's values; ``first_row`` is added to the row where the weights are a block of more.
    """
    codes = pad_to_groups(unit_codes(weight, pattern), pattern, offset)
    return violation(weight, codes, pattern, offset, first_row=first_row) if bool(_excess(codes, pattern).any()) else None


def _excess(codes: Tensor, pattern: Pattern) -> Tensor:
    """Which groups have too many non-zero units: codes ``[N, groups·group]`` → bool ``[N, groups]``."""
    return (codes != 0).unflatten(1, (-1, pattern.group)).sum(-1, dtype=torch.uint8) > pattern.kept


def violation(weight: Tensor, codes: Tensor, pattern: Pattern, offset: int = 0, *, first_row: int = 0) -> PatternError:
    """What `find_violation` says of a weight that has one; ``codes [N, groups·group]`` are its units, padded to whole groups."""
    row, group = (int(i) for i in _excess(codes, pattern).nonzero()[0])
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

    ``start`` is the column at which the rows begin, if they are a part of wider rows.

    Raises:
        PatternError: the matrix obeys none; the error is the first violation of the last candidate.
        ValueError: there are no candidates.
    """
    remaining, blocks = list(candidates), iter(blocks)
    if not remaining:
        raise ValueError("no candidates to look for")
    last = remaining[-1]
    nearest: PatternError | None = None
    block = next(blocks, None)
    while block is not None:
        (first, rows), block = block, next(blocks, None)
        for pattern in tuple(remaining):
            offset = start % (pattern.group * pattern.unit) // pattern.unit
            wrong = find_violation(rows, pattern, offset, first_row=first)
            if wrong is None and block is None:
                return pattern  # these were the last rows: what comes behind need not be looked at
            if wrong is not None:
                remaining.remove(pattern)
                nearest = wrong if pattern == last else nearest
        if nearest is not None and not remaining:
            raise nearest
    return remaining[0]
