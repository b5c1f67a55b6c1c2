"""The scale-and-bias pass as a ``torch.library`` op, for libraries that give sums and cannot apply both scales themselves.

On CUDA a Triton kernel runs, bitwise equal to the plain torch composition. Where Triton is missing or fuses, and elsewhere, that runs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..reference import scaled
from .launch import CALLS, Launch, allocate
from .library import capability, define, fuses, runs_kernels

_SUMS = (torch.int32, torch.bfloat16, torch.float16, torch.float32)
_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


def rescale(
    acc: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype, *,
    m: int | None = None, n: int | None = None,
) -> Tensor:  # fmt: skip
    """y = float32(acc) · w_scale · x_scale + bias: ``acc [M', N']`` → ``[M, N]``, each operation rounded, then once to ``out_dtype``.

    acc is int32, bfloat16, float16 or float32, its rows contiguous, M' ≥ M and N' ≥ N where padded; x_scale float32 ``[M, 1]`` or None,
    w_scale float32 ``[N, 1]`` or None, bias ``[N]`` of any float type or None; M is ``m``, else that of x_scale, else M'; N is ``n``,
    else that of w_scale or bias, else N'. The output has memory of its own: writing in place would move as many bytes.

    Raises:
        ValueError: a dtype, or a shape that does not fit.
    """
    if acc.dim() != 2 or acc.dtype not in _SUMS:
        raise ValueError(f"sums must be a matrix of int32, bfloat16, float16 or float32, got {acc.dtype} {list(acc.shape)}")
    if out_dtype not in _OUTPUTS:
        raise ValueError(f"the output must be bfloat16, float16 or float32, not {out_dtype}")
    if m is None:
        m = acc.shape[0] if x_scale is None else x_scale.numel()
    if n is None:
        columns = w_scale if w_scale is not None else bias
        n = acc.shape[1] if columns is None else columns.numel()
    if m > acc.shape[0] or n > acc.shape[1]:
        raise ValueError(f"sums {list(acc.shape)} do not hold [{m}, {n}]")
    for name, scale, count in (("x_scale", x_scale, m), ("w_scale", w_scale, n)):
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != count):
            raise ValueError(f"{name} must be float32 of {count} elements, got {scale.dtype} {list(scale.shape)}")
    if bias is not None and (not bias.dtype.is_floating_point or bias.numel() != n):
        raise ValueError(f"bias must hold {n} floats, got {bias.dtype} {list(bias.shape)}")
    return _rescale_op(acc, x_scale, w_scale, bias, out_dtype, m, n)


def _rescale_oracle(
    acc: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype, m: int, n: int
) -> Tensor:
    rows, columns = None if x_scale is None else x_scale.view(-1, 1), None if w_scale is None else w_scale.view(1, -1)
    y = scaled(acc[:m, :n], rows, columns, bias, dtype)
    # Nothing of the input may be in the output.
    return (y.clone() if y.data_ptr() == acc.data_ptr() else y).contiguous()


def _rescale_cuda(
    acc: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype, m: int, n: int
) -> Tensor:
    if fuses(capability(acc.device)) or not runs_kernels(acc.device, acc.dtype):
        return _rescale_oracle(acc, x_scale, w_scale, bias, dtype, m, n)
    return launch_rescale(acc, x_scale, w_scale, bias, dtype, m, n)


def launch_rescale(
    acc: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype, m: int, n: int
) -> Tensor:
    """Run the kernel on the current device and stream."""
    acc = acc if acc.stride(1) == 1 else acc.contiguous()
    y = allocate(acc, m, n, dtype)
    if m and n:
        tensors = (acc, y, _flat(x_scale), _flat(w_scale), _flat(bias))
        types = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        rescale_call(types, m, n, acc.stride(0))(*tensors)
    return y


@lru_cache(CALLS)
def rescale_call(types: tuple[torch.dtype | None, ...], m: int, n: int, stride: int) -> Launch:
    """The launch, to be called with sums of this row stride, outputs ``[m, n]``, token scales, weight scales and bias of these types."""
    from .kernels_rescale import rescale_kernel

    block, warps = _tile(n)
    _, _, x, w, bias = types
    constants = {"X": x is not None, "W": w is not None, "BIAS": bias is not None, "BLOCK": block, "num_warps": warps}
    return Launch(rescale_kernel, (-(-n // block) * m,), (n, stride), constants | {"enable_fp_fusion": False})


def _flat(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def _tile(n: int) -> tuple[int, int]:
    """Columns of a program, and warps: 8 elements a thread; more rows or columns a program were hardly ever faster on an H200."""
    block = 1024 if n > 512 else max(64, 1 << (n - 1).bit_length())
    return block, max(1, block // 256)


_rescale_op = define(
    "rescale(Tensor acc, Tensor? x_scale, Tensor? w_scale, Tensor? bias, ScalarType dtype, SymInt m, SymInt n) -> Tensor",
    oracle=_rescale_oracle, cuda=_rescale_cuda, fake=lambda acc, x_scale, w_scale, bias, dtype, m, n: acc.new_empty((m, n), dtype=dtype),
)  # fmt: skip
