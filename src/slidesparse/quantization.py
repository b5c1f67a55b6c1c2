"""Weight quantisation: 8-bit per output channel, and nvfp4 in blocks."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .errors import WeightError
from .format import BLOCK, Scheme, scheme_named

_FP4_MAX, _FP8_MAX = 6.0, 448.0
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def check_finite(weight: Tensor, what: str = "weight", *, first_row: int = 0) -> None:
    """Refuse NaN and Inf.

    Raises:
        WeightError: names the first offending row and column and its value.
    """
    if not weight.is_floating_point():
        return
    values = weight.float() if weight.dtype.itemsize == 1 else weight
    if _finite(values):
        return
    row, column = (int(i) for i in (~torch.isfinite(values)).nonzero()[0])
    raise WeightError(f"{what}: value at row {first_row + row}, column {column} is {float(values[row, column])}; weights must be finite")


def _finite(values: Tensor) -> bool:
    # A sum is finite only if every term is, but may overflow: look closer only when it is not.
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def quantize_weight(weight: Tensor, scheme: Scheme | str, *, first_row: int = 0) -> tuple[Tensor, Tensor | None]:
    """Weights ``[N, K]`` → values of the scheme's dtype and, at 8 bits, scales float32 ``[N, 1]`` per output channel.

    ``first_row`` is added to the rows in messages where the weights are a block of more.

    Raises:
        WeightError: a weight is NaN or Inf, or does not fit the 16-bit type asked for.
        ValueError: an unknown scheme, or nvfp4, which needs `quantize_nvfp4`.
    """
    scheme = scheme_named(scheme) if isinstance(scheme, str) else scheme
    if scheme.pair:
        raise ValueError("nvfp4 weights are quantised by quantize_nvfp4, which takes the tensor's global scale")
    if not scheme.dynamic:
        values = weight.to(scheme.dtype)
        if not _finite(values):
            check_finite(weight, first_row=first_row)
            types = " to ".join(str(dtype).removeprefix("torch.") for dtype in (weight.dtype, scheme.dtype))
            check_finite(values, f"weight, cast from {types},", first_row=first_row)
        return values, None
    return quantize_rows(weight, scheme, first_row=first_row)


def quantize_rows(weight: Tensor, scheme: Scheme, *, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """`reference.quantize` for finite rows, bitwise: ``[N, K]`` → q ``[N, K]``, scale float32 ``[N, 1]``.

    Raises:
        WeightError: a weight is NaN or Inf.
        ValueError: the scheme is not of 8 bits.
    """
    weight, bound = weight.float(), scheme.largest
    # Two passes that only read cost less than one that writes magnitudes.
    ends = (weight.amax(-1, keepdim=True), -weight.amin(-1, keepdim=True)) if weight.shape[1] else (weight.new_zeros(len(weight), 1),) * 2
    largest = torch.maximum(*ends)
    # Tensors as divisors: CUDA multiplies by the reciprocal of a plain number, which is not IEEE division.
    scale = largest / torch.full_like(largest, bound)
    scale.masked_fill_(scale == 0, 1.0)
    if not _finite(scale):
        check_finite(weight, first_row=first_row)
    q = (weight / scale).clamp_(-bound, bound)
    return (q.round_() if scheme.dtype == torch.int8 else q).to(scheme.dtype), scale


def nvfp4_global_scale(largest: float) -> float:
    """The tensor's global scale 448·6 / max|w| (a divisor, as compressed-tensors stores it), 1 for an all-zero tensor."""
    scale = torch.tensor(_FP8_MAX * _FP4_MAX, dtype=torch.float32) / torch.tensor(largest, dtype=torch.float32)
    return float(scale) if largest > 0 and torch.isfinite(scale) else 1.0


def quantize_nvfp4(weight: Tensor, global_scale: float, *, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """``[N, K]`` → e2m1 pairs uint8 ``[N, K/2]`` (even weight in the low nibble) and block scales e4m3 ``[N, K/16]``.

    Each block of 16 has scale s = e4m3(max|w| / 6 · global_scale); w ≈ e2m1 · s / global_scale. Ties round to the even code,
    zeros are stored as +0. Source of the format: NVIDIA's NVFP4, in the layout of compressed-tensors.

    Raises:
        WeightError: NaN or Inf, or K is not a multiple of 16.
    """
    n, k = weight.shape
    if k % BLOCK:
        raise WeightError(f"nvfp4 needs K to be a multiple of {BLOCK}, got {k}")
    blocks = weight.to(torch.float32).view(n, k // BLOCK, BLOCK)
    largest = blocks.abs().amax(-1)
    if not _finite(largest):
        check_finite(blocks.flatten(1), first_row=first_row)
    factor = torch.full_like(largest, global_scale)
    scale = (largest / torch.full_like(largest, _FP4_MAX) * factor).clamp(max=_FP8_MAX).to(torch.float8_e4m3fn)
    divisor = (scale.to(torch.float32) / factor).unsqueeze(-1)
    scaled = torch.where(divisor > 0, blocks / divisor, torch.zeros_like(blocks))
    codes = _round_e2m1(scaled.abs())
    codes = codes | ((scaled < 0) & (codes != 0)).to(torch.uint8) << 3
    codes = codes.view(n, k // 2, 2)
    return codes[..., 0] | codes[..., 1] << 4, scale


def dequantize_nvfp4(packed: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Undo `quantize_nvfp4`: uint8 ``[N, K/2]``, e4m3 ``[N, K/16]``, float32 ``[1]`` → float32 ``[N, K]``."""
    return _times_blocks(packed, scale.to(torch.float32) / global_scale.to(torch.float32))


def expand_nvfp4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize_nvfp4` before the division by the global scale: ``[N, K]`` of any type that has 6 significant bits from 2^-10 to 2^12.

    Both 16-bit types have: e2m1 values have 2 significant bits and block scales 4, from 2^-1 and 2^-9 to 6 and 448.
    """
    return _times_blocks(packed, scale.to(dtype))


def scaled_nvfp4(whole: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """What `expand_nvfp4` gave → float32 ``[N, K]``, bitwise `dequantize_nvfp4`: the e2m1 values are found again, since they divide it."""
    own = scale.to(torch.float32).unsqueeze(-1)
    blocks = whole.to(torch.float32).view(*scale.shape, BLOCK) / torch.where(own == 0, torch.ones_like(own), own)
    return blocks.mul_(own / global_scale.to(torch.float32)).flatten(1)


@cache
def _fp4_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The sixteen e2m1 values by code; made once, since no table can come from the host while a CUDA graph is captured."""
    with torch.inference_mode(False):
        return torch.tensor((*_FP4, *(-value for value in _FP4)), dtype=dtype, device=device)


def _times_blocks(packed: Tensor, scale: Tensor) -> Tensor:
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).int()
    blocks = _fp4_table(scale.dtype, packed.device)[codes].view(packed.shape[0], -1, BLOCK)
    return blocks.mul_(scale.unsqueeze(-1)).flatten(1)


def canonical_nvfp4(packed: Tensor) -> Tensor:
    """The same e2m1 pairs with every -0 (which other tools write) as +0: uint8 ``[N, K/2]``."""
    low, high = packed & 15, packed >> 4
    return torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4


def _round_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 code (0…7) of non-negative float32, ties to the even code."""
    code = torch.zeros_like(x, dtype=torch.uint8)
    for step in range(len(_FP4) - 1):
        middle = (_FP4[step] + _FP4[step + 1]) / 2
        # A tie goes up exactly when the lower code is odd.
        code += ((x >= middle) if step % 2 else (x > middle)).to(torch.uint8)
    return code
