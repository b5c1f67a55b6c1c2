"""What 8-bit products quantise first: activations, or what SwiGLU or a norm would make them of, in the pass that quantises."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.fused import added_norm, norm_call, norm_inputs, silu_call, silu_inputs, silu_mul
from ..ops.launching import Call
from ..ops.library import runs_kernels
from ..ops.quantize import can_pair, moves_nothing, quantize_call
from ..pattern import Pattern
from .problem import Problem

# Of what stands for activations: those of the matrix that is read, which comes first.
_DTYPE = property(lambda self: self[0].dtype, doc="Type of the activations.")
_DEVICE = property(lambda self: self[0].device, doc="Where they are.")


class Gated(NamedTuple):
    """silu(gate) · up, which nobody has computed yet: stands for activations ``[M, K]``.

    ``gate_up [M, 2K]``, gates first, is multiplied by ``channel`` scales (float32, 2K) and token ``scale`` ``[M, 1]`` first, if given,
    as `slidesparse.ops.silu_mul_quantize` does.
    """

    gate_up: Tensor
    scale: Tensor | None = None
    channel: Tensor | None = None

    dtype, device = _DTYPE, _DEVICE

    @property
    def shape(self) -> tuple[int, int]:
        """M and K."""
        return self.gate_up.shape[0], self.gate_up.shape[1] // 2

    def computed(self) -> Tensor:
        """The activations ``[M, K]``."""
        return silu_mul(self.gate_up, self.scale, self.channel)


class Normed(NamedTuple):
    """RMSNorm of x plus the residual, which nobody has computed yet: stands for activations ``[M, K]``.

    ``x [M, K]`` is multiplied by ``channel`` scales (float32, K) and token ``scale`` ``[M, 1]`` first, if given, as
    `slidesparse.ops.rms_norm_quantize` does. The sum is written to ``total [M, K]``, contiguous.
    """

    x: Tensor
    residual: Tensor
    weight: Tensor
    eps: float
    total: Tensor
    scale: Tensor | None = None
    channel: Tensor | None = None

    dtype, device = _DTYPE, _DEVICE

    @property
    def shape(self) -> tuple[int, int]:
        """M and K."""
        return self.x.shape

    def computed(self) -> Tensor:
        """The activations ``[M, K]``; the sum is written."""
        total, normed = added_norm(self.x, self.weight, self.residual, self.eps, self.scale, self.channel)
        self.total.copy_(total)
        return normed


Activations = Tensor | Gated | Normed


def kind_of(x: Activations) -> tuple:
    """What decides how inputs are run: device, type, shape, strides, and what there is to do before quantisation."""
    if isinstance(x, Tensor):
        return x.get_device(), x.dtype, x.shape, x.stride()
    kind = [x[0].get_device(), type(x)]
    for one in x:
        kind += (one.dtype, one.shape, one.stride()) if isinstance(one, Tensor) else (one,)
    return tuple(kind)


def quantized(
    problem: Problem, x: Activations, pattern: Pattern | None = None, *, width: int | None = None, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """Quantise rows, and lift them if there is a pattern: ``[M', width]`` and scales ``[M, 1]``, as `ops.quantize_lift`."""
    if not isinstance(x, Tensor):
        channel = None if x.channel is None else x.channel.view(-1)
        asked = {"pattern": pattern, "scale": x.scale, "channel": channel, "width": width, "rows": rows}
        if isinstance(x, Gated):
            return ops.silu_mul_quantize(x.gate_up, problem.scheme, **asked)
        q, scale, total = ops.rms_norm_quantize(x.x, x.weight, x.eps, problem.scheme, residual=x.residual, **asked)
        x.total.copy_(total)
        return q, scale
    if pattern is None:
        return ops.quantize(x, problem.scheme, width=width, rows=rows)
    return ops.quantize_lift(x, pattern, problem.scheme, width=width, rows=rows)


def call_for(problem: Problem, x: Activations, pattern: Pattern | None, width: int) -> Call | None:
    """The launch that `quantized` makes for inputs like x, to be called with `inputs_of` x, q and its scale; None if it makes another."""
    dtype = problem.scheme.dtype
    rows = x if isinstance(x, Tensor) else x[0]
    if rows.stride(1) != 1 or not runs_kernels(rows.device, dtype):
        return None
    pattern = None if pattern is None or moves_nothing(pattern, 0) else pattern
    if rows is x:
        return quantize_call(x, pattern, dtype, 0, width)
    if pattern is not None and not can_pair(pattern, 0, width):
        return None
    text, added = "" if pattern is None else pattern.text, (x.scale, x.channel, None)
    if not _scales_fit(x):
        return None
    if isinstance(x, Gated):
        return silu_call(rows, dtype, text, added, width)
    same = x.residual.shape == rows.shape and x.residual.dtype == rows.dtype and x.residual.stride(1) == 1
    plain = same and x.weight.dtype == rows.dtype and x.weight.shape == rows.shape[1:] and x.weight.is_contiguous()
    return norm_call(rows, x.residual, x.eps, dtype, text, added, width) if plain else None


def _scales_fit(x: Gated | Normed) -> bool:
    """Whether the kernels can read the scales as they lie; `quantized` says what is wrong with others."""
    m, n = x[0].shape
    for scale, count in ((x.scale, m), (x.channel, n)):
        if scale is not None and not (scale.dtype == torch.float32 and scale.numel() == count and scale.is_contiguous()):
            return False
    return (x.channel is None or x.scale is not None) and (isinstance(x, Normed) or n % 2 == 0)


def inputs_of(x: Activations, other: Tensor) -> tuple[Tensor, ...]:
    """What the launch of `call_for` is to be called with in front of q and its scale; ``other`` stands for absent tensors."""
    if isinstance(x, Tensor):
        return (x,)
    added = (x.scale, x.channel, None)
    if isinstance(x, Gated):
        return silu_inputs(x.gate_up, added, other)
    return *norm_inputs(x.x, x.weight, x.residual, added, other), x.total
