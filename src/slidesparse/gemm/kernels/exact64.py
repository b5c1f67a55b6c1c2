"""The oracle as a kernel: slow and exact, on any device."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ... import reference
from ...ops.prologue import Activations
from ...quantization import dequantize_nvfp4
from ..layouts import PACKED, Copy
from ..problem import Problem
from .base import LEAVES, Kernel, Pipeline


class Exact64(Kernel):
    """Restores in every call and sums in float64."""

    name = "exact64"
    layouts = ("packed",)
    worth_timing = False
    code = ("gemm.kernels.base", "gemm.kernels.exact64", "reference")

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, unscaled: bool, direct: bool) -> Pipeline:
        """See `Kernel`."""
        multiply = partial(_unscaled if unscaled else _whole, problem)
        if not problem.scheme.dynamic:
            return Pipeline(layout, None, multiply)
        return Pipeline(layout, lambda x: reference.quantize(x if isinstance(x, Tensor) else x.computed(), problem.scheme), multiply)


def _unscaled(problem: Problem, q: Tensor, x_scale: Tensor, copy: Copy, scale: Tensor, bias: None) -> Tensor:
    weight = reference.restore(PACKED.stored(problem, copy))
    exact = q.to(torch.float64) @ weight.to(torch.float64).t()
    return (exact if "channel" in LEAVES[problem.scheme.name] else exact * scale.view(1, -1)).to(torch.bfloat16)


def _whole(problem: Problem, q: Tensor, x_scale: Tensor | None, copy: Copy, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    weight = reference.restore(PACKED.stored(problem, copy))
    if problem.scheme.pair:
        weight = dequantize_nvfp4(weight, copy[2], copy[3])
    q = q if problem.scheme.dynamic else q.to(torch.float64)
    return reference.linear(q, x_scale, weight, scale, bias, problem.dtype)
