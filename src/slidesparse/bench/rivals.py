"""Kernels of others that benchmarks time beside ours in the same process, where they can be imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..compat import torch as private
from ..compat import torchao
from ..errors import UnsupportedError, first_line
from ..gemm import Problem, Weights, register
from ..gemm.kernels import Kernel, Pipeline, kernels
from ..gemm.layouts import Copy
from ..ops.cusparselt import alignment, token_step
from ..ops.prologue import Activations, quantiser
from .models import slid_bytes
from .rows import PUBLISHED, REFUSED, Row

HUMMING = (
    "humming-kernels, W6A8 and W7A8: 1.10 times vLLM's CUTLASS W8A8 at 1 token on an H100, as its authors report; it has no road for N:M "
    "weights and is not run here"
)


_given_up: list[str] = []
"""Why rivals are timed no more in this process: one whose call cannot be captured would cost every cell its rows."""


def give_up(why: str) -> bool:
    """Time other libraries' sparse kernels no more; whether they were until now."""
    if _given_up or "torch-cslt" not in kernels():
        return False
    _given_up.append(why)
    return True


class SlidCopy:
    """What the layouts of rivals share: weights slid to 2:4, as each rival compresses them."""

    name: str

    def nbytes(self, problem: Problem) -> int:
        """What compressed weights take at least."""
        return slid_bytes(problem.n, problem.k, problem.pattern, problem.scheme.dtype.itemsize)

    def dense(self, problem: Problem, copy: Copy) -> Tensor:
        """Rivals' forms are not read back.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"layout {self.name} has no way back")


class Rival(Kernel):
    """Another library's sparse kernel: given up with all of them, and its scales are its own affair."""

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        """See `Kernel`."""
        if _given_up:
            return f"left out, since a cell failed with it or beside it: {_given_up[0]}"
        return self.lacks(problem)

    def lacks(self, problem: Problem) -> str | None:
        """Why the problem is not for this kernel; None if it is."""
        raise NotImplementedError


class TorchaoLayout(SlidCopy):
    """Values and metadata as torchao's kernel for 9.0 reads them."""

    name = "torchao"

    def prepare(self, problem: Problem, weights: Weights) -> Copy:
        """Slide and compress."""
        return torchao.compressed(ops.slide(weights.packed))


class Torchao(Rival):
    """torchao's fused fp8 2:4 product, scales and bias in it."""

    name = "torchao"
    layouts = ("torchao",)

    def lacks(self, problem: Problem) -> str | None:
        """See `Rival`."""
        if problem.scheme.name != "fp8" or problem.dtype != torch.bfloat16 or not problem.cuda:
            return "torchao multiplies fp8 to bfloat16 on CUDA"
        return None if problem.capability[0] == 9 else "torchao's 2:4 kernel runs on compute capability 9.x"

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, direct: bool) -> Pipeline:
        """See `Kernel`."""

        def multiply(q: Tensor, x_scale: Tensor | None, copy: Copy, scale: Tensor | None, bias: Tensor | None) -> Tensor:
            values, metadata = copy
            if x_scale is None or scale is None or values is None or metadata is None:
                raise UnsupportedError("torchao's product wants scales")
            return _tried(lambda: torchao.product(q, x_scale.view(-1), values, metadata, scale.view(-1), bias, problem.dtype))

        return Pipeline(layout, quantiser(x, problem.scheme, problem.pattern, problem.pattern.slid_k(problem.k), 1, direct), multiply)


class TorchLayout(SlidCopy):
    """What torch's own road to cuSPARSELt compresses."""

    name = "torch-cslt"

    def prepare(self, problem: Problem, weights: Weights) -> Copy:
        """Slide, pad to what the library takes, and compress.

        Raises:
            UnsupportedError: this torch cannot.
        """
        compress = private.cslt_compress
        if compress is None:
            raise UnsupportedError("this torch has no _cslt_compress")
        align = alignment(problem.scheme.dtype)
        slid = ops.slide(weights.packed, width=_width(problem, align), rows=align)
        return (_tried(lambda: compress(slid)),)


class TorchCslt(Rival):
    """torch's ``_cslt_sparse_mm`` with the library's own choice of algorithm: products in bfloat16, then one pass for scales and bias."""

    name = "torch-cslt"
    layouts = ("torch-cslt",)

    def lacks(self, problem: Problem) -> str | None:
        """See `Rival`."""
        if not problem.scheme.dynamic or not problem.cuda:
            return "torch's road to cuSPARSELt is timed with int8 and fp8 on CUDA"
        return None if private.cslt_sparse_mm is not None else "this torch has no _cslt_sparse_mm"

    def roundings(self, variant: str) -> int:
        """To bfloat16 before the scales, and after."""
        return 2

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, direct: bool) -> Pipeline:
        """See `Kernel`."""
        m, product = x.shape[0], private.cslt_sparse_mm
        if product is None:
            raise UnsupportedError("this torch has no _cslt_sparse_mm")

        def multiply(q: Tensor, x_scale: Tensor | None, copy: Copy, scale: Tensor | None, bias: Tensor | None) -> Tensor:
            return _tried(lambda: product(copy[0], q.t(), out_dtype=torch.bfloat16, transpose_result=True))

        def finish(y: Tensor, x_scale: Tensor | None, scale: Tensor | None, bias: Tensor | None) -> Tensor:
            return ops.rescale(y, x_scale, scale, bias, problem.dtype, m=m, n=problem.n)

        width = _width(problem, alignment(problem.scheme.dtype))
        return Pipeline(layout, quantiser(x, problem.scheme, problem.pattern, width, token_step(m), direct), multiply, finish)


def _width(problem: Problem, align: int) -> int:
    return -(-problem.pattern.slid_k(problem.k) // align) * align


def _tried(call: Callable[[], Tensor | tuple[Tensor, Tensor]]) -> Any:
    """What a rival's op gives; its own errors say that it cannot, not that the benchmark is broken."""
    try:
        return call()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnsupportedError(first_line(error)) from error


def offer(row: Row) -> list[Row]:
    """Let every rival that is here take part; rows for those that are not, or that were only told of."""
    absent = []
    if find_spec("vllm") is None:
        absent.append(replace(row, route="dense:cutlass", status=REFUSED, why="vLLM is not installed: its CUTLASS kernels are not timed"))
    else:
        from ..integrations.vllm import register as register_vllm

        register_vllm()
    if find_spec("torchao") is None:
        absent.append(replace(row, route="torchao:torchao", status=REFUSED, why="torchao is not installed: its 2:4 kernel is not timed"))
    else:
        register(Torchao(), TorchaoLayout())
    register(TorchCslt(), TorchLayout())
    return [*absent, replace(row, route="humming", status=PUBLISHED, why=HUMMING, ratio=1.10)]
