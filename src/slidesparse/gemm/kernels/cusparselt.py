"""Slid weights on 2:4 sparse tensor cores, through cuSPARSELt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ... import ops
from ...ops import cusparselt
from ...ops.cusparselt_plans import bound_product
from ...ops.prologue import Activations, quantiser
from ...ops.quantize import moves_nothing, padded_rows
from ..layouts import SLID, Copy
from ..problem import Problem
from .base import Kernel, Pipeline, epilogue, int32_overflow

_DEFAULT, _EXACT = "default", "exact"


class CuSparseLt(Kernel):
    """Lifts the activations while quantising them and multiplies by compressed slid weights.

    A variant is the library's algorithm in text form, ``default`` for its own choice. The library applies the weight scales where it can
    and rounds to bfloat16, then one pass applies the other scales and the bias (two roundings). With ``exact`` in front of the algorithm
    the library returns int32 or float32 sums, and everything else happens in that pass (one rounding).
    """

    name = "cusparselt"
    layouts = ("slid",)
    code = (
        "gemm.kernels.base", "gemm.kernels.cusparselt", "gemm.layouts", "ops.cusparselt", "ops.cusparselt_plans", "ops.prologue",
        "ops.quantize", "ops.kernels_quantize", "ops.row_config", "ops.rescale", "ops.kernels_rescale",
    )  # fmt: skip

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        """Needs the library, 2:4 hardware patterns of single weights, and types that it multiplies."""
        if not problem.cuda:
            return "runs on CUDA"
        if problem.scheme.pair:
            return "sparse FP4 has one scale for 32 slid weights, which nvfp4 scales by sixteens in another order (docs/theory.md)"
        pattern = problem.pattern
        if (pattern.n, pattern.l, pattern.unit) != (2, 4, 1):
            return f"pattern {pattern} is not one of 2:4 hardware and single weights"
        if not problem.scheme.dynamic and not problem.native:
            return "weights, activations and bias are not of one 16-bit type"
        if variant:
            exact, algorithm = _read(variant)
            if not exact and self.variants(problem, 0) == (_EXACT,):
                return f"{problem.dtype} outputs are not rounded to bfloat16 on the way: ask for slid:cusparselt:{_EXACT}"
            try:
                cusparselt.Algorithm.parse(algorithm)
            except ValueError as error:
                return str(error)
        return cusparselt.unavailable("cuda", problem.scheme.dtype) or int32_overflow(problem)

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        """The library's own choice of algorithm, rounded once where bfloat16 on the way would lose too much."""
        if not problem.scheme.dynamic:
            return (_DEFAULT,)
        return (_DEFAULT, _EXACT) if problem.dtype == torch.bfloat16 else (_EXACT,)

    def search(self, problem: Problem, x: Tensor, copy: Copy) -> tuple[str, ...]:
        """The algorithms that the library's search and `ops.cusparselt_search` found for this number of tokens."""
        q, _ = self._quantise(problem, x, direct=False)(x)
        q.view(torch.int8)[x.shape[0] :].zero_()  # results are compared, and what pads the rows may not be a number
        n = SLID.padded(problem)[0]
        alpha = copy[1] if len(copy) > 1 else None
        return tuple(str(found) or _DEFAULT for found in cusparselt.search(q, copy[0], alpha, n, _sums(problem, False)))

    def roundings(self, variant: str) -> int:
        """One for exact variants. Otherwise two: the library rounds to 16 bits before the token scale, or the bias, is applied."""
        return 1 if _read(variant)[0] else 2

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, direct: bool) -> Pipeline:
        """See `Kernel`; direct calls make the library's plan, which cannot happen while a CUDA graph is captured."""
        m, (n, width) = x.shape[0], SLID.padded(problem)
        (exact, algorithm), dynamic, rows = _read(variant), problem.scheme.dynamic, padded_rows(m, cusparselt.token_step(m))
        between, scaled = _sums(problem, exact), not exact and cusparselt.scales_rows(problem.scheme.dtype, torch.bfloat16)
        if direct and dynamic:
            plan = cusparselt.plan_for((x.device.index or 0, n, width, rows, problem.scheme.dtype, between, scaled, algorithm))
            multiply = bound_product(plan, x.device, rows, n, between, scaled)
        else:
            multiply = partial(_product, n=n, dtype=between, scaled=scaled, algorithm=algorithm)
        finish: Callable[..., Tensor] = partial(_cut, None if (rows, n) == (m, problem.n) else (m, problem.n))
        if dynamic:
            finish = epilogue(problem, m, between, n, x.device, scaled=scaled, direct=direct)
        return Pipeline(layout, self._quantise(problem, x, direct), multiply, finish, scaled)

    @staticmethod
    def _quantise(problem: Problem, x: Activations, direct: bool) -> Callable[[Activations], tuple[Tensor, Tensor | None]]:
        width, rows = SLID.padded(problem)[1], cusparselt.token_step(x.shape[0])
        if problem.scheme.dynamic:
            return quantiser(x, problem.scheme, problem.pattern, width, rows, direct)
        return partial(_lifted, problem=problem, width=width, rows=rows)


def _read(variant: str) -> tuple[bool, str]:
    """Whether a variant is exact, and the library's algorithm in it, empty for the library's own choice."""
    first, _, rest = variant.partition(" ")
    if first == _EXACT:
        return True, rest
    return False, "" if variant == _DEFAULT else variant


def _sums(problem: Problem, exact: bool) -> torch.dtype:
    """What the library returns. Never fp16 before the token scale: it could overflow."""
    if not problem.scheme.dynamic:
        return problem.dtype
    return torch.bfloat16 if not exact else torch.int32 if problem.scheme.dtype == torch.int8 else torch.float32


def _product(
    q: Tensor, x_scale: Tensor | None, copy: Copy, scale: Tensor | None, bias: Tensor | None, *,
    n: int, dtype: torch.dtype, scaled: bool, algorithm: str,
) -> Tensor:  # fmt: skip
    return cusparselt.sparse_mm(q, copy[0], copy[1] if scaled else None, n, dtype, algorithm)


def _cut(shape: tuple[int, int] | None, y: Tensor, x_scale: None, scale: None, bias: Tensor | None) -> Tensor:
    """What of the padded product counts, and the bias, if there is one."""
    y = y if shape is None else y[: shape[0], : shape[1]]
    return y if bias is None else y + bias


def _lifted(x: Tensor, *, problem: Problem, width: int, rows: int) -> tuple[Tensor, None]:
    """16-bit activations as the library wants them."""
    if moves_nothing(problem.pattern, 0) and _fits(x, rows, width):
        return x, None
    return ops.lift(x, problem.pattern, width=width, rows=rows), None


def _fits(x: Tensor, rows: int, width: int) -> bool:
    """Whether the library takes x as it lies."""
    return x.shape[1] == width and x.shape[0] % rows == 0 and x.is_contiguous() and x.data_ptr() % 16 == 0
