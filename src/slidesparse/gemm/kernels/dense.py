"""The kernels that multiply by dense weights, kept or restored in every call: GEMM, scales, bias, one rounding to the output's type."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...compat.torch import HAS_INT_MM, int_mm, scaled_mm
from ...compat.versions import installed, lacks
from ...ops.library import fuses, one
from ...ops.prologue import Activations, quantiser
from ...ops.w8a8 import bound_w8a8
from ...quantization import scaled_nvfp4
from ...reference import scaled
from ..layouts import LAYOUTS
from ..precision import matmul
from ..problem import Problem
from .base import Kernel, Pipeline, epilogue, int32_overflow

FEW_TOKENS = 64
"""Up to so many tokens tensor-wise fp8 with a second pass beat row-wise on an H200, not above: the order for untuned layers."""

Scale = Tensor | None
"""Scales and biases, which not every linear has."""

Whole = Callable[..., Tensor]
"""See `DenseKernel`. Those that refuse all but 8-bit schemes need not say that there are scales."""


@dataclass(frozen=True)
class DenseKernel(Kernel):
    """One way to multiply by dense weights.

    Either ``whole(problem, q, x_scale, weight, scale, bias)`` gives outputs, or ``sums(problem, q, weight)`` gives products that an
    epilogue scales. ``q [M', K]`` are activations quantised with ``x_scale [M, 1]``, M' is M rounded up to a multiple of ``rows``; the
    activations themselves, and None, where the scheme does not quantise them. ``bound(problem, m, x)`` gives ``whole`` with little host
    time.
    """

    name: str
    refusal: Callable[[Problem], str | None]
    whole: Whole | None = None
    sums: Callable[[Problem, Tensor, Tensor], Tensor] | None = None
    bound: Callable[..., Callable[..., Tensor]] | None = None
    rounds: int = 1
    rows: int = 1
    worth_timing: bool = True
    code: tuple[str, ...] = ()
    version: int = 1
    layouts = ("dense", "packed")

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        """As `Kernel`, and what the kernel's library cannot run."""
        return super().refuses(problem, variant) or self.refusal(problem)

    def roundings(self, variant: str) -> int:
        """One, or two where the product is rounded before it is scaled."""
        return self.rounds

    def bind(self, problem: Problem, layout: str, variant: str, x: Activations, *, direct: bool) -> Pipeline:
        """See `Kernel`."""
        m, k = x.shape
        quantise = quantiser(x, problem.scheme, None, k, self.rows, direct) if problem.scheme.dynamic else None
        kept = layout == "dense"
        if direct and kept and self.bound is not None:
            return Pipeline(layout, quantise, self.bound(problem, m, x))
        whole, sums = self.whole, self.sums
        if whole is not None:
            return Pipeline(layout, quantise, _multiply(problem, kept, partial(whole, problem)))
        if sums is None:
            raise TypeError(f"kernel {self.name} gives neither outputs nor sums")
        multiply = _multiply(problem, kept, lambda q, s, w, scale, bias: sums(problem, q, w))  # the pass leaves padded rows out
        if not problem.cuda:
            return Pipeline(layout, quantise, multiply, partial(_finished, problem.dtype))
        # What rounds once gives sums as they are: int32 or float32.
        between = torch.int32 if problem.scheme.name == "int8" else torch.float32 if self.rounds == 1 else _between(problem)
        return Pipeline(layout, quantise, multiply, epilogue(problem, m, between, problem.n, x.device, scaled=False, direct=direct))


def _multiply(problem: Problem, kept: bool, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product on the copy's dense weights, which are restored first unless they are ``kept``; of nvfp4 there is only one."""
    if problem.scheme.pair:
        held = LAYOUTS["dense" if kept else "packed"].dense
        return lambda q, x_scale, copy, scale, bias: _of_pairs(q, held(problem, copy), *copy[-2:])
    if kept:
        return lambda q, x_scale, copy, scale, bias: product(q, x_scale, copy[0], scale, bias)
    restore = LAYOUTS["packed"].dense
    return lambda q, x_scale, copy, scale, bias: product(q, x_scale, restore(problem, copy), scale, bias)


def _finished(dtype: torch.dtype, sums: Tensor, x_scale: Scale, scale: Scale, bias: Scale) -> Tensor:
    return scaled(sums, x_scale, None if scale is None else scale.view(1, -1), bias, dtype)


def _native(problem: Problem, q: Tensor, x_scale: Scale, weight: Tensor, scale: Scale, bias: Scale) -> Tensor:
    # The library adds the bias to its fp32 sums. There is no scale for it to come before.
    return F.linear(q, weight, bias)


def _not_native(problem: Problem) -> str | None:
    return None if problem.native else "weights, activations and bias are not of one 16-bit type"


def _rowwise(problem: Problem, q: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Scale) -> Tensor:
    return scaled_mm(q, weight.t(), x_scale, scale.view(1, -1), bias, out_dtype=problem.dtype, use_fast_accum=True)


def _not_rowwise(problem: Problem) -> str | None:
    if problem.dtype != torch.bfloat16 or problem.bias not in (None, torch.bfloat16):
        return "row-wise scales need a bfloat16 output and bias"
    return _not_scaled_mm(problem)


def _between(problem: Problem) -> torch.dtype:
    """Type of fp8 sums: fp16 could overflow before the scales are applied."""
    return torch.bfloat16 if problem.dtype == torch.bfloat16 else torch.float32


def _tensorwise(problem: Problem, q: Tensor, weight: Tensor) -> Tensor:
    unit = one(q.device)
    return scaled_mm(q, weight.t(), unit, unit, out_dtype=_between(problem), use_fast_accum=True)


def _not_scaled_mm(problem: Problem) -> str | None:
    if problem.scheme.name != "fp8" or not problem.cuda:
        return "multiplies fp8 on CUDA"
    if problem.capability < (8, 9):
        return "fp8 needs compute capability 8.9"
    if problem.n % 16 or problem.k % 16:
        return f"N = {problem.n} and K = {problem.k} must be multiples of 16"
    return None


def _triton(problem: Problem, q: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Scale) -> Tensor:
    return ops.w8a8(q, weight, x_scale, scale, bias, problem.dtype)


def _bound_triton(problem: Problem, m: int, x: Activations) -> Callable[..., Tensor]:
    return bound_w8a8(m, problem.n, problem.k, x.device, problem.dtype, problem.bias)


def _not_triton(problem: Problem) -> str | None:
    if problem.scheme.name != "int8" or not problem.cuda:
        return "multiplies int8 on CUDA"
    fused = f"Triton {installed('triton')} rounds products and sums in one on compute capability 10.0 and newer: update to 3.7"
    return ops.triton_fault() or (fused if fuses(problem.capability) else int32_overflow(problem))


def _cublaslt(problem: Problem, q: Tensor, weight: Tensor) -> Tensor:
    return int_mm(q, weight.t())


def _not_cublaslt(problem: Problem) -> str | None:
    if problem.scheme.name != "int8" or not problem.cuda:
        return "multiplies int8 on CUDA"
    if not HAS_INT_MM:
        return lacks("torch", "_int_mm")
    if problem.n % 8 or problem.k % 8:
        return f"N = {problem.n} and K = {problem.k} must be multiples of 8"
    return int32_overflow(problem)


def _exact(problem: Problem, q: Tensor, weight: Tensor) -> Tensor:
    """On any device: integer sums exact, others in float32."""
    return products(q, weight) if q.dtype.itemsize == 1 else matmul(q.to(weight.dtype), weight.t())


def _of_pairs(q: Tensor, weight: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Float32 products with nvfp4 weights whose global scale is still to be applied."""
    if q.is_cuda and q.dtype == weight.dtype:
        return torch.mm(q, weight.t(), out_dtype=torch.float32) / global_scale  # what follows rounds to these 16 bits
    # What is not rounded to 16 bits must not be rounded once more than the product of the scaled weights.
    return matmul(q.to(torch.float32), scaled_nvfp4(weight, scale, global_scale).t())


_CHUNK = 1024  # 1024 products of at most 128 · 128 sum to at most 2^24, which float32 still holds exactly


def products(q: Tensor, dense: Tensor) -> Tensor:
    """Sums of 8-bit products, ``[M, K]`` · ``[N, K]``ᵀ: int32 and exact of int8, float32 of the others."""
    return int_matmul(q, dense) if q.dtype == torch.int8 else q.to(torch.float32) @ dense.to(torch.float32).t()


def int_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Exact int8 product ``[M, K]`` · ``[N, K]``ᵀ → int32 ``[M, N]``; K at most `slidesparse.ops.w8a8.WIDEST_K`.

    By `int_mm` wherever it is there, takes the shape, is exact and pays; it is wrong for K = 1 (torch 2.13). Elsewhere by float32. Of
    4096 × 4096 on 2 cores, with int8 dot products: 0.3 against 1.3 ms at M = 1, 27 against 59 ms at M = 512; with AVX2 alone: 9 against
    12 ms at M = 1, 3721 against 299 ms at M = 512.
    """
    if q.device.type == "cuda":
        usable = _int_mm_takes(q, weight)
    else:
        usable = q.shape[1] > 1 and _int_mm_is_exact(q.device.type) and _int_mm_pays(q.device.type)
    return int_mm(q, weight.t()) if usable else _in_floats(q, weight)


def _in_floats(q: Tensor, weight: Tensor) -> Tensor:
    """The same product by float32 in chunks of K that are short enough to be exact."""
    total = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        total += (q[:, columns].to(torch.float32) @ weight[:, columns].to(torch.float32).t()).to(torch.int32)
    return total


def _int_mm_takes(q: Tensor, weight: Tensor) -> bool:
    """cuBLASLt's limits: more than 16 rows, K and N multiples of 8."""
    return HAS_INT_MM and q.shape[0] > 16 and q.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0


@cache
def _int_mm_is_exact(device: str) -> bool:
    """Whether int8 products are summed exactly here: CPUs without int8 dot products may saturate pairs of them at 16 bits."""
    for left, right in ((127, 127), (127, -128)):
        q = torch.full((17, 256), left, dtype=torch.int8, device=device)
        weight = torch.full((32, 256), right, dtype=torch.int8, device=device)
        try:
            product = int_mm(q, weight.t())
        except (RuntimeError, NotImplementedError):
            return False
        if not bool((product == 256 * left * right).all()):
            return False
    return True


@cache
def _int_mm_pays(device: str) -> bool:
    """Whether int8 products are at least as fast here as float32's: CPUs without int8 dot products may do them one by one.

    Both give the same bits, so that the clock may decide, once, by 32 tokens and weights of 512 × 512.
    """
    q, weight = (torch.ones(rows, 512, dtype=torch.int8, device=device) for rows in (32, 512))
    took: dict[object, float] = {}
    for way in (int_mm, _in_floats) * 3:
        start = time.perf_counter()
        way(q, weight.t() if way is int_mm else weight)
        took[way] = min(took.get(way, math.inf), time.perf_counter() - start)
    return took[int_mm] <= took[_in_floats]


ROWS = ("ops.prologue", "ops.quantize", "ops.kernels_quantize", "ops.row_config")
EPILOGUE = ("ops.rescale", "ops.kernels_rescale")
HERE = ("gemm.kernels.base", "gemm.kernels.dense", "gemm.layouts", "ops.expand", "ops.kernels_expand")
"""Weights of the packed layout are restored in every call."""

DENSE_KERNELS = (
    DenseKernel("native", _not_native, _native, code=HERE),
    DenseKernel("rowwise", _not_rowwise, _rowwise, code=(*HERE, *ROWS)),
    DenseKernel("tensorwise", _not_scaled_mm, sums=_tensorwise, rounds=2, code=(*HERE, *ROWS, *EPILOGUE)),
    DenseKernel(
        "triton", _not_triton, _triton, bound=_bound_triton, code=(*HERE, *ROWS, "ops.w8a8", "ops.kernels_w8a8"),
    ),
    # The library wants more than 16 rows.
    DenseKernel("cublaslt", _not_cublaslt, sums=_cublaslt, rows=32, code=(*HERE, *ROWS, *EPILOGUE)),
    DenseKernel(
        "exact", int32_overflow, sums=_exact, worth_timing=False, code=(*HERE, *ROWS, *EPILOGUE, "gemm.precision"),
    ),
)  # fmt: skip
