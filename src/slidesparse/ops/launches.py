"""Every kind of launch of this package's Triton kernels, listed without a card, so that all can be compiled and looked at.

What a launch compiles depends on types, the pattern, which scales there are, and on classes of sizes: how many chunks a row has, whether
16 divides a number. The list holds a member of each class: the linear layers of Qwen2.5-7B, which the shipped plans were measured on, and
rows that are short, long, wider than registers hold, and ragged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from ..pattern import KNOWN, Pattern
from .expand import _INTEGERS, _PAIRS, _RESTORE, _SLIDE, _chunked, _restore_call, _slide_call
from .fused import _call as _fused_call
from .launch import Launch
from .library import Card, fuses, writes_e4m3
from .quantize import _gather_call, _groups_call, _lift_call
from .rescale import _OUTPUTS, _SUMS, rescale_call
from .sm90.layout import _tile_call as _tile_layout_call
from .w8a8 import Tile, _sum_call, _tile_call, tile_for

BF16, FP32, INT8, E4M3 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIX = Pattern(6, 8)
LAYERS = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
"""N and K of Qwen2.5-7B's linear layers."""

WIDTHS = (96, 515, 3584, 8192, 18944, 32768, 49152, 53248)
"""K of rows: several a program, ragged, with few, many and the most threads, as many as registers hold, and more."""

FEW_WIDTHS = (515, 3584, 53248)
"""Those for types that fewer layers have."""

TOKENS = (1, 4096)
"""Few and many rows: `slidesparse.ops.row_config` tells no more of them apart."""

CARDS = {(8, 0): (108, 163 << 10), (8, 9): (142, 99 << 10), (9, 0): (132, 227 << 10), (10, 0): (148, 227 << 10)}
"""Compute capabilities, with multiprocessors and bytes of shared memory a program: A100, L40S, H200, B200."""


class Block(NamedTuple):
    """Stands for a tensor descriptor: what it points to, and the shape that it loads."""

    dtype: torch.dtype
    shape: tuple[int, int]


class ShippedLaunch(NamedTuple):
    """A launch without its tensors and sizes of grids: everything that Triton compiles for.

    ``tensors`` are types of tensors, blocks of descriptors, or None; ``numbers`` follow them; ``constants`` are compile-time parameters and
    options of the launch, ``num_warps``, ``num_stages``, ``enable_fp_fusion`` and ``launch_pdl`` among them.
    """

    kernel: Any
    tensors: tuple[torch.dtype | Block | None, ...]
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]

    @classmethod
    def of(cls, launch: Launch, tensors: tuple[torch.dtype | Block | None, ...]) -> ShippedLaunch:
        """That of a launch on such tensors."""
        kernel, numbers, constants = launch.asked
        return cls(kernel, tensors, tuple(getattr(number, "value", number) for number in numbers), dict(constants))

    @property
    def name(self) -> str:
        """Of the kernel, behind that of the folder in this one that it stands in."""
        *folders, _ = self.kernel.fn.__module__.partition(".ops.")[2].split(".")
        return "_".join((*folders, self.kernel.__name__))

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for launches of one compiled kernel: Triton folds ones, and asks of most whole numbers whether 16 divides them."""
        behind = self.kernel.params[len(self.tensors) :]
        numbers = [
            (n == 1, n % 16 == 0) if type(n) is int and not parameter.do_not_specialize else type(n)
            for n, parameter in zip(self.numbers, behind, strict=False)
        ]
        return self.name, self.tensors, *numbers, *sorted(self.constants.items())


def shipped_launches(capability: tuple[int, int] = (9, 0)) -> list[ShippedLaunch]:
    """What may be launched on a card of this compute capability, one of `CARDS`, each once; needs Triton, but no card."""
    card = Card(capability)
    schemes = (INT8, E4M3) if writes_e4m3(capability) else (INT8,)
    scaled = () if fuses(capability) else (*_rescale(), *_w8a8(card))
    made = (*_rows(card, schemes), *_lifts(card), *_fused(card, schemes), *_expand(), *scaled, *_tiles(card))
    found: dict[tuple[Any, ...], ShippedLaunch] = {}
    for launch, tensors in made:
        one = ShippedLaunch.of(launch, tensors)
        found.setdefault(one.kind, one)
    return list(found.values())


Made = Iterator[tuple[Launch, tuple[torch.dtype | Block | None, ...]]]


def _rows(card: Card, schemes: Iterable[torch.dtype]) -> Made:
    """Quantisation, without a pattern and with each; patterns that threads cannot hold are gathered."""
    for x, q in product(FLOATS, schemes):
        for m, k, pattern in product(TOKENS, WIDTHS if x == BF16 else FEW_WIDTHS, (None, SIX)):
            yield _groups(card, m, k, x, q, pattern), (x, q, FP32)
        for k, pattern in product((515, 3584), KNOWN[1:] if x == BF16 else ()):
            yield _groups(card, 4096, k, x, q, pattern), (x, q, FP32)
        for k, (pattern, offset) in product((515, 3584), ((SIX, 5), (Pattern(4, 6), 3), (Pattern.parse("4:8@4:8"), 0))):
            width = pattern.slid_k(k, offset) + 3
            yield _gather_call((4096, k), k, x, card, q, pattern, offset, width, None, True), (x, q, FP32)


def _groups(card: Card, m: int, k: int, x: torch.dtype, q: torch.dtype, pattern: Pattern | None) -> Launch:
    return _groups_call((m, k), k, x, card, q, _width(k, pattern), None, True, 0 if pattern is None else pattern.group)


def _width(k: int, pattern: Pattern | None) -> int:
    """As wide as libraries want the rows."""
    return -(-(k if pattern is None else pattern.slid_k(k)) // 32) * 32


def _lifts(card: Card) -> Made:
    for integer, k, (pattern, offset) in product((INT8, torch.int16, torch.int32), (515, 3584), ((SIX, 0), (SIX, 5), (Pattern(8, 10), 0))):
        yield _lift_call((4096, k), k, integer, card, pattern, offset, _width(k, pattern) + 32, None), (integer, integer)


def _fused(card: Card, schemes: Iterable[torch.dtype]) -> Made:
    """RMSNorm and SwiGLU: of bfloat16 all patterns and sizes, but not each with each."""
    for x, q in product(FLOATS, schemes):
        cases: list[tuple[int, int, Pattern | None]] = [(m, k, SIX) for m, k in product(TOKENS, WIDTHS if x == BF16 else FEW_WIDTHS)]
        if x == BF16:
            cases += [(m, k, None) for m, k in product(TOKENS, WIDTHS)] + [(4096, 3584, pattern) for pattern in KNOWN[1:]]
        for m, k, pattern in cases:
            rest = (x, q), card, None, "" if pattern is None else pattern.text, _width(k, pattern), True
            yield _fused_call("silu", m, k, (2 * k,), (), *rest), (x, q, FP32)
            for summed in (False, True):
                yield _fused_call("norm", m, k, (k, k, 1e-6), (("SUMMED", summed),), *rest), (x, x, x, x if summed else q, q, FP32)


def _expand() -> Made:
    """Packed to dense and to slid rows, of whole words and ragged."""
    for size, pattern, k in product((1, 2), KNOWN, (3584, 3560, 515)):
        columns, keep = pattern.packed_k(k), pattern.keep_bytes(k)
        out = torch.int64 if _chunked(k, size) else _INTEGERS[size]
        yield _restore_call(3584, columns, keep, size, pattern, k, _RESTORE, True), (INT8, torch.uint8, out)
        pair, window = _PAIRS[size]
        yield (
            _slide_call(3584, 3584, columns // 2, _width(k, pattern) // 4, keep, size, pattern, _SLIDE[size]),
            (pair, torch.uint8, window),
        )


def _rescale() -> Made:
    for acc, y, (x, w, bias) in product(_SUMS, _OUTPUTS, product((None, FP32), (None, FP32), (None, BF16))):
        yield rescale_call((acc, y, x, w, bias), 4096, 3584, 3584), (acc, y, x, w, bias)
    yield rescale_call((torch.int32, BF16, FP32, FP32, FP32), 4096, 515, 528), (torch.int32, BF16, FP32, FP32, FP32)


def _w8a8(card: Card) -> Made:
    """Every tile for the layers, by descriptors where the card has them; ragged ones by pointers."""
    tokens = (1, 16, 17, 64, 65, 256, 1024, 4096, 16384)
    descriptors = (False, True) if card.capability >= (9, 0) else (False,)
    for m, (n, k), way in product(tokens, LAYERS, descriptors):
        tile = tile_for(m, n, k, *CARDS[card.capability])
        for y, bias in ((BF16, None), (BF16, BF16), (torch.float16, FP32), (FP32, None))[: 4 if n == 4608 else 2]:
            yield from _tiled(m, n, k, y, bias, tile, way)
    for m, k in product(tokens, (1000, 1008, 1024)):
        yield from _tiled(m, 515, k, BF16, BF16, tile_for(m, 515, k, *CARDS[card.capability]), False)


def _tiles(card: Card) -> Made:
    """Slid weights into the tiles of the product for 9.0."""
    for slid, (n, k) in product((INT8, E4M3, BF16) if card.capability == (9, 0) else (), (*LAYERS, (520, 1000))):
        yield _tile_layout_call(n, SIX.slid_k(k), slid), (torch.int32 if slid.itemsize == 1 else torch.int64, torch.uint8)


def _tiled(m: int, n: int, k: int, y: torch.dtype, bias: torch.dtype | None, tile: Tile, descriptors: bool) -> Made:
    split = tile.split > 1
    q, w = (Block(INT8, (tile.m, tile.k)), Block(INT8, (tile.n, tile.k))) if descriptors else (INT8, INT8)
    out = torch.int32 if split else y
    yield _tile_call(m, m, n, k, out, bias, tile, descriptors, True), (q, w, out, FP32, FP32, bias)
    if split:
        yield _sum_call(m, n, y, bias, tile.split), (torch.int32, y, FP32, FP32, bias)
