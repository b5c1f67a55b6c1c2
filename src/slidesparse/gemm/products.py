"""Products of 8-bit values in plain torch, on any device: int8's are exact."""

from __future__ import annotations

import math
import time
from functools import cache

import torch
from torch import Tensor

from ..compat.torch import HAS_INT_MM, int_mm

_CHUNK = 1024  # 1024 products of at most 128 · 128 sum to at most 2^24, which float32 still holds exactly


def products(q: Tensor, dense: Tensor) -> Tensor:
    """Sums of 8-bit products, ``[M, K]`` · ``[N, K]``ᵀ: int32 and exact of int8, float32 of the others."""
    return int_matmul(q, dense) if q.dtype == torch.int8 else q.to(torch.float32) @ dense.to(torch.float32).t()


def int_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Exact int8 product ``[M, K]`` · ``[N, K]``ᵀ → int32 ``[M, N]``; K at most `slidesparse.ops.w8a8.WIDEST_K`.

    By `int_mm` wherever it is there, takes the shape, is exact and pays; it is wrong for K = 1 (torch 2.13). Elsewhere by float32. Of
    4096 × 4096 on 2 cores, with int8 dot products: 0.3 against 1.3 ms at M = 1, 27 against 59 ms at M = 512; with AVX2 alone: 9 against
    12 ms at M = 1, 3721 against 299 ms at M = 512.
    """
    if q.device.type == "cuda":
        usable = _int_mm_takes(q, weight)
    else:
        usable = q.shape[1] > 1 and _int_mm_is_exact(q.device.type) and _int_mm_pays(q.device.type)
    return int_mm(q, weight.t()) if usable else _in_floats(q, weight)


def _in_floats(q: Tensor, weight: Tensor) -> Tensor:
    """The same product by float32 in chunks of K that are short enough to be exact."""
    total = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        total += (q[:, columns].to(torch.float32) @ weight[:, columns].to(torch.float32).t()).to(torch.int32)
    return total


def _int_mm_takes(q: Tensor, weight: Tensor) -> bool:
    """cuBLASLt's limits: more than 16 rows, K and N multiples of 8."""
    return HAS_INT_MM and q.shape[0] > 16 and q.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0


@cache
def _int_mm_is_exact(device: str) -> bool:
    """Whether int8 products are summed exactly here: CPUs without int8 dot products may saturate pairs of them at 16 bits."""
    for left, right in ((127, 127), (127, -128)):
        q = torch.full((17, 256), left, dtype=torch.int8, device=device)
        weight = torch.full((32, 256), right, dtype=torch.int8, device=device)
        try:
            product = int_mm(q, weight.t())
        except (RuntimeError, NotImplementedError):
            return False
        if not bool((product == 256 * left * right).all()):
            return False
    return True


@cache
def _int_mm_pays(device: str) -> bool:
    """Whether int8 products are at least as fast here as float32's: CPUs without int8 dot products may do them one by one.

    Both give the same bits, so that the clock may decide, once, by 32 tokens and weights of 512 × 512.
    """
    q, weight = (torch.ones(rows, 512, dtype=torch.int8, device=device) for rows in (32, 512))
    took: dict[object, float] = {}
    for way in (int_mm, _in_floats) * 3:
        start = time.perf_counter()
        way(q, weight.t() if way is int_mm else weight)
        took[way] = min(took.get(way, math.inf), time.perf_counter() - start)
    return took[int_mm] <= took[_in_floats]
