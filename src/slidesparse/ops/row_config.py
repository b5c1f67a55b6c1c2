"""Launch configurations of the row kernels, by rows and their width; the numbers were measured on an H200."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch

from ..format import SCHEMES
from ..pattern import Pattern
from .library import capability

CACHED_CHUNKS = 16
"""Chunks of a row that stay in registers; a wider row is read twice, the second time mostly from cache."""
CACHED_CHUNKS_OF_16_WARPS = 13
"""Of programs of 16 warps, whose threads have 128 registers each."""

BOUNDS = {scheme.dtype: scheme.bound for scheme in SCHEMES.values() if scheme.dynamic}


class RowConfig(NamedTuple):
    """How one program works: ``rows`` rows, ``span`` times eight elements of each at a time, by ``warps`` warps.

    ``coalesced`` passes lifted words of 6:8 through shared memory too, so that neighbouring threads store neighbouring words.
    """

    rows: int
    span: int
    warps: int
    coalesced: bool = True


def row_config(m: int, k: int, group: int = 0) -> RowConfig:
    """The configuration that quantises ``m`` rows of ``k`` elements, and lifts them if there is a ``group``."""
    if k <= 512:
        span = max(2, 1 << max(-(-k // 8) - 1, 0).bit_length())
        return RowConfig(128 // span, span, 4, coalesced=False)
    if m <= 2048 or k > 12288:
        # Few rows, or long ones: many threads a row.
        return RowConfig(1, 256, 8, coalesced=k > 4096)
    if group == 8 or k > 4096:
        return RowConfig(1, 128, 4, coalesced=k > 4096)
    return RowConfig(1, 64, 2)


def norm_config(m: int, k: int) -> RowConfig:
    """The configuration for RMSNorm: `row_config`, with many threads a row whatever the number of rows."""
    return row_config(0, k)


def silu_config(m: int, k: int) -> RowConfig:
    """The configuration for SwiGLU, whose rows are two of ``k`` elements."""
    if k <= 512:
        return row_config(m, k)
    if m <= 256 and k > 4096:
        return RowConfig(1, 512, 16)
    return RowConfig(1, 256, 8) if k > 16384 else RowConfig(1, 128, 4)


def is_hopper(device: torch.device) -> bool:
    """Whether kernels may use what compute capability 9.0 brought: programmatic dependent launch, integer maxima of two 16-bit lanes."""
    return device.type == "cuda" and capability(device) >= (9, 0)


def row_constants(config: RowConfig, k: int, width: int, group: int, dtype: torch.dtype, compiled: bool, hopper: bool) -> dict[str, object]:
    """Compile-time parameters of kernels that hold rows of ``k`` elements; ``group`` is 0 if nothing is lifted.

    ``compiled`` is False under the interpreter, whose fused multiply-add rounds twice.
    """
    chunks = -(-(k if group else max(k, width)) // (8 * config.span))
    cached = chunks <= (CACHED_CHUNKS if config.warps < 16 else CACHED_CHUNKS_OF_16_WARPS)
    padding = 0
    if group:
        pairs = min(-(-k // group) * (group // 2), chunks * config.span * 4)
        padding = width // 4 - (pairs - pairs // (group // 2))
    return {
        "BOUND": BOUNDS[dtype], "INT8": dtype == torch.int8, "FUSED": compiled, "SM90": hopper, "launch_pdl": hopper,
        "GROUP": group, "PARTS": 2 if group not in (0, 8) else 1, "PAD_TILES": -(-padding // config.span),
        "ROWS": config.rows, "SPAN": config.span, "CHUNKS": chunks, "CACHED": cached,
        "COALESCED": config.coalesced, "num_warps": config.warps,
    }  # fmt: skip


def gather_constants(config: RowConfig, pattern: Pattern, offset: int, width: int, hopper: bool) -> dict[str, object]:
    """Compile-time parameters of the lift of any pattern and offset, words of ``LANES`` at a time."""
    lanes, words = gcd(pattern.l, 4), config.span * 2
    return {
        "SM90": hopper, "launch_pdl": hopper, "GROUP": pattern.group, "N": pattern.n, "L": pattern.l, "WINDOWS": pattern.windows,
        "OFFSET": offset, "LANES": lanes, "ROWS": config.rows, "WORDS": words, "TILES": -(-width // (words * lanes)),
        "num_warps": config.warps,
    }  # fmt: skip
