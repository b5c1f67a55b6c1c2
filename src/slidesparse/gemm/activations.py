"""What 8-bit products quantise first: activations, or SwiGLU's inputs, gated and quantised in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.fused import gated, silu_call, silu_inputs
from ..ops.launching import Call
from ..ops.library import runs_kernels
from ..ops.quantize import can_pair, moves_nothing, quantize_call
from ..pattern import Pattern
from .problem import Problem


class Gated(NamedTuple):
    """silu(gate) · up, which nobody has computed yet: stands for activations ``[M, K]``.

    ``gate_up [M, 2K]``, gates first, is multiplied by ``channel`` scales (float32, 2K) and token ``scale`` ``[M, 1]`` first, if given,
    as `slidesparse.ops.silu_mul_quantize` does.
    """

    gate_up: Tensor
    scale: Tensor | None = None
    channel: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """M and K."""
        return self.gate_up.shape[0], self.gate_up.shape[1] // 2

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return self.gate_up.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.gate_up.device

    def computed(self) -> Tensor:
        """The activations ``[M, K]``."""
        return gated(self.gate_up, self.scale, self.channel)


Activations = Tensor | Gated


def kind_of(x: Activations) -> tuple:
    """What decides how inputs are run: device, type, shape, strides, and of `Gated` which scales there are."""
    if type(x) is Gated:
        return (*kind_of(x.gate_up), x.scale is None, x.channel is None)
    return x.get_device(), x.dtype, x.shape, x.stride()


def quantized(
    problem: Problem, x: Activations, pattern: Pattern | None = None, *, width: int | None = None, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """Quantise rows, and lift them if there is a pattern: ``[M', width]`` and scales ``[M, 1]``, as `ops.quantize_lift`."""
    if isinstance(x, Gated):
        channel = None if x.channel is None else x.channel.view(-1)
        return ops.silu_mul_quantize(x.gate_up, problem.scheme, pattern=pattern, scale=x.scale, channel=channel, width=width, rows=rows)
    if pattern is None:
        return ops.quantize(x, problem.scheme, width=width, rows=rows)
    return ops.quantize_lift(x, pattern, problem.scheme, width=width, rows=rows)


def call_for(problem: Problem, x: Activations, pattern: Pattern | None, width: int) -> Call | None:
    """The launch that `quantized` makes for inputs like x, to be called with `inputs_of` x, q and its scale; None if it makes another."""
    dtype, rows = problem.scheme.dtype, x.gate_up if isinstance(x, Gated) else x
    if rows.stride(1) != 1 or not runs_kernels(rows.device, dtype):
        return None
    pattern = None if pattern is None or moves_nothing(pattern, 0) else pattern
    if rows is x:
        return quantize_call(x, pattern, dtype, 0, width)
    if pattern is not None and not can_pair(pattern, 0, width):
        return None
    return silu_call(rows, dtype, "" if pattern is None else pattern.text, (x.scale, x.channel, None), width)


def inputs_of(x: Activations, other: Tensor) -> tuple[Tensor, ...]:
    """The tensors that the launch of `call_for` reads; ``other`` stands for absent ones."""
    return silu_inputs(x.gate_up, (x.scale, x.channel, None), other) if type(x) is Gated else (x,)
