"""RMSNorm or SwiGLU, quantised and if asked lifted in the same pass: what stands between two quantised linears of a Llama-like block.

The arithmetic, roundings included, is that of the eager layers of transformers followed by `quantize_lift`. On CUDA one Triton kernel
runs; it may sum squares in another order and has its own exponential, nothing else differs. Elsewhere, and for patterns that its threads
cannot hold, the composition itself does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..format import Scheme
from ..pattern import Pattern
from .launch import CALLS, Launch, allocate
from .library import define, runs_kernels
from .quantize import (
    can_pair,
    checked,
    checked_width,
    empty,
    fake,
    in_rows,
    moves_nothing,
    parsed,
    quantize_lift_op,
    quantize_op,
    slid_width,
)  # fmt: skip
from .row_config import RowConfig, is_hopper, norm_config, row_constants, silu_config


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, scheme: Scheme, *, pattern: Pattern | None = None, residual: Tensor | None = None,
    width: int | None = None, rows: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """RMSNorm of each row, quantised and lifted: ``x [M, K]`` → q ``[M', width]``, its scale float32 ``[M, 1]``, and with a residual h.

    h = x; with ``residual [M, K]`` (x's type) h = x + residual, rounded, and returned ``[M, K]``. The norm: h · rsqrt(mean(h²) + ``eps``)
    in float32, rounded, times ``weight [K]`` (x's type), rounded. Without ``pattern`` nothing is lifted; ``width`` and ``rows`` as in
    `quantize_lift`.

    Raises:
        ValueError: as `quantize_lift`; a shape or type does not fit.
    """
    m, k = x.shape if x.dim() == 2 else (0, 0)
    request = _request(x, k, scheme, pattern, width, rows)
    _check("weight", weight, (k,), x.dtype)
    if residual is None:
        return _rms_norm_quantize_op(x, weight, eps, *request)
    _check("residual", residual, (m, k), x.dtype)
    return _add_rms_norm_quantize_op(x, weight, residual, eps, *request)


def silu_mul_quantize(
    gate_up: Tensor, scheme: Scheme, *, pattern: Pattern | None = None, width: int | None = None, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """silu(gate) · up, quantised and lifted: ``gate_up [M, 2K]``, gates first → q ``[M', width]``, its scale float32 ``[M, 1]``.

    silu in float32, rounded, times up, rounded. Without ``pattern`` nothing is lifted; ``width`` and ``rows`` as in `quantize_lift`.

    Raises:
        ValueError: as `quantize_lift`; the columns are odd.
    """
    double = gate_up.shape[1] if gate_up.dim() == 2 else 0
    if double % 2:
        raise ValueError(f"gate_up must hold gates and as many ups, got {double} columns")
    return _silu_mul_quantize_op(gate_up, *_request(gate_up, double // 2, scheme, pattern, width, rows))


class Request(NamedTuple):
    """What all ops of this module take behind their own inputs, in the schema's order: the output's type, pattern and shape."""

    dtype: torch.dtype
    pattern: str
    width: int
    rows: int

    def quantised(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """By whatever runs on the device of h."""
        if self.pattern:
            return quantize_lift_op(h, self.pattern, self.dtype, 0, self.width, self.rows)
        return quantize_op(h, self.dtype, self.width, self.rows)

    def fits(self, device: torch.device) -> bool:
        """Whether the kernels' threads can hold the pattern and the card converts to the type."""
        held = not self.pattern or can_pair(parsed(self.pattern), 0, self.width)
        return held and runs_kernels(device, self.dtype)


def _request(x: Tensor, k: int, scheme: Scheme, pattern: Pattern | None, width: int | None, rows: int) -> Request:
    """The checked request; the pattern is empty if nothing moves."""
    dtype = checked(x, scheme)
    text = "" if pattern is None or moves_nothing(pattern, 0) else pattern.text
    return Request(dtype, text, checked_width(x, k if pattern is None else slid_width(k, pattern), width, rows), rows)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def _normed(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    h32 = h.float()
    return weight * (h32 * torch.rsqrt(h32.square().mean(-1, keepdim=True) + eps)).to(h.dtype)


def added_norm(x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x plus the residual, and its norm, ``[M, K]`` each, by plain torch, rounded as `rms_norm_quantize` rounds."""
    total = (x + residual).contiguous()
    return total, _normed(total, weight, eps)


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) · up ``[M, K]`` by plain torch, rounded as `silu_mul_quantize` rounds."""
    gate, up = x.chunk(2, -1)
    return (gate.float() * torch.sigmoid(gate.float())).to(x.dtype) * up


def _norm_oracle(x: Tensor, weight: Tensor, eps: float, *request: Any) -> tuple[Tensor, Tensor]:
    return Request(*request).quantised(_normed(x, weight, eps))


def _add_norm_oracle(x: Tensor, weight: Tensor, residual: Tensor, eps: float, *request: Any) -> tuple[Tensor, Tensor, Tensor]:
    total, normed = added_norm(x, weight, residual, eps)
    return *Request(*request).quantised(normed), total


def _silu_oracle(x: Tensor, *request: Any) -> tuple[Tensor, Tensor]:
    return Request(*request).quantised(silu_mul(x))


def _norm_cuda(x: Tensor, weight: Tensor, eps: float, *request: Any) -> tuple[Tensor, Tensor]:
    if not Request(*request).fits(x.device):
        return _norm_oracle(x, weight, eps, *request)
    return launch_norm(x, weight, None, eps, *request)[:2]


def _add_norm_cuda(x: Tensor, weight: Tensor, residual: Tensor, eps: float, *request: Any) -> tuple[Tensor, Tensor, Tensor]:
    run = launch_norm if Request(*request).fits(x.device) else _add_norm_oracle
    return run(x, weight, residual, eps, *request)


def _silu_cuda(x: Tensor, *request: Any) -> tuple[Tensor, Tensor]:
    run = launch_silu if Request(*request).fits(x.device) else _silu_oracle
    return run(x, *request)


def launch_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype, pattern: str, width: int, rows: int = 1,
    config: RowConfig | None = None, *, compiled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the RMSNorm kernel on the current device and stream; the third result means something only with a residual."""
    x, added, m = in_rows(x), None if residual is None else in_rows(residual), x.shape[0]
    q, scale = empty(x, dtype, width, rows)
    total = q if residual is None else allocate(x, m, x.shape[1], x.dtype)
    if m:
        call = norm_call(x, added, eps, dtype, pattern, width, config, compiled=compiled)
        call(x, weight.contiguous(), x if added is None else added, total, q, scale)
    return q, scale, total


def norm_call(
    x: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype, pattern: str, width: int, config: RowConfig | None = None, *,
    compiled: bool = True,
) -> Launch:  # fmt: skip
    """The RMSNorm launch for rows like those of x, to be called with x, its weight, the residual, the sum, q and its scale.

    Without a residual the kernel reads and writes no sum, whatever stands for both.
    """
    numbers, flags = (x.stride(0), (x if residual is None else residual).stride(0), float(eps)), (("SUMMED", residual is not None),)
    return _call("norm", *x.shape, numbers, flags, (x.dtype, dtype), x.device, config, pattern, width, compiled)


def launch_silu(
    x: Tensor, dtype: torch.dtype, pattern: str, width: int, rows: int = 1, config: RowConfig | None = None, *, compiled: bool = True
) -> tuple[Tensor, Tensor]:
    """Run the SwiGLU kernel on the current device and stream."""
    x = in_rows(x)
    q, scale = empty(x, dtype, width, rows)
    if x.shape[0]:
        silu_call(x, dtype, pattern, width, config, compiled=compiled)(x, q, scale)
    return q, scale


def silu_call(x: Tensor, dtype: torch.dtype, pattern: str, width: int, config: RowConfig | None = None, *, compiled: bool = True) -> Launch:
    """The SwiGLU launch for rows like those of x, to be called with x, q and its scale."""
    m, double = x.shape
    return _call("silu", m, double // 2, (x.stride(0),), (), (x.dtype, dtype), x.device, config, pattern, width, compiled)


@lru_cache(CALLS)
def _call(
    name: str, m: int, k: int, numbers: tuple[Any, ...], flags: tuple[tuple[str, bool], ...], types: tuple[torch.dtype, ...],
    device: torch.device, config: RowConfig | None, pattern: str, width: int, compiled: bool,
) -> Launch:  # fmt: skip
    from . import kernels_fused as kernels

    kernel, choose = (kernels.rms_norm_quantize_kernel, norm_config) if name == "norm" else (kernels.silu_mul_quantize_kernel, silu_config)
    config, group = config or choose(m, k), parsed(pattern).group if pattern else 0
    # Unlike torch's eager layers, a fused multiply-add does not round the product.
    constants = row_constants(config, k, width, group, types[-1], compiled, is_hopper(device)) | {"enable_fp_fusion": False}
    return Launch(kernel, (-(-m // config.rows),), (m, k, width // 4 if group else width, *numbers), dict(flags) | constants)


def _fake(x: Tensor, *request: Any) -> tuple[Tensor, Tensor]:
    request = Request(*request[-len(Request._fields) :])
    return fake(x, request.dtype, request.width, request.rows)


_TAIL = "ScalarType dtype, str pattern, SymInt width, int rows"
_rms_norm_quantize_op = define(
    f"rms_norm_quantize(Tensor x, Tensor weight, float eps, {_TAIL}) -> (Tensor, Tensor)",
    oracle=_norm_oracle, cuda=_norm_cuda, fake=_fake,
)  # fmt: skip
_add_rms_norm_quantize_op = define(
    f"add_rms_norm_quantize(Tensor x, Tensor weight, Tensor residual, float eps, {_TAIL}) -> (Tensor, Tensor, Tensor)",
    oracle=_add_norm_oracle, cuda=_add_norm_cuda, fake=lambda x, *rest: (*_fake(x, *rest), x.new_empty(x.shape)),
)  # fmt: skip
_silu_mul_quantize_op = define(
    f"silu_mul_quantize(Tensor x, {_TAIL}) -> (Tensor, Tensor)", oracle=_silu_oracle, cuda=_silu_cuda, fake=_fake,
)  # fmt: skip
