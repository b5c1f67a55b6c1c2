"""Launch configurations of the row kernels, by row width; the numbers were measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass

CACHED_CHUNKS = 20
"""Chunks of a row that stay in registers; a wider row is read twice, the second time mostly from cache."""


@dataclass(frozen=True)
class Launch:
    """How one program works: ``rows`` rows, ``block`` elements of each at a time, by ``warps`` warps."""

    rows: int
    block: int
    warps: int

    def chunks(self, width: int) -> int:
        """Blocks that cover a row of ``width`` elements."""
        return -(-width // self.block)


def row_launch(width: int, *, lifted: bool = False) -> Launch:
    """The configuration for rows of ``width`` elements: 8 elements a thread and chunk, several rows a program where rows are short."""
    if width <= 512:
        block = max(16, 1 << max(width - 1, 0).bit_length())
        return Launch(1024 // block, block, 4)
    if width <= 4096:
        return Launch(1, 1024, 4) if lifted else Launch(1, 512, 2)
    return Launch(1, 2048, 8)
