"""Launch configurations of the row kernels, by rows and their width; the numbers were measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass

CACHED_CHUNKS = 20
"""Chunks of a row that stay in registers; a wider row is read twice, the second time mostly from cache."""


@dataclass(frozen=True)
class Launch:
    """How one program works: ``rows`` rows, ``span`` groups of each at a time, by ``warps`` warps.

    ``overlap`` lets programs be placed while the kernel before drains (programmatic dependent launch), where the card can.
    """

    rows: int
    span: int
    warps: int
    overlap: bool = True

    def chunks(self, groups: int) -> int:
        """Chunks that cover a row of ``groups`` groups."""
        return -(-groups // self.span)


def row_launch(m: int, groups: int) -> Launch:
    """The configuration for ``m`` rows of ``groups`` groups (8 elements each where nothing is lifted): one group a thread and chunk."""
    if groups <= 64:
        span = max(2, 1 << max(groups - 1, 0).bit_length())
        return Launch(128 // span, span, 4)
    if groups <= 512:
        return Launch(1, 64, 2)
    return Launch(1, 256, 8)
