"""Columns of packed rows: the part that one rank of a row-parallel layer holds, exact for every split.

A split may cut a group. The rank then takes every group that its columns touch; where the first one begins before its columns, or a
library wants round widths, its rows are widened by zeros on both sides and its activations by as many, which changes no product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import Packed
from ..pattern import Pattern
from .pack import pack, restore

ALIGNED = 32
"""Widened rows are a multiple of so many values: what every library here takes."""


@dataclass(frozen=True)
class Shard:
    """Columns ``start … stop - 1`` of rows of ``k`` values under a pattern.

    Raises:
        ValueError: no columns, columns outside the row, or an edge inside a pair.
    """

    pattern: Pattern
    k: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.k:
            raise ValueError(f"columns {self.start}–{self.stop - 1} are not within K = {self.k}")
        for edge in (self.start, self.stop, self.k):
            self.pattern.units(edge)

    @classmethod
    def even(cls, pattern: Pattern, k: int, rank: int, size: int) -> Shard:
        """The columns of one of ``size`` equal parts.

        Raises:
            ValueError: ``k`` cannot be divided so.
        """
        if size < 1 or k % size or not 0 <= rank < size:
            raise ValueError(f"K = {k} has no part {rank} of {size} equal ones")
        return cls(pattern, k, rank * (k // size), (rank + 1) * (k // size))

    @property
    def columns(self) -> int:
        """How many columns it has."""
        return self.stop - self.start

    @property
    def groups(self) -> range:
        """The groups that it touches."""
        return range(self.start // self._wide, -(-self.stop // self._wide))

    @property
    def offset(self) -> int:
        """Values between the start of its first group and its own first column."""
        return self.start % self._wide

    @property
    def covered(self) -> int:
        """Values of the row in the groups that it touches: its own columns, and those of neighbours in a cut group."""
        return min(self.groups.stop * self._wide, self.k) - self.groups.start * self._wide

    @property
    def whole(self) -> bool:
        """Whether no other shard has columns in its groups."""
        return self.covered == self.columns

    @property
    def margins(self) -> tuple[int, int]:
        """Zeros to the left and right of its columns: none unless it begins inside a group."""
        if not self.offset:
            return 0, 0
        return self.offset, -(self.offset + self.columns) % ALIGNED

    @property
    def packed_k(self) -> int:
        """Stored values per row of the groups that it touches."""
        return self.pattern.packed_k(self.covered)

    @property
    def keep_bytes(self) -> int:
        """Bytes of keep-bits per row of the groups that it touches."""
        return self.pattern.keep_bytes(self.covered)

    def values(self, values: Tensor) -> Tensor:
        """Of stored values ``[N, packed K]``, those of the groups that it touches: a view ``[N, packed_k]``."""
        return values.narrow(1, self.groups.start * self.pattern.kept * self.pattern.unit, self.packed_k)

    def keep(self, keep: Tensor) -> Tensor:
        """Of keep-bits ``[N, bytes]``, those of the groups that it touches, from bit 0 on: ``[N, keep_bytes]``."""
        first, bits = self.groups.start * self.pattern.group, len(self.groups) * self.pattern.group
        byte, shift = divmod(first, 8)
        taken = keep.narrow(1, byte, -(-(shift + bits) // 8))
        if shift:
            wide = torch.nn.functional.pad(taken, (0, 1)).to(torch.int16)
            taken = ((wide[:, :-1] | wide[:, 1:] << 8) >> shift & 0xFF).to(torch.uint8)
        taken = taken[:, : self.keep_bytes].clone()
        if bits % 8:
            taken[:, -1] &= (1 << bits % 8) - 1
        return taken

    def cut(self, packed: Packed) -> Packed:
        """From the packed groups that it touches (`values`, `keep`), its own columns within its `margins`; the same where it is whole."""
        if self.whole:
            return packed
        return self.pack(restore(packed)[:, self.offset : self.offset + self.columns])

    def pack(self, weight: Tensor) -> Packed:
        """Pack its own columns ``[N, columns]``, widened by its `margins`.

        Raises:
            PatternError: see `pack`; groups are counted from the first that it touches.
        """
        left, right = self.margins
        if left or right:
            wide = torch.zeros(weight.shape[0], left + self.columns + right, dtype=weight.dtype, device=weight.device)
            wide[:, left : left + self.columns] = weight
            weight = wide
        return pack(weight, self.pattern)

    @property
    def _wide(self) -> int:
        return self.pattern.group * self.pattern.unit
