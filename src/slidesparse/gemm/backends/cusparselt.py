"""Slid weights on 2:4 sparse tensor cores, through cuSPARSELt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops import cusparselt
from ...ops.cusparselt_plans import Plan
from ...ops.launching import Call
from ...ops.library import allocator
from ...ops.quantize import moves_nothing, padded_rows
from ...ops.rescale import rescale_call
from ..activations import Activations, call_for, inputs_of, quantized
from ..numerics import finish, int32_overflow
from ..problem import Problem, Weights

_EXACT = "exact"


class CuSparseLt:
    """Lifts the activations while quantising them and multiplies by compressed slid weights.

    A variant is the library's algorithm in text form, empty for its own choice. The library applies the weight scales where it can and
    rounds to bfloat16, then one pass applies the other scales and the bias (two roundings); with ``exact`` in front of the algorithm it
    returns int32 or float32 sums and everything else happens in that pass (one rounding).
    """

    name = "cusparselt"
    layout = "slid"

    def refuses(self, problem: Problem, variant: str | None = None) -> str | None:
        """Needs the library, 2:4 hardware patterns of single weights, and types that it multiplies."""
        if problem.device != "cuda":
            return "runs on CUDA"
        if problem.scheme.pair:
            return "sparse FP4 has one scale for 32 slid weights, which nvfp4 scales by sixteens in another order (docs/theory.md)"
        pattern = problem.pattern
        if (pattern.n, pattern.l, pattern.unit) != (2, 4, 1):
            return f"pattern {pattern} is not one of 2:4 hardware and single weights"
        if not problem.scheme.dynamic and not problem.native:
            return "weights, activations and bias are not of one 16-bit type"
        if variant is not None:
            if not variant.startswith(_EXACT) and _EXACT in self.variants(problem, 0)[0]:
                return f"{problem.dtype} outputs are not rounded to bfloat16 on the way: ask for cusparselt:{_EXACT}"
            try:
                cusparselt.Algorithm.parse(variant.removeprefix(_EXACT).strip())
            except ValueError as error:
                return str(error)
        return cusparselt.unavailable("cuda", problem.scheme.dtype) or int32_overflow(problem)

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        """The library's own choice of algorithm, rounded once where bfloat16 on the way would lose too much."""
        if not problem.scheme.dynamic:
            return ("",)
        return ("", _EXACT) if problem.dtype == torch.bfloat16 else (_EXACT,)

    def search(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None) -> tuple[str, ...]:
        """The algorithms that the library's search and ours found for this number of tokens."""
        q, _ = self._activations(problem, x)
        q.view(torch.int8)[x.shape[0] :].zero_()  # results are compared, and what pads the rows may not be a number
        n, sums = _padded(problem)[0], self._sums(problem, False)
        return tuple(str(found) for found in cusparselt.search(q, resident["compressed"], resident.get("alpha"), n, sums))

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]:
        """The compressed slid weights, and the weight scales, both padded to what the library takes."""
        rows, width = _padded(problem)
        slid = ops.slide(weights.packed, width=width, rows=cusparselt.alignment(problem.scheme.dtype))
        resident = {"compressed": cusparselt.compress(slid)}
        if cusparselt.scales_rows(problem.scheme.dtype, torch.bfloat16):
            resident["alpha"] = F.pad(weights.channel_scale.view(-1), (0, rows - problem.n), value=1.0)
        return resident

    def run(
        self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None, variant: str
    ) -> Tensor:
        """``[M, K]`` → ``[M, N]``."""
        q, x_scale = self._activations(problem, x)
        exact = variant.startswith(_EXACT)
        algorithm = variant.removeprefix(_EXACT).strip()
        alpha = None if exact else resident.get("alpha")
        sums = cusparselt.sparse_mm(q, resident["compressed"], alpha, _padded(problem)[0], self._sums(problem, exact), algorithm)
        sums = _cut(sums, x.shape[0], problem.n)
        if not problem.scheme.dynamic:
            return sums if bias is None else sums + bias
        return finish(problem, sums, x_scale, scale if alpha is None else None, bias)

    def roundings(self, variant: str) -> int:
        """Two where the library rounds to bfloat16, or to the 16-bit type before a bias is added."""
        return 1 if variant.startswith(_EXACT) else 2

    def gives_sums(self, variant: str) -> bool:
        """What is rounded to bfloat16 anyway."""
        return not variant.startswith(_EXACT)

    def sums(
        self, problem: Problem, x: Activations, resident: Mapping[str, Tensor], scale: Tensor | None, variant: str
    ) -> tuple[Tensor, Tensor]:
        """``[M, K]`` → ``[M, N]`` and ``[M, 1]``."""
        q, x_scale = self._activations(problem, x)
        alpha = resident.get("alpha") if problem.scales_sums else None
        sums = cusparselt.sparse_mm(q, resident["compressed"], alpha, _padded(problem)[0], torch.bfloat16, variant)
        return _cut(sums, x.shape[0], problem.n), x_scale

    def bind(self, problem: Problem, x: Activations, resident: Mapping[str, Tensor], variant: str, *, sums: bool) -> Bound | None:
        """See `registry.Bound`: of 8-bit schemes, once the library has a plan for the number of tokens."""
        dtype, shape = problem.scheme.dtype, (x.shape[0], problem.n)
        (n, width), rows = _padded(problem), padded_rows(x.shape[0], cusparselt.token_step(x.shape[0]))
        quantize = call_for(problem, x, problem.pattern, width) if problem.scheme.dynamic else None
        if quantize is None:
            return None
        exact = variant.startswith(_EXACT)
        between, scaled = self._sums(problem, exact), not exact and "alpha" in resident and (problem.scales_sums or not sums)
        device = -1 if x.device.index is None else x.device.index
        plan = cusparselt.plans.known((device, n, width, rows, dtype, between, scaled, variant.removeprefix(_EXACT).strip()))
        if plan is None:
            return None
        types = (between, problem.dtype, torch.float32, None if scaled else torch.float32, problem.bias)
        rescale = None if sums else rescale_call(types, *shape, n, None)
        sizes = ((rows, width), dtype), ((shape[0], 1), torch.float32), ((rows, n), between), (shape, problem.dtype)
        q, scales, products, out = ((size, (size[1], 1), kind) for size, kind in sizes)
        cut = None if (rows, n) == shape else shape
        return Bound(allocator(x.device), quantize, plan, rescale, scaled, q, scales, products, cut, out)

    @staticmethod
    def _activations(problem: Problem, x: Activations) -> tuple[Tensor, Tensor | None]:
        width, rows = _padded(problem)[1], cusparselt.token_step(x.shape[0])
        if problem.scheme.dynamic:
            return quantized(problem, x, problem.pattern, width=width, rows=rows)
        if not torch.compiler.is_compiling() and moves_nothing(problem.pattern, 0) and _fits(x, rows, width):
            return x, None
        return ops.lift(x, problem.pattern, width=width, rows=rows), None

    @staticmethod
    def _sums(problem: Problem, exact: bool) -> torch.dtype:
        """What the library returns. Never fp16 before the token scale: it could overflow."""
        if not problem.scheme.dynamic:
            return problem.dtype
        return torch.bfloat16 if not exact else torch.int32 if problem.scheme.dtype == torch.int8 else torch.float32


class Bound(NamedTuple):
    """`CuSparseLt.run` and `CuSparseLt.sums` for inputs of one shape: checked and decided once, so that little host time is left.

    ``q``, ``scales``, ``products`` and ``out`` are size, strides and type of what is allocated; ``cut`` is what of the products counts,
    None if all does.
    """

    empty: Callable[..., Tensor]
    quantize: Call
    plan: Plan
    rescale: Call | None
    scaled: bool
    q: tuple
    scales: tuple
    products: tuple
    cut: tuple[int, int] | None
    out: tuple

    def sums(self, x: Activations, resident: Mapping[str, Tensor], scale: Tensor | None, *, padded: bool = False) -> tuple[Tensor, Tensor]:
        """``[M, K]`` → ``[M, N]``, with what pads them on request, and ``[M, 1]``."""
        empty = self.empty
        q, x_scale, y = empty(*self.q), empty(*self.scales), empty(*self.products)
        self.quantize(*inputs_of(x, x_scale), q, x_scale)
        self.plan.run(q, resident["compressed"], resident["alpha"] if self.scaled else None, y)
        return y if padded or self.cut is None else y[: self.cut[0], : self.cut[1]], x_scale

    def run(self, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """``[M, K]`` → ``[M, N]``."""
        sums, x_scale = self.sums(x, resident, scale, padded=True)
        y = self.empty(*self.out)
        self.rescale(sums, y, x_scale, None if self.scaled else scale, bias)
        return y


def _cut(y: Tensor, m: int, n: int) -> Tensor:
    """What of the padded product counts; a view costs host time, so none is made in vain."""
    return y if tuple(y.shape) == (m, n) else y[:m, :n]


def _fits(x: Tensor, rows: int, width: int) -> bool:
    """Whether the library takes x as it lies."""
    return x.shape[1] == width and x.shape[0] % rows == 0 and x.is_contiguous() and x.data_ptr() % 16 == 0


def _padded(problem: Problem) -> tuple[int, int]:
    """N and K' of the resident weights: rounded up to what the library takes."""
    align = cusparselt.alignment(problem.scheme.dtype)
    slid = problem.pattern.slid_k(problem.k)
    return -(-problem.n // align) * align, -(-slid // align) * align
