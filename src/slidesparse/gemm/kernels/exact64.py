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
from .base import Kernel, Pipeline


class Exact64(Kernel):
    """Restores in every call and sums in float64."""

    name = "exact64"
    layouts = ("packed",)
    worth_timing = False
    code = ("gemm.kernels.base", "gemm.kernels.exact64", "reference")

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, direct: bool) -> Pipeline:
        """See `Kernel`."""
        multiply = partial(_multiply, problem)
        if not problem.scheme.dynamic:
            return Pipeline(layout, None, multiply)
        return Pipeline(layout, lambda x: reference.quantize(x if isinstance(x, Tensor) else x.computed(), problem.scheme), multiply)


def _multiply(problem: Problem, q: Tensor, x_scale: Tensor | None, copy: Copy, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    weight = reference.restore(PACKED.stored(problem, copy))
    if problem.scheme.pair:
        weight = dequantize_nvfp4(weight, copy[2], copy[3])
    q = q if problem.scheme.dynamic else q.to(torch.float64)
    return reference.linear(q, x_scale, weight, scale, bias, problem.dtype)
