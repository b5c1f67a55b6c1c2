"""Slid weights in the order in which the kernel for compute capability 9.0 reads them.

A tile is 128 rows by 128 bytes of the slid matrix: 128 columns of 8-bit values, 64 of 16-bit ones. For each half of 64 rows it has the
kept values, 64 bytes a row in the 64-byte swizzle of shared memory (4,096), then metadata for each of 128 threads: two words (1,024), of
16-bit values one (512). Tiles of the same rows follow each other, so that one bulk copy brings what a step of the kernel multiplies. An
even number of steps, the last ones perhaps of zeros.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import Launch
from ..library import has_triton

ROWS, DEPTH = 128, 128
"""Rows of the slid matrix in a tile, and bytes of each."""
_HALF, _VALUES = 64, 4096
_BITS = {1: torch.uint8, 2: torch.int16}
_WINDOWS = {1: torch.int32, 2: torch.int64}
_WORDS = {1: (2, 2, 4), 2: (1, 4, 2)}
"""How a row's metadata in a tile is spread, by the values' bytes: words of a thread, threads side by side, bytes of each."""
_PAIRS = ((0, 1), (0, 1), (1, 2), (0, 1), (2, 3), (0, 2), (1, 2), (0, 1), (2, 3), (0, 3), (1, 3), (0, 1), (2, 3), (0, 1), (0, 1), (0, 1))
"""Positions of the two values of a window by the mask of its non-zeros: those, and neighbours where there are fewer than two."""


def tile_bytes(size: int) -> int:
    """Bytes of a tile of values of ``size`` bytes."""
    return 2 * (_VALUES + 1024 // size)


def tiles(n: int, k: int, size: int) -> tuple[int, int]:
    """Tiles of a slid matrix ``[N, K']`` of values of ``size`` bytes: down, and across (even)."""
    return -(-n // ROWS), -(-k * size // (2 * DEPTH)) * 2


def tiled_bytes(n: int, k: int, size: int) -> int:
    """Bytes of a slid matrix ``[N, K']`` in tiles."""
    down, across = tiles(n, k, size)
    return down * across * tile_bytes(size)


def tile(slid: Tensor) -> Tensor:
    """``slid [N, K']`` int8, float8_e4m3fn or a 16-bit float → uint8 ``[down, across, bytes]``; rows and columns beyond are zeros.

    A window of four has at most two non-zeros.

    Raises:
        ValueError: a window of more than two non-zeros, on a CPU; the kernel trusts `slide`.
    """
    (n, k), size = slid.shape, slid.element_size()
    down, across = tiles(n, k, size)
    if slid.is_cuda and has_triton() and k % 4 == 0:
        out = torch.empty(down, across, tile_bytes(size), dtype=torch.uint8, device=slid.device)
        _tile_call(n, k, slid.dtype)(slid.contiguous().view(_WINDOWS[size]), out)
        return out
    bits = F.pad(slid.view(_BITS[size]), (0, across * DEPTH // size - k, 0, down * ROWS - n))
    windows = bits.unflatten(1, (-1, 4))
    mask = ((windows & _magnitude(slid.dtype)) != 0).long() @ torch.tensor([1, 2, 4, 8], device=bits.device)
    wrong = torch.tensor([found.bit_count() > 2 for found in range(16)], device=bits.device)[mask]
    if bool(wrong.any()):
        row, window = (int(i) for i in wrong.nonzero()[0])
        held = slid[row, 4 * window : 4 * window + 4].float().tolist()
        raise ValueError(f"row {row}, window {window} holds more than 2 non-zeros: {held}")
    first, second = torch.tensor(_PAIRS, device=bits.device)[mask].unbind(-1)
    values = torch.stack((windows.gather(2, first[..., None]), windows.gather(2, second[..., None])), 2).flatten(1)
    nibbles = (first | second << 2).to(torch.uint8)
    return torch.cat((_values(values.view(torch.uint8), down, across), _words(nibbles, down, across, size)), -1).flatten(2)


def _magnitude(dtype: torch.dtype) -> int:
    """The bits that are zero in a zero of either sign."""
    return 0xFF if dtype == torch.int8 else 0x7F if dtype == torch.float8_e4m3fn else 0x7FFF


@cache
def _tile_call(n: int, k: int, dtype: torch.dtype) -> Launch:
    from .kernels_tile import tile_kernel

    down, across = tiles(n, k, dtype.itemsize)
    constants = {"SIZE": dtype.itemsize, "MAGNITUDE": _magnitude(dtype), "num_warps": 4}
    return Launch(tile_kernel, (2 * down, across), (n, k // 4, across), constants)


def untile(tiles_: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The way back: uint8 ``[down, across, bytes]`` → ``slid [N, K']``."""
    down, across = tiles_.shape[:2]
    size = dtype.itemsize
    halves = tiles_.unflatten(2, (2, -1)).transpose(1, 2)  # [down, 2, across, bytes of a half]
    values, words = halves.split((_VALUES, 1024 // size), -1)
    values = values.reshape(-1, across, _HALF, 4, 16)
    values = values.gather(3, _swizzle(values.device).expand_as(values)).permute(0, 2, 1, 3, 4).reshape(down * ROWS, -1)
    instructions, threads, run = _WORDS[size]
    bytes_ = words.reshape(down * 2, across, instructions, 4, 8, threads, 2, run).permute(0, 3, 6, 4, 1, 2, 5, 7).reshape(down * ROWS, -1)
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(1).long()
    slid = torch.zeros(down * ROWS, across * DEPTH // size // 4, 4, dtype=_BITS[size], device=tiles_.device)
    slid.scatter_(2, torch.stack((nibbles & 3, nibbles >> 2), -1), values.view(_BITS[size]).unflatten(1, (-1, 2)))
    return slid.flatten(1)[:n, :k].contiguous().view(dtype)


def _values(values: Tensor, down: int, across: int) -> Tensor:
    """``[rows, columns / 2]`` → ``[down, across, 2, 4096]``: 16-byte chunk c of row r lies at c ^ (r / 2 mod 4)."""
    split = values.view(down * 2, _HALF, across, 4, 16).permute(0, 2, 1, 3, 4)
    moved = split.gather(3, _swizzle(values.device).expand_as(split))
    return moved.reshape(down, 2, across, _VALUES).transpose(1, 2)


def _words(nibbles: Tensor, down: int, across: int, size: int) -> Tensor:
    """``[rows, columns / 4]`` → ``[down, across, 2, bytes of metadata]``.

    A word holds eight windows. Of 8-bit values thread 32 w + 4 g + t has one for each 64 columns, of row 16 w + g + 8 (t mod 2) windows
    8 (t / 2) to 8 (t / 2) + 7. Of 16-bit values it has one for all 64 columns, windows 4 t to 4 t + 3 of rows 16 w + g and 16 w + g + 8.
    """
    pairs = nibbles.view(down * ROWS, -1, 2)
    bytes_ = pairs[..., 0] | pairs[..., 1] << 4
    split = bytes_.view(down * 2, 4, 2, 8, across, *_WORDS[size]).permute(0, 4, 5, 1, 3, 6, 2, 7)
    return split.reshape(down, 2, across, 1024 // size).transpose(1, 2)


def _swizzle(device: torch.device) -> Tensor:
    rows, chunks = torch.arange(_HALF, device=device), torch.arange(4, device=device)
    return (chunks ^ (rows >> 1 & 3)[:, None])[:, :, None]
