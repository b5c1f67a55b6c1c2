"""Packed weights expanded on the device, to dense or to slid rows, each a ``torch.library`` op.

On CUDA a Triton kernel runs for every pattern up to 16:18 of single elements of 1 or 2 bytes on 2:4 hardware; for the rest, without
Triton and on other devices the PyTorch of `slidesparse.packing` does. Both are bitwise the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import gcd, lcm

import torch
from torch import Tensor

from .. import packing
from ..format import Packed
from ..pattern import Pattern, parsed
from .launch import CALLS, Launch, allocate
from .library import define, has_triton

_INTEGERS = {1: torch.int8, 2: torch.int16}
_PAIRS = {1: (torch.int16, torch.int32), 2: (torch.int32, torch.int64)}
_GRID_AXIS = 65535
# The kernels hold a group's bits, and those of the byte it begins in, in 32.
_WIDEST = 18


@dataclass(frozen=True)
class Tile:
    """How one program works: ``warps`` warps side by side over ``rows`` rows, ``unroll`` times 16 output bytes a thread."""

    rows: int = 4
    warps: int = 4
    unroll: int = 2

    @property
    def block(self) -> int:
        """Threads along a row."""
        return 32 * self.warps // self.rows

    @property
    def constants(self) -> dict[str, int]:
        """What a kernel compiles in."""
        return {"ROWS": self.rows, "BLOCK": self.block, "UNROLL": self.unroll, "num_warps": self.warps}

    def grid(self, rows: int, nbytes: int) -> tuple[int, int, int]:
        """Programs that write ``rows`` rows of ``nbytes`` bytes."""
        blocks = -(-rows // self.rows)
        across = max(1, min(blocks, _GRID_AXIS))
        return -(-nbytes // (16 * self.block * self.unroll)), across, -(-blocks // across)


_RESTORE = Tile()
_SLIDE = {1: Tile(unroll=1), 2: Tile()}
"""Measured on an H200, by element size."""


def restore(packed: Packed) -> Tensor:
    """Packed → dense ``[N, K]`` of the values' dtype, bitwise `reference.restore`: +0.0 for every position without a value.

    The keep-bits are trusted (`pack.check_packed`); wrong ones give wrong weights, never a read outside the tensors.

    Raises:
        ValueError: values or keep-bits do not have the shape that the pattern and K ask for.
    """
    _check(packed)
    return _restore_op(packed.values, packed.keep, packed.pattern.text, packed.k)


def slide(packed: Packed, *, width: int | None = None, rows: int = 1) -> Tensor:
    """Packed → slid ``[N', width]``, bitwise `reference.slide` of the dense weights; zeros from column K' and from row N on.

    ``width`` is K' by default; N' is N rounded up to a multiple of ``rows``.

    Raises:
        ValueError: as `restore`; ``width`` is smaller than K', or ``rows`` not positive.
    """
    _check(packed)
    least = packed.pattern.slid_k(packed.k)
    if width is not None and width < least:
        raise ValueError(f"width {width} is smaller than the {least} columns of the slid rows")
    if rows < 1:
        raise ValueError(f"rows must be positive, got {rows}")
    width = least if width is None else width
    return _slide_op(packed.values, packed.keep, packed.pattern.text, packed.k, width, rows)


def _check(packed: Packed) -> None:
    values, keep, pattern, k = packed.values, packed.keep, packed.pattern, packed.k
    wanted = (values.shape[0], pattern.packed_k(k)), (values.shape[0], pattern.keep_bytes(k))
    if values.dim() != 2 or keep.dtype != torch.uint8 or (tuple(values.shape), tuple(keep.shape)) != wanted:
        raise ValueError(
            f"values {list(values.shape)} and keep-bits {keep.dtype} {list(keep.shape)} do not hold a matrix of pattern {pattern} "
            f"with K = {k}: {list(wanted[0])} and torch.uint8 {list(wanted[1])} do"
        )


def _takes(values: Tensor, pattern: Pattern) -> bool:
    able = (pattern.n, pattern.l, pattern.unit) == (2, 4, 1) and pattern.group <= _WIDEST
    return able and values.element_size() in _INTEGERS and has_triton()


def _restore_oracle(values: Tensor, keep: Tensor, pattern: str, k: int) -> Tensor:
    return packing.restore(Packed(values, keep, parsed(pattern), k))


def _slide_oracle(values: Tensor, keep: Tensor, pattern: str, k: int, width: int, rows: int) -> Tensor:
    slid = packing.slide(Packed(values, keep, parsed(pattern), k))
    n = -(-slid.shape[0] // rows) * rows
    if slid.shape == (n, width):
        return slid
    codes = packing.integer_view(slid)
    padded = codes.new_zeros(n, width)
    padded[: slid.shape[0], : slid.shape[1]] = codes
    return padded.view(values.dtype)


def _restore_cuda(values: Tensor, keep: Tensor, pattern: str, k: int) -> Tensor:
    own = parsed(pattern)
    return launch_restore(values, keep, own, k) if _takes(values, own) else _restore_oracle(values, keep, pattern, k)


def _slide_cuda(values: Tensor, keep: Tensor, pattern: str, k: int, width: int, rows: int) -> Tensor:
    own = parsed(pattern)
    if not _takes(values, own):
        return _slide_oracle(values, keep, pattern, k, width, rows)
    return launch_slide(values, keep, own, k, width, rows)


def _aligned(values: Tensor) -> Tensor:
    """Contiguous, and made of whole words, which are what kernels read; real layers always are."""
    values = values.contiguous()
    nbytes = values.numel() * values.element_size()
    if values.data_ptr() % 4 == 0 and nbytes % 4 == 0:
        return values
    whole = torch.empty(-(-nbytes // 4) * 4, dtype=torch.uint8, device=values.device)[:nbytes].view(values.dtype).view(values.shape)
    return whole.copy_(values)


@cache
def _chunk_shape(pattern: Pattern, size: int, stride: int) -> dict[str, int | bool]:
    """What the restore kernel must know of 16 output bytes: how many keep bytes before theirs hold bits of their first group, how many
    words their values may lie in, and whether those always begin at a whole word."""
    positions, group = 16 // size, pattern.group
    whole = positions % group == 0
    history = max(-(-(start % group) // 8) for start in range(0, lcm(positions, group), positions))
    nbytes, step = (positions // group * pattern.kept * size,) * 2 if whole else (16, size)
    aligned = gcd(4, stride, step)
    words = -(-(4 - aligned + nbytes) // 4)
    return {"KEPT": pattern.kept, "GROUP": group, "SIZE": size, "HISTORY": history, "WORDS": words, "ALIGNED": aligned == 4}


@cache
def _window_shape(pattern: Pattern, size: int) -> dict[str, int]:
    """What the slide kernel must know of the windows a thread writes: how many groups they may lie in, how many bytes a group's bits."""
    each, windows, group = 4 // size, pattern.windows, pattern.group
    groups = max(-(-(start % windows + each) // windows) for start in range(0, lcm(each, windows), each))
    return {"GROUP": group, "WINDOWS": windows, "GROUPS": groups, "SIZE": size, "BYTES": -(-(8 - gcd(group, 8) + group) // 8)}


def launch_restore(values: Tensor, keep: Tensor, pattern: Pattern, k: int, tile: Tile | None = None, *, inline: bool = True) -> Tensor:
    """Run the restore kernel on the current device and stream; ``inline`` is False under the interpreter, which has no assembly."""
    n, size = values.shape[0], values.element_size()
    dense = allocate(values, n, k, values.dtype)
    if dense.numel():
        values, keep = _aligned(values), keep.contiguous()
        out = dense.view(torch.int64 if _chunked(k, size) else _INTEGERS[size])
        _restore_call(n, values.shape[1], keep.shape[1], size, pattern, k, tile or _RESTORE, inline)(values.view(torch.int8), keep, out)
    return dense


def _chunked(k: int, size: int) -> bool:
    """Whether rows are made of whole 8-byte words."""
    return k * size % 8 == 0


@lru_cache(CALLS)
def _restore_call(n: int, columns: int, keep_bytes: int, size: int, pattern: Pattern, k: int, tile: Tile, inline: bool) -> Launch:
    from .kernels_expand import restore_kernel

    stride, chunked = columns * size, _chunked(k, size)
    across = k * size // 8 if chunked else k
    step = gcd(across, 2) if chunked else 1
    shape = _chunk_shape(pattern, size, stride) | {"CHUNKED": chunked, "STEP": step, "INLINE": inline}
    return Launch(restore_kernel, tile.grid(n, k * size), (n, across // step, stride, keep_bytes), shape | tile.constants)


def launch_slide(values: Tensor, keep: Tensor, pattern: Pattern, k: int, width: int, rows: int = 1, tile: Tile | None = None) -> Tensor:
    """Run the slide kernel on the current device and stream."""
    n, size = values.shape[0], values.element_size()
    n_out, windows_out = -(-n // rows) * rows, -(-width // 4)
    slid = allocate(values, n_out, windows_out * 4, values.dtype)
    if not values.numel():
        slid.view(torch.uint8).zero_()
    elif slid.numel():
        pair, window = _PAIRS[size]
        values, keep = _aligned(values), keep.contiguous()
        call = _slide_call(n, n_out, values.shape[1] // 2, windows_out, keep.shape[1], size, pattern, tile or _SLIDE[size])
        call(values.view(pair), keep, slid.view(window))
    # A width that cuts a window is a test's wish, no library's: a copy may pay for it.
    return slid if slid.shape[1] == width else slid[:, :width].contiguous()


@lru_cache(CALLS)
def _slide_call(n: int, n_out: int, windows: int, windows_out: int, keep_bytes: int, size: int, pattern: Pattern, tile: Tile) -> Launch:
    from .kernels_expand import slide_kernel

    each = 4 // size
    steps = gcd(windows, each), gcd(windows_out, each)
    shape = _window_shape(pattern, size) | {"WINDOWS_STEP": steps[0], "WIDTH_STEP": steps[1]}
    counts = (n, n_out, windows // steps[0], windows_out // steps[1], keep_bytes)
    return Launch(slide_kernel, tile.grid(n_out, windows_out * 4 * size), counts, shape | tile.constants)


_restore_op = define(
    "restore(Tensor values, Tensor keep, str pattern, SymInt k) -> Tensor",
    oracle=_restore_oracle, cuda=_restore_cuda, fake=lambda values, keep, pattern, k: values.new_empty((values.shape[0], k)),
)  # fmt: skip
_slide_op = define(
    "slide(Tensor values, Tensor keep, str pattern, SymInt k, SymInt width, int rows) -> Tensor",
    oracle=_slide_oracle, cuda=_slide_cuda,
    fake=lambda values, keep, pattern, k, width, rows: values.new_empty((-(-values.shape[0] // rows) * rows, width)),
)  # fmt: skip
