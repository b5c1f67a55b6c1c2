"""Slid weights in the order in which the kernel for compute capability 9.0 reads them.

A tile is 128 rows by 128 columns of the slid matrix, 10,240 bytes: for each half of 64 rows the kept values, 64 bytes a row in the 64-byte
swizzle of shared memory (4,096), then two words of metadata for each of 128 threads (1,024). Tiles of the same rows follow each other, so
that one bulk copy brings what a step of the kernel multiplies. An even number of steps, the last ones perhaps of zeros.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import Launch
from ..library import has_triton

ROWS, COLUMNS = 128, 128
"""Rows and columns of the slid matrix in a tile."""
TILE_BYTES = 10240
_HALF, _VALUES = 64, 4096
_PAIRS = ((0, 1), (0, 1), (1, 2), (0, 1), (2, 3), (0, 2), (1, 2), (0, 1), (2, 3), (0, 3), (1, 3), (0, 1), (2, 3), (0, 1), (0, 1), (0, 1))
"""Positions of the two values of a window by the mask of its non-zeros: those, and neighbours where there are fewer than two."""


def tiles(n: int, k: int) -> tuple[int, int]:
    """Tiles of a slid matrix ``[N, K']``: down, and across (even)."""
    return -(-n // ROWS), -(-k // (2 * COLUMNS)) * 2


def tiled_bytes(n: int, k: int) -> int:
    """Bytes of a slid matrix ``[N, K']`` of 8-bit values in tiles."""
    down, across = tiles(n, k)
    return down * across * TILE_BYTES


def tile(slid: Tensor) -> Tensor:
    """``slid [N, K']`` int8 or float8_e4m3fn, at most two non-zeros in each window of four → uint8 ``[tiles down, across, 10240]``.

    Rows and columns beyond are zeros.

    Raises:
        ValueError: a window of more than two non-zeros, on a CPU; the kernel trusts `slide`.
    """
    down, across = tiles(*slid.shape)
    if slid.is_cuda and has_triton() and slid.shape[1] % 4 == 0:
        out = torch.empty(down, across, TILE_BYTES, dtype=torch.uint8, device=slid.device)
        _tile_call(*slid.shape, slid.dtype)(slid.contiguous().view(torch.int32), out)
        return out
    bits = F.pad(slid.view(torch.uint8), (0, across * COLUMNS - slid.shape[1], 0, down * ROWS - slid.shape[0]))
    windows = bits.unflatten(1, (-1, 4))
    mask = ((windows & 0x7F if slid.dtype == torch.float8_e4m3fn else windows) != 0).long() @ torch.tensor([1, 2, 4, 8], device=bits.device)
    if bool(torch.tensor([found.bit_count() > 2 for found in range(16)], device=bits.device)[mask].any()):
        raise ValueError("slid weights have a window of more than two non-zeros")
    first, second = torch.tensor(_PAIRS, device=bits.device)[mask].unbind(-1)
    values = torch.stack((windows.gather(2, first[..., None]), windows.gather(2, second[..., None])), 2).flatten(1)
    nibbles = (first | second << 2).to(torch.uint8)
    return torch.cat((_values(values, down, across), _words(nibbles, down, across)), -1).flatten(2)


@cache
def _tile_call(n: int, k: int, dtype: torch.dtype) -> Launch:
    from .kernels_tile import tile_kernel

    down, across = tiles(n, k)
    magnitude = 0x7F if dtype == torch.float8_e4m3fn else 0xFF
    return Launch(tile_kernel, (2 * down, across), (n, k // 4, across), {"MAGNITUDE": magnitude, "num_warps": 4})


def untile(tiles_: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The way back: uint8 ``[tiles down, across, 10240]`` → ``slid [N, K']``."""
    down, across = tiles_.shape[:2]
    halves = tiles_.unflatten(2, (2, -1)).transpose(1, 2)  # [down, 2, across, 5120]
    values, words = halves.split((_VALUES, 1024), -1)
    values = values.reshape(-1, across, _HALF, 4, 16)
    values = values.gather(3, _swizzle(tiles_.device).expand_as(values)).permute(0, 2, 1, 3, 4).reshape(down * ROWS, -1, 2)
    bytes_ = words.reshape(down * 2, across, 2, 4, 8, 2, 2, 4).permute(0, 3, 6, 4, 1, 2, 5, 7).reshape(down * ROWS, -1)
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(1).long()
    slid = torch.zeros(down * ROWS, across * COLUMNS // 4, 4, dtype=torch.uint8, device=tiles_.device)
    slid.scatter_(2, torch.stack((nibbles & 3, nibbles >> 2), -1), values)
    return slid.flatten(1)[:n, :k].contiguous().view(dtype)


def _values(values: Tensor, down: int, across: int) -> Tensor:
    """``[rows, columns / 2]`` → ``[down, across, 2, 4096]``: 16-byte chunk c of row r lies at c ^ (r / 2 mod 4)."""
    split = values.view(down * 2, _HALF, across, 4, 16).permute(0, 2, 1, 3, 4)
    moved = split.gather(3, _swizzle(values.device).expand_as(split))
    return moved.reshape(down, 2, across, _VALUES).transpose(1, 2)


def _words(nibbles: Tensor, down: int, across: int) -> Tensor:
    """``[rows, columns / 4]`` → ``[down, across, 2, 1024]``.

    The word of thread 32 w + 4 g + t for 64 columns holds rows 16 w + g + 8 (t mod 2), windows 8 (t / 2) to 8 (t / 2) + 7.
    """
    pairs = nibbles.view(down * ROWS, -1, 2)
    bytes_ = pairs[..., 0] | pairs[..., 1] << 4
    split = bytes_.view(down * 2, 4, 2, 8, across, 2, 2, 4).permute(0, 4, 5, 1, 3, 6, 2, 7)
    return split.reshape(down, 2, across, 1024).transpose(1, 2)


def _swizzle(device: torch.device) -> Tensor:
    rows, chunks = torch.arange(_HALF, device=device), torch.arange(4, device=device)
    return (chunks ^ (rows >> 1 & 3)[:, None])[:, :, None]
