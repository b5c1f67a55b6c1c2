"""2:4 sparse GEMM by cuSPARSELt as ``torch.library`` ops: compress slid weights once, multiply with cached plans, search algorithms.

Weights are the library's sparse operand, activations ``[M, K']`` the dense one, both of one type: int8, float8_e4m3fn, bfloat16 or
float16. FP4 (e2m1 with block scales) exists on compute capability 10.0 and later only and is left out. The compressed form is the
library's own, may differ between its versions and cards, and is never stored.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from . import cusparselt_search
from .cusparselt_plans import Algorithm, LibraryPlan, Plans, Sparse, handle, library
from .launch import allocate
from .library import capability, define

__all__ = ["TOKENS", "Algorithm", "alignment", "compress", "scales_rows", "search", "sparse_mm", "token_step", "unavailable", "version"]

TOKENS = 16
"""M must be a multiple of this."""

OUT_DTYPES = {
    torch.int8: (torch.bfloat16, torch.float16, torch.int32),
    torch.float8_e4m3fn: (torch.bfloat16, torch.float16, torch.float32),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}

EXACT_DTYPES = {kind: kinds[-1] for kind, kinds in OUT_DTYPES.items()}
"""The widest type in which products of a type come."""

plans = Plans()


def unavailable(device: torch.device | str, dtype: torch.dtype | None = None) -> str | None:
    """Why products cannot run on this device, of this type if one is given; None if they can. Cached."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"cuSPARSELt runs on CUDA, not on {device.type}"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "there is no NVIDIA GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    if dtype is not None and dtype not in OUT_DTYPES:
        return f"cuSPARSELt does not multiply {dtype}"
    if dtype == torch.float8_e4m3fn and capability(torch.device("cuda", index)) < (8, 9):
        return "fp8 needs compute capability 8.9"
    return _unavailable(index)


@cache
def _unavailable(index: int) -> str | None:
    major, minor = capability(torch.device("cuda", index))
    if major < 8:
        return f"2:4 tensor cores need compute capability 8.0, this is {major}.{minor}"
    try:
        with torch.cuda.device(index):
            handle(index)
    except UnsupportedError as error:
        return str(error)
    return None


@cache
def version() -> str:
    """The library's version, such as ``0.8.0``.

    Raises:
        UnsupportedError: it cannot be loaded.
    """
    return ".".join(str(library().get_property(part)) for part in range(3))


def alignment(dtype: torch.dtype) -> int:
    """What N and K' must be multiples of: 32 for 8-bit types, 16 for 16-bit ones.

    Raises:
        ValueError: the type is not multiplied.
    """
    if dtype not in OUT_DTYPES:
        raise ValueError(f"cuSPARSELt does not multiply {dtype}: give int8, float8_e4m3fn, bfloat16 or float16")
    return 32 // dtype.itemsize


def token_step(m: int) -> int:
    """What ``m`` tokens had better be a multiple of, so that serving engines, which meet every number, need few plans.

    At most an eighth more rows, a thirtieth beyond 4096, most of which large tiles compute anyway.
    """
    if m <= 512:
        return TOKENS
    return 64 if m <= 4096 else 128


def scales_rows(dtype: torch.dtype, out_dtype: torch.dtype) -> bool:
    """Whether `sparse_mm` takes ``alpha``: the library scales rows of int8 products only, and int32 sums are returned as they are."""
    return dtype == torch.int8 and out_dtype != torch.int32


def compress(slid: Tensor) -> Tensor:
    """Compress a 2:4 matrix: ``slid [N, K']`` → opaque uint8 ``[bytes]``, about half and an eighth of its elements' size.

    It waits for the device, to check the matrix.

    Raises:
        ValueError: not a contiguous 2:4 matrix of a type that is multiplied, or N or K' is not a multiple of `alignment`.
        UnsupportedError: see `unavailable`.
    """
    return _compress_op(slid)


def sparse_mm(q: Tensor, compressed: Tensor, alpha: Tensor | None, n: int, out_dtype: torch.dtype, algorithm: str = "") -> Tensor:
    """Multiply: ``q [M, K']`` by what `compress` made of ``[N, K']`` → ``y [M, N]`` of ``out_dtype``, rows scaled by ``alpha [N]``.

    ``q`` is contiguous with M a multiple of 16, ``alpha`` float32 per row of the weights or None. Outputs: bfloat16, float16 and int32
    sums of int8, these rounded once to float32 on the way; bfloat16, float16 and float32 of e4m3; their own type of 16-bit inputs.
    ``algorithm`` is the text form of an `Algorithm`, empty for the library's choice. The first call of a shape, type and algorithm makes
    a plan, which cannot happen while a CUDA graph is captured.

    Raises:
        ValueError: shapes or types do not fit, or ``algorithm`` cannot be read.
        UnsupportedError: see `unavailable`; the library refuses the algorithm, or a plan is missing under capture.
    """
    return _sparse_mm_op(q, compressed, alpha, n, out_dtype, algorithm)


def plan_for(wanted: tuple[Any, ...]) -> LibraryPlan:
    """The plan for the fields of a `Multiplication` on the current device, made if it is not known.

    Raises:
        UnsupportedError: see `unavailable`; the library refuses it, or it would have to be made while a CUDA graph is captured.
    """
    return plans.known(wanted) or plans.make(wanted)


def search(q: Tensor, compressed: Tensor, alpha: Tensor | None, n: int, out_dtype: torch.dtype) -> list[Algorithm]:
    """Algorithms worth timing for one `sparse_mm`, the fastest first; each gave the result of the library's own choice.

    Raises:
        ValueError, UnsupportedError: as `sparse_mm`.
    """
    # Checks the operands, and that the library takes them.
    sparse_mm(q, compressed, alpha, n, out_dtype)
    with torch.cuda.device(q.device):
        return cusparselt_search.search(q, compressed, alpha, n, out_dtype)


def checked(q: Tensor, compressed: Tensor, alpha: Tensor | None, n: int, out_dtype: torch.dtype) -> None:
    """Refuse operands of `sparse_mm` that do not fit each other, as far as the library is not needed to tell.

    Raises:
        ValueError: they do not.
    """
    if q.dim() != 2 or not q.is_contiguous():
        raise ValueError(f"q must be a contiguous matrix [M, K'], got shape {list(q.shape)}, strides {list(q.stride())}")
    align = alignment(q.dtype)
    if out_dtype not in OUT_DTYPES[q.dtype]:
        raise ValueError(f"products of {q.dtype} come as {', '.join(str(dtype) for dtype in OUT_DTYPES[q.dtype])}, not {out_dtype}")
    if q.shape[0] % TOKENS:
        raise ValueError(f"M = {q.shape[0]} is not a multiple of {TOKENS}")
    if n % align or q.shape[1] % align or not n or not q.shape[1]:
        raise ValueError(f"N = {n} and K' = {q.shape[1]} must be multiples of {align} for {q.dtype}")
    index = q.get_device()
    if not _is_vector(compressed, index, torch.uint8):
        raise ValueError(f"compressed weights must be uint8 [bytes] on {q.device}, got {compressed.dtype} on {compressed.device}")
    if alpha is not None and not scales_rows(q.dtype, out_dtype):
        raise ValueError(f"rows of {out_dtype} products of {q.dtype} cannot be scaled: alpha must be None")
    if alpha is not None and not _is_alpha(alpha, index, n):
        raise ValueError(f"alpha must be float32 [{n}] on {q.device}, got {alpha.dtype} {list(alpha.shape)} on {alpha.device}")


def compressed_bytes(n: int, k: int, dtype: torch.dtype) -> int:
    """Size of ``[N, K']`` compressed: half the values, and two bits for each kept one in whole tiles (0.8.0, compute capability 9.0).

    Tiles are 64 × 64; of 16-bit values 64 × 32 or 32 × 64, whichever fill more.
    """

    def filled(rows: int, columns: int) -> int:
        return -(-n // rows) * rows * (-(-k // columns) * columns)

    narrow = 64 // dtype.itemsize
    return n * k * dtype.itemsize // 2 + max(filled(64, narrow), filled(narrow, 64)) // 8


def _check_slid(slid: Tensor) -> None:
    if slid.dim() != 2 or not slid.is_contiguous():
        raise ValueError(f"slid weights must be a contiguous matrix [N, K'], got shape {list(slid.shape)}")
    align = alignment(slid.dtype)
    if slid.shape[0] % align or slid.shape[1] % align or not slid.numel():
        raise ValueError(f"N = {slid.shape[0]} and K' = {slid.shape[1]} must be multiples of {align} for {slid.dtype}")


def _check_windows(slid: Tensor) -> None:
    """The library compresses anything and drops what does not fit, silently."""
    bits = slid.view(torch.int8 if slid.dtype.itemsize == 1 else torch.int16)
    magnitude = -1 if slid.dtype == torch.int8 else torch.iinfo(bits.dtype).max
    for first, rows in enumerate(bits.split(4096)):
        kept = (rows & magnitude != 0).unflatten(1, (-1, 4)).sum(-1, dtype=torch.uint8)
        if bool((kept > 2).any()):
            row, window = (int(i) for i in (kept > 2).nonzero()[0])
            values = slid[4096 * first + row, 4 * window : 4 * window + 4].float().tolist()
            raise ValueError(f"row {4096 * first + row}, window {window} holds more than 2 non-zeros: {values}")


def _compress_cuda(slid: Tensor) -> Tensor:
    _check_slid(slid)
    _check_windows(slid)
    sparse = Sparse(slid.device.index, slid.shape[0], slid.shape[1], slid.dtype)
    compressed = torch.empty(sparse.compressed_bytes, dtype=torch.uint8, device=slid.device)
    sparse.compress(slid, compressed)
    return compressed


def _compress_fake(slid: Tensor) -> Tensor:
    n, k = slid.shape
    alignment(slid.dtype)
    return slid.new_empty(compressed_bytes(n, k, slid.dtype), dtype=torch.uint8)


def _sparse_mm_cuda(q: Tensor, compressed: Tensor, alpha: Tensor | None, n: int, out_dtype: torch.dtype, algorithm: str) -> Tensor:
    index = q.get_device()
    m, k = q.shape if q.dim() == 2 else (0, 0)
    plan = plans.known((index, n, k, m, q.dtype, out_dtype, alpha is not None, algorithm))
    # Decode calls this hundreds of times a step: what a known plan vouches for is not checked again.
    if plan is None or not (q.is_contiguous() and _is_vector(compressed, index, torch.uint8) and _is_alpha(alpha, index, n)):
        checked(q, compressed, alpha, n, out_dtype)
    y = allocate(q, m, n, out_dtype)
    if not m:
        return y
    if plan is None:
        plan = plans.make((index, n, k, m, q.dtype, out_dtype, alpha is not None, algorithm))
    if compressed.numel() != plan.compressed_bytes:
        raise ValueError(f"weights [{n}, {k}] of {q.dtype} take {plan.compressed_bytes} bytes, got {compressed.numel()}")
    plan.run(q, compressed, alpha, y)
    return y


def _is_vector(x: Tensor, index: int, dtype: torch.dtype) -> bool:
    return x.get_device() == index and x.dtype == dtype and x.dim() == 1 and x.is_contiguous()


def _is_alpha(alpha: Tensor | None, index: int, n: int) -> bool:
    return alpha is None or (_is_vector(alpha, index, torch.float32) and alpha.numel() == n)


def _sparse_mm_fake(q: Tensor, compressed: Tensor, alpha: Tensor | None, n: int, out_dtype: torch.dtype, algorithm: str) -> Tensor:
    if out_dtype not in OUT_DTYPES.get(q.dtype, ()):
        raise ValueError(f"products of {q.dtype} do not come as {out_dtype}")
    return q.new_empty((q.shape[0], n), dtype=out_dtype)


def _elsewhere(first: Tensor, *arguments: object) -> Tensor:
    raise UnsupportedError(f"cuSPARSELt runs on CUDA, not on {first.device.type}")


_compress_op = define("compress(Tensor slid) -> Tensor", oracle=_elsewhere, cuda=_compress_cuda, fake=_compress_fake)
_sparse_mm_op = define(
    "sparse_mm(Tensor q, Tensor compressed, Tensor? alpha, int n, ScalarType out_dtype, str algorithm) -> Tensor",
    oracle=_elsewhere, cuda=_sparse_mm_cuda, fake=_sparse_mm_fake,
)  # fmt: skip
