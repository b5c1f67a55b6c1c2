"""What a kernel is: a way to multiply by weights of some layouts, and the steps of one of its calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...ops.launch import Producer
from ...ops.library import fuses
from ...ops.prologue import Activations
from ...ops.rescale import rescale_call
from ...ops.w8a8 import WIDEST_K
from ..layouts import Copy
from ..problem import Problem


class Pipeline(NamedTuple):
    """The steps of one call of a kernel, decided by shapes and types.

    ``quantise`` gives q and the token scales of the activations, None where these are multiplied as they are; ``multiply`` takes q, token
    scales, the layer's copy, weight scales and bias; ``epilogue``, if there is one, takes the product, token scales, weight scales (None if
    ``scaled``: the product holds them) and bias.
    """

    layout: str
    quantise: Callable[[Activations], tuple[Tensor, Tensor | None]] | None
    multiply: Callable[[Tensor, Tensor | None, Copy, Tensor | None, Tensor | None], Tensor]
    epilogue: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor] | None = None
    scaled: bool = False


class Kernel:
    """A way to run a whole linear on weights in one of ``layouts``, in one or several variants; most have one, whose name is empty.

    ``version`` is raised by the author when timings lose their meaning though the code is the same, and ``code`` names the modules that
    the kernel consists of. A kernel that is not ``worth_timing`` runs only where no other does, or where it is asked for.
    """

    name: str
    layouts: tuple[str, ...]
    worth_timing = True
    version = 1
    code: tuple[str, ...] = ()

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        """Why a problem, or a variant of it, cannot run; None if it can."""
        return f"kernel {self.name} has no variant {variant!r}" if variant else None

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        """The ways to run ``m`` tokens where nothing was measured, the likely fastest first."""
        return ("",)

    def search(self, problem: Problem, x: Tensor, copy: Copy) -> tuple[str, ...]:
        """The variants worth timing for activations ``x [M, K]`` and a copy of the weights at hand."""
        return self.variants(problem, x.shape[0])

    def roundings(self, variant: str) -> int:
        """How often a whole linear rounds to 16 bits, which the tolerance policy wants to know."""
        return 1

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, direct: bool) -> Pipeline:
        """The steps for inputs like ``x``; with ``direct`` they may launch kernels past the dispatcher, on the current device."""
        raise NotImplementedError


def int32_overflow(problem: Problem) -> str | None:
    """Why int32 cannot be trusted with this problem's sums, None if it can."""
    if problem.scheme.name == "int8" and problem.k > WIDEST_K:
        return f"K = {problem.k} int8 products may overflow an int32 sum, which holds {WIDEST_K}"
    return None


def epilogue(
    problem: Problem, m: int, sums: torch.dtype, stride: int, device: torch.device, *, scaled: bool, direct: bool
) -> Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]:
    """The pass on CUDA that turns products of type ``sums`` and this row stride into outputs: scales and bias in float32, one rounding.

    Products that are ``scaled`` hold the weight scales, so the pass is called without them. ``direct`` is for schemes that quantise
    activations; without Triton the op's own road runs all the same.
    """
    if not direct or fuses(ops.capability(device)) or not ops.has_triton():
        return partial(ops.rescale, out_dtype=problem.dtype, m=m, n=problem.n)
    types = (sums, problem.dtype, torch.float32, None if scaled else torch.float32, problem.bias)
    out = (m, problem.n), (problem.n, 1), problem.dtype
    return Producer(rescale_call(types, m, problem.n, stride), device, (out,), at=1)
