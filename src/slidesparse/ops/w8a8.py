"""The dense int8 linear layer as a ``torch.library`` op: exact int32 sums, scales and bias in float32, one rounding, in one kernel.

On CUDA a Triton kernel runs, bitwise equal to the oracle. Where Triton is missing or fuses, and on other devices, the oracle itself does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from .. import reference
from .launch import CALLS, Launch, allocate, allocator
from .library import capability, define, fuses, has_triton

WIDEST_K = 1 << 17
"""Widest K whose int8 products, at most 128 · 127 each, are sure to fit an int32 sum."""

_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)

# Tiles: the fastest of those timed on an H200, or at most 2.5 % slower, at the four linear layers of Qwen2.5-7B with 1, 16, 64, 256, 1024,
# 4096 and 16384 tokens. No other card was timed: there the rules are a guess, unverified but for this, that the kernels compile for 8.0,
# 8.6, 8.9 and 12.0 into the shared memory those cards have, because tiles too large get fewer stages.
H200 = 132, 227 << 10
"""Multiprocessors of the card that was timed, and bytes of shared memory a program may have."""

LONG_K = 8192
"""From here on splitting K pays for its second kernel: at K = 3584 it saved 1 % at most, at 18944 4 to 23 %."""

MOST_PARTS = 8

CACHE = 48 << 20
"""Bytes of weights that stay in the L2 cache; wider weights are read anew by every run of rows, so runs are longer."""

BARRIERS = 2048
"""Bytes of shared memory that are kept from the stages."""


def w8a8(q: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """y = (Σ q·weight) · w_scale · x_scale + bias: ``q [M', K]``, ``weight [N, K]`` → ``[M, N]``, bitwise `reference.linear`.

    q and weight are int8, q with M' ≥ M rows of which the first M count; x_scale float32 ``[M, 1]``, w_scale float32 ``[N, 1]``, bias
    ``[N]`` of any float type or None; the output is bfloat16, float16 or float32. Any M ≥ 0, N and K from 1; K a multiple of 16 is
    fast. NaN comes out as NaN, whose bits may differ.

    Raises:
        ValueError: a dtype or shape that does not fit, or K beyond `WIDEST_K`.
    """
    if q.dim() != 2 or weight.dim() != 2 or q.shape[1] != weight.shape[1]:
        raise ValueError(f"q [M, K] and weight [N, K] must be matrices of one K, got {list(q.shape)} and {list(weight.shape)}")
    if q.dtype != torch.int8 or weight.dtype != torch.int8:
        raise ValueError(f"q and weight must be int8, not {q.dtype} and {weight.dtype}")
    m, n, k = x_scale.numel(), weight.shape[0], weight.shape[1]
    if not 1 <= k <= WIDEST_K:
        raise ValueError(f"K = {k}: int32 sums hold 1 to {WIDEST_K} int8 products")
    if m > q.shape[0]:
        raise ValueError(f"x_scale has {m} rows, q only {q.shape[0]}")
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32 or w_scale.numel() != n:
        raise ValueError(f"scales must be float32, w_scale [{n}, 1]: got {x_scale.dtype}, {w_scale.dtype} {list(w_scale.shape)}")
    if bias is not None and (not bias.dtype.is_floating_point or bias.numel() != n):
        raise ValueError(f"bias must hold {n} floats, got {bias.dtype} {list(bias.shape)}")
    if out_dtype not in _OUTPUTS:
        raise ValueError(f"the output must be bfloat16, float16 or float32, not {out_dtype}")
    return _w8a8_op(q, weight, x_scale, w_scale, bias, out_dtype)


@dataclass(frozen=True)
class Tile:
    """How the product is cut: ``m`` tokens, ``n`` outputs and ``k`` bytes of a row at a time, by ``warps`` warps over ``stages`` buffers.

    ``split`` parts of K; ``group`` rows of tiles share their weights; ``swap`` makes weights the rows of the tensor core's tile;
    ``pieces`` cuts the way out.
    """

    m: int
    n: int
    k: int
    stages: int
    warps: int
    split: int = 1
    group: int = 8
    swap: bool = False
    pieces: int = 1


# Microseconds of a wave of tiles: to start and end it, and per 1000 of K.
_WAVES = (
    (Tile(128, 256, 128, 4, 8, pieces=2), 8.0, 5.76),
    (Tile(128, 128, 128, 4, 8), 5.2, 3.42),
    (Tile(64, 128, 128, 5, 4), 4.8, 2.31),
)


@lru_cache(4096)
def tile_for(m: int, n: int, k: int, processors: int = H200[0], shared: int = H200[1]) -> Tile:
    """The tile for m tokens, n outputs and this K on a card of so many multiprocessors and bytes of shared memory a program."""
    if k % 16:
        return Tile(64, 64, 64, 3, 4)  # not timed; bytes are read one by one, and the tiles below would spill their addresses
    tile = _reading(m, n, k, processors) if m <= 64 else _computing(m, n, k, processors)
    return replace(tile, stages=min(tile.stages, (shared - BARRIERS) // ((tile.m + tile.n) * tile.k)))


def _reading(m: int, n: int, k: int, processors: int) -> Tile:
    """Few tokens: weights are read once, so what counts is bytes on their way, in one wave of programs or in many."""
    wide = max(16, 1 << (m - 1).bit_length())
    parts = min(processors // -(-n // 128), MOST_PARTS) if k >= LONG_K else 1
    if parts > 1:
        return Tile(wide, 128, 256, 4, 4, parts, swap=True) if wide < 64 else Tile(64, 128, 128, 5, 4, parts, swap=True)
    if wide < 64:
        return Tile(wide, 32, 512, 4, 4, swap=True) if -(-n // 32) <= processors else Tile(wide, 64, 256, 4, 4, swap=True)
    # Beyond one wave: two programs a multiprocessor.
    return Tile(64, 64, 256, 4, 4, swap=True) if -(-n // 64) <= processors else Tile(64, 64, 128, 6, 4, swap=True)


def _computing(m: int, n: int, k: int, processors: int) -> Tile:
    """Many tokens: the tile, and parts of K, whose waves end first."""
    timed: list[tuple[float, Tile]] = []
    for tile, start, slope in _WAVES[n % 16 > 0 :]:  # where outputs are not whole vectors, the first one's registers spill
        tiles = -(-m // tile.m) * -(-n // tile.n)
        for split in (1, 2, 4, 8) if k >= LONG_K and tiles < processors and tile.pieces == 1 else (1,):
            time = -(-tiles * split // processors) * (start + slope * k / split / 1000)
            if split > 1:
                # The second kernel, and partial sums written and read: 4 bytes each way at 3.5 MB/us.
                time += 4 + m * n * 8 * split / 3.5e6
            timed.append((time, replace(tile, split=split)))
    best = min(timed, key=lambda one: one[0])[1]
    return replace(best, group=16 if m > 1024 and n * k > CACHE else 8)


def _w8a8_oracle(q: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return reference.linear(q[: x_scale.numel()], x_scale, weight, w_scale, bias, dtype)


def _w8a8_cuda(q: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if fuses(capability(q.device)) or not has_triton():
        return _w8a8_oracle(q, weight, x_scale, w_scale, bias, dtype)
    return launch_w8a8(q, weight, x_scale, w_scale, bias, dtype)


@cache
def _resources(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory a program may have."""
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's hints lack it


def _describes(device: torch.device, k: int) -> bool:
    """Whether tensor descriptors can read rows of k bytes: 16-byte rows on a card that has them."""
    return device.type == "cuda" and k % 16 == 0 and capability(device) >= (9, 0)


def _aligned(q: Tensor, weight: Tensor) -> bool:
    """Whether both begin where descriptors may."""
    return q.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0


def launch_w8a8(
    q: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: Tile | None = None, *,
    descriptors: bool | None = None,
) -> Tensor:  # fmt: skip
    """Run the kernels on the current device and stream; ``descriptors`` False reads through pointers."""
    q, weight = q.contiguous(), weight.contiguous()
    x_scale, w_scale, bias = x_scale.contiguous(), w_scale.contiguous(), None if bias is None else bias.contiguous()
    m, (n, k) = x_scale.numel(), weight.shape
    y = allocate(q, m, n, dtype)
    if not y.numel():
        return y
    tile = tile or tile_for(m, n, k, *_resources(q.device))
    if descriptors is None:
        descriptors = _describes(q.device, k) and _aligned(q, weight)
    a, b = _descriptors(q, weight, tile) if descriptors else (q, weight)
    out = y if tile.split == 1 else allocate(q, tile.split * m, n, torch.int32)
    bias_type = None if bias is None else bias.dtype
    _tile_call(q.shape[0], m, n, k, out.dtype, bias_type, tile, descriptors, q.is_cuda)(a, b, out, x_scale, w_scale, bias)
    if tile.split > 1:
        _sum_call(m, n, dtype, bias_type, tile.split)(out, y, x_scale, w_scale, bias)
    return y


def bound_w8a8(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype, bias: torch.dtype | None) -> Callable[..., Tensor]:
    """`w8a8` of ``m`` rows by weights ``[n, k]``, with what types and shapes decide decided.

    To be called on the current device with q, token scales, ``(weight,)``, weight scales and bias, each contiguous.
    """
    tile, empty = tile_for(m, n, k, *_resources(device)), allocator(device)
    on_card, describes = device.type == "cuda", _describes(device, k)
    calls = {way: _tile_call(m, m, n, k, torch.int32 if tile.split > 1 else dtype, bias, tile, way, on_card) for way in (False, True)}
    partial_sums = ((tile.split * m, n), (n, 1), torch.int32)
    total = _sum_call(m, n, dtype, bias, tile.split) if tile.split > 1 else None

    def product(q: Tensor, x_scale: Tensor, copy: tuple[Tensor, ...], w_scale: Tensor, added: Tensor | None) -> Tensor:
        weight, y = copy[0], empty((m, n), (n, 1), dtype)
        way, out = describes and _aligned(q, weight), y if total is None else empty(*partial_sums)
        calls[way](*(_descriptors(q, weight, tile) if way else (q, weight)), out, x_scale, w_scale, added)
        if total is not None:
            total(out, y, x_scale, w_scale, added)
        return y

    return product


def _descriptors(q: Tensor, weight: Tensor, tile: Tile) -> tuple[object, object]:
    from ..compat.triton import TensorDescriptor

    return TensorDescriptor.from_tensor(q, [tile.m, tile.k]), TensorDescriptor.from_tensor(weight, [tile.n, tile.k])


@lru_cache(CALLS)
def _tile_call(
    rows: int, m: int, n: int, k: int, dtype: torch.dtype, bias: torch.dtype | None, tile: Tile, descriptors: bool, compiled: bool
) -> Launch:
    from triton.language import constexpr

    from .kernels_w8a8 import tile_kernel

    tiles = -(-m // tile.m) * -(-n // tile.n)
    steps = -(-k // (tile.k * tile.split))
    constants = {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group, "SPLIT": tile.split, "SWAP": tile.swap,
        "EVEN": descriptors or k == steps * tile.k * tile.split, "DESCRIPTOR": descriptors, "BIAS": bias is not None,
        "PIECES": tile.pieces, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False,
    }  # fmt: skip
    # The interpreter loops to no other bound than a constant.
    return Launch(tile_kernel, (tiles * tile.split,), (rows, m, n, k, steps if compiled else constexpr(steps)), constants)


@lru_cache(CALLS)
def _sum_call(m: int, n: int, dtype: torch.dtype, bias: torch.dtype | None, split: int) -> Launch:
    from .kernels_w8a8 import sum_kernel

    block = 256
    constants = {"SPLIT": split, "BLOCK": block, "BIAS": bias is not None, "num_warps": 2, "enable_fp_fusion": False}
    return Launch(sum_kernel, (-(-n // block) * m,), (m, n), constants)


_w8a8_op = define(
    "w8a8(Tensor q, Tensor weight, Tensor x_scale, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    oracle=_w8a8_oracle, cuda=_w8a8_cuda,
    fake=lambda q, weight, x_scale, w_scale, bias, dtype: q.new_empty((x_scale.shape[0], weight.shape[0]), dtype=dtype),
)  # fmt: skip
