"""What stands in front of an 8-bit product: activations to quantise, or inputs of SwiGLU or a norm, computed in the pass that quantises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..format import Scheme
from ..pattern import Pattern
from .fused import added_norm, norm_call, rms_norm_quantize, silu_call, silu_mul, silu_mul_quantize
from .launch import Launch, Producer, allocator
from .library import runs_kernels
from .quantize import can_pair, moves_nothing, padded_rows, quantize, quantize_call, quantize_lift


class Gated(NamedTuple):
    """Stands for activations ``[M, K]`` that are not computed yet: silu(gate) · up of ``gate_up [M, 2K]``, gates first."""

    gate_up: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return self.gate_up.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.gate_up.device

    @property
    def shape(self) -> tuple[int, int]:
        """M and K."""
        return self.gate_up.shape[0], self.gate_up.shape[1] // 2

    def computed(self) -> Tensor:
        """The activations ``[M, K]``."""
        return silu_mul(self.gate_up)


class Normed(NamedTuple):
    """Stands for activations ``[M, K]`` that are not computed yet: the RMSNorm of ``x [M, K]`` plus the residual.

    The sum is written to ``total [M, K]``, contiguous.
    """

    x: Tensor
    residual: Tensor
    weight: Tensor
    eps: float
    total: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.x.device

    @property
    def shape(self) -> torch.Size:
        """M and K."""
        return self.x.shape

    def computed(self) -> Tensor:
        """The activations ``[M, K]``; writes x plus the residual to ``total``."""
        total, normed = added_norm(self.x, self.weight, self.residual, self.eps)
        self.total.copy_(total)
        return normed


Activations = Tensor | Gated | Normed


def signature(x: Activations) -> tuple[Any, ...]:
    """Everything of an input that decides its steps: device, type, shape, strides, and what comes before quantisation."""
    if isinstance(x, Tensor):
        return x.get_device(), x.dtype, x.shape, x.stride()
    kind: list[Any] = [x[0].get_device(), type(x)]
    for one in x:
        kind += (one.dtype, one.shape, one.stride()) if isinstance(one, Tensor) else (one,)
    return tuple(kind)


def quantiser(
    x: Activations, scheme: Scheme, pattern: Pattern | None, width: int, rows: int, direct: bool
) -> Callable[[Activations], tuple[Tensor, Tensor]]:
    """A function that quantises activations like x, and lifts them if there is a pattern: ``[M', width]`` and scales ``[M, 1]``.

    ``width`` and ``rows`` are those of `quantize_lift`. With ``direct`` kernels may be launched past the dispatcher, on the current device.
    """
    m, k = x.shape
    call = launch_for(x, scheme.dtype, pattern, width) if direct else None
    if call is not None:
        q = (padded_rows(m, rows), width), (width, 1), scheme.dtype
        scales = (m, 1), (1, 1), torch.float32
        return Producer(call, x.device, (q, scales)) if isinstance(x, Tensor) else _with_prologue(call, x.device, q, scales)
    if x.device.type == "cpu" and isinstance(x, Tensor) and pattern is None and width == k and rows == 1:
        return partial(reference.quantize, scheme=scheme)
    return partial(quantized, scheme=scheme, pattern=pattern, width=width, rows=rows)


def _with_prologue(
    call: Launch, device: torch.device, q: tuple[Any, ...], scales: tuple[Any, ...]
) -> Callable[[Activations], tuple[Tensor, Tensor]]:
    empty = allocator(device)

    def quantise(x: Activations) -> tuple[Tensor, Tensor]:
        values, scale = empty(*q), empty(*scales)
        call(*inputs_of(x), values, scale)
        return values, scale

    return quantise


def quantized(x: Activations, scheme: Scheme, pattern: Pattern | None, width: int | None, rows: int) -> tuple[Tensor, Tensor]:
    """Quantise rows, and lift them if there is a pattern, by the ops: ``[M', width]`` and scales ``[M, 1]``, as `quantize_lift`."""
    if isinstance(x, Gated):
        return silu_mul_quantize(x.gate_up, scheme, pattern=pattern, width=width, rows=rows)
    if isinstance(x, Normed):
        q, scale, total = rms_norm_quantize(x.x, x.weight, x.eps, scheme, pattern=pattern, residual=x.residual, width=width, rows=rows)
        x.total.copy_(total)
        return q, scale
    if pattern is None:
        return quantize(x, scheme, width=width, rows=rows)
    return quantize_lift(x, pattern, scheme, width=width, rows=rows)


def launch_for(x: Activations, dtype: torch.dtype, pattern: Pattern | None, width: int) -> Launch | None:
    """The launch for inputs like x, to be called with `inputs_of` x, q and the scale; None where only `quantized` can run them."""
    rows = x if isinstance(x, Tensor) else x[0]
    if rows.stride(1) != 1 or not runs_kernels(rows.device, dtype):
        return None
    pattern = None if pattern is None or moves_nothing(pattern, 0) else pattern
    if isinstance(x, Tensor):
        return quantize_call(x, pattern, dtype, 0, width)
    if pattern is not None and not can_pair(pattern, 0, width):
        return None
    text = "" if pattern is None else pattern.text
    if isinstance(x, Gated):
        return silu_call(rows, dtype, text, width) if rows.shape[1] % 2 == 0 else None
    same = x.residual.shape == rows.shape and x.residual.dtype == rows.dtype and x.residual.stride(1) == 1
    plain = same and x.weight.dtype == rows.dtype and x.weight.shape == rows.shape[1:] and x.weight.is_contiguous()
    return norm_call(rows, x.residual, x.eps, dtype, text, width) if plain else None


def inputs_of(x: Activations) -> tuple[Tensor, ...]:
    """The arguments of the launch of `launch_for` in front of q and the scale."""
    return (x,) if isinstance(x, Tensor) else (x.gate_up,) if isinstance(x, Gated) else (x.x, x.weight, x.residual, x.total)
