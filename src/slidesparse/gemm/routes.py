"""The ways to multiply by dense weights: GEMM, scales, bias, one rounding to the output's type, of activations quantised before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .activations import Activations, quantized
from .numerics import finish, int32_overflow, products
from .problem import Problem

FEW_TOKENS = 64
"""Up to here row-wise fp8 lost to tensor-wise with a second pass on an H200, beyond it won: the order in which untuned layers ask."""

Maybe = Tensor | None
"""Scales and biases, which not every linear has."""


@dataclass(frozen=True)
class Route:
    """One way: ``refuses(problem)`` says why it cannot run; ``run(problem, q, x_scale, weight, scale, bias)`` gives ``[M, N]``.

    ``q [M, K]`` are activations quantised with ``x_scale [M, 1]``, M of q rounded up to a multiple of ``rows``; the activations
    themselves, and None, where the scheme does not quantise them. ``sums(problem, q, weight, scale)`` is the product without token scales
    and bias, bfloat16 ``[M, N]``, and without weight scales unless `Problem.scales_sums`; None if there is none. ``roundings`` is how often
    ``run`` rounds to 16 bits.
    """

    refuses: Callable[[Problem], str | None]
    run: Callable[[Problem, Tensor, Maybe, Tensor, Maybe, Maybe], Tensor]
    sums: Callable[[Problem, Tensor, Tensor, Maybe], Tensor] | None = None
    roundings: int = 1
    rows: int = 1


def routes(problem: Problem, m: int) -> tuple[str, ...]:
    """Names of the routes that can run the problem with ``m`` tokens, the likely fastest first."""
    names = [name for name, route in _ROUTES.items() if route.refuses(problem) is None]
    if m <= FEW_TOKENS and "tensorwise" in names:
        names.sort(key=lambda name: name != "tensorwise")
    return tuple(names)


def searched(problem: Problem, m: int) -> tuple[str, ...]:
    """Every route that can run is worth timing but the slow exact one, unless it is alone."""
    names = routes(problem, m)
    return tuple(name for name in names if name != "exact") or names


def route_refuses(name: str, problem: Problem) -> str | None:
    """Why the route of that name cannot run the problem, None if it can."""
    if name not in _ROUTES:
        return f"there is no route {name!r}: {', '.join(_ROUTES)}"
    return _ROUTES[name].refuses(problem)


def add_route(name: str, route: Route) -> None:
    """Let a product of another library take part: it is measured by `tune`, run where a plan chose it, and last among untuned choices.

    A route of that name is replaced. It may trust what `Problem` says, and must keep the tolerance policy.
    """
    _ROUTES[name] = route


def is_known(route: str) -> bool:
    """Whether ``backend:variant`` exists in this process; a plan may have timed another library's product."""
    backend, _, variant = route.partition(":")
    return backend not in ("dense", "restore") or variant in _ROUTES


class DenseRoutes:
    """What backends on dense weights have in common: their variants are the routes."""

    def refuses(self, problem: Problem, variant: str | None = None) -> str | None:
        """int32 sums must not overflow; a route may ask for more."""
        return int32_overflow(problem) if variant is None else route_refuses(variant, problem)

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        """The routes that take the problem."""
        return routes(problem, m)

    def search(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None) -> tuple[str, ...]:
        """See `searched`."""
        return searched(problem, x.shape[0])

    def roundings(self, variant: str) -> int:
        """What the route says of itself; an unknown one is held to one."""
        return _ROUTES[variant].roundings if variant in _ROUTES else 1

    def gives_sums(self, variant: str) -> bool:
        """Whether the route can leave scales and bias to the caller."""
        return variant in _ROUTES and _ROUTES[variant].sums is not None


def make_ready(device: torch.device) -> None:
    """Make what routes keep on a device; never while a CUDA graph is captured."""
    if device.type == "cuda" and device not in _ONES:
        with torch.inference_mode(False):
            _ONES[device] = torch.ones(_MOST_ONES, dtype=torch.float32, device=device)
            _ONE[device] = _ONES[device][:1]


def one(device: torch.device) -> Tensor:
    """A float32 one, ``[1]``, without a kernel that writes it."""
    return torch.ones(1, dtype=torch.float32, device=device) if torch.compiler.is_compiling() or device not in _ONE else _ONE[device]


def ones(device: torch.device, count: int) -> Tensor:
    """As many float32 ones, without a kernel that fills them."""
    kept = _ONES.get(device)
    if torch.compiler.is_compiling() or kept is None or count > _MOST_ONES:
        return torch.ones(count, dtype=torch.float32, device=device)
    return kept[:count]


# By device. Made before a CUDA graph is captured: filling them in every call would be a kernel of its own.
_ONES: dict[torch.device, Tensor] = {}
_ONE: dict[torch.device, Tensor] = {}
_MOST_ONES = 1 << 17


def route_named(name: str) -> Route:
    """The route of that name, which must exist."""
    return _ROUTES[name]


def run_route(name: str, problem: Problem, x: Tensor, weight: Tensor, scale: Maybe, bias: Maybe) -> Tensor:
    """Quantise where the scheme asks for it, and run the route of that name on dense weights ``[N, K]``."""
    route = _ROUTES[name]
    q, x_scale = ops.quantize(x, problem.scheme, rows=route.rows) if problem.scheme.dynamic else (x, None)
    return route.run(problem, q, x_scale, weight, scale, bias)


def run_sums(name: str, problem: Problem, x: Activations, weight: Tensor, scale: Maybe) -> tuple[Tensor, Tensor]:
    """Quantise, and multiply by the route of that name: bfloat16 ``[M, N]``, and the token scales ``[M, 1]`` still to be applied."""
    q, x_scale = quantized(problem, x)
    return _ROUTES[name].sums(problem, q, weight, scale), x_scale


def _native(problem: Problem, q: Tensor, x_scale: Maybe, weight: Tensor, scale: Maybe, bias: Maybe) -> Tensor:
    # The library adds the bias to its fp32 sums. There is no scale for it to come before.
    return F.linear(q, weight, bias)


def _not_native(problem: Problem) -> str | None:
    return None if problem.native else "weights, activations and bias are not of one 16-bit type"


def _rowwise(problem: Problem, q: Tensor, x_scale: Maybe, weight: Tensor, scale: Maybe, bias: Maybe) -> Tensor:
    return torch._scaled_mm(q, weight.t(), x_scale, scale.view(1, -1), bias, out_dtype=problem.dtype, use_fast_accum=True)


def _rowwise_sums(problem: Problem, q: Tensor, weight: Tensor, scale: Maybe) -> Tensor:
    # Another kernel than without row scales, and the quicker one for many tokens.
    rows, columns = ones(q.device, q.shape[0]).view(-1, 1), ones(q.device, weight.shape[0]).view(1, -1)
    return torch._scaled_mm(q, weight.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)


def _not_rowwise(problem: Problem) -> str | None:
    if problem.dtype != torch.bfloat16 or problem.bias not in (None, torch.bfloat16):
        return "row-wise scales need a bfloat16 output and bias"
    return _not_scaled_mm(problem)


def _tensorwise(problem: Problem, q: Tensor, x_scale: Maybe, weight: Tensor, scale: Maybe, bias: Maybe) -> Tensor:
    # fp16 could overflow before the scales are applied.
    between = torch.bfloat16 if problem.dtype == torch.bfloat16 else torch.float32
    return finish(problem, _unscaled(q, weight, between), x_scale, scale, bias)


def _tensorwise_sums(problem: Problem, q: Tensor, weight: Tensor, scale: Maybe) -> Tensor:
    return _unscaled(q, weight, torch.bfloat16)


def _unscaled(q: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    unit = one(q.device).view(())
    return torch._scaled_mm(q, weight.t(), unit, unit, out_dtype=dtype, use_fast_accum=True)


def _not_scaled_mm(problem: Problem) -> str | None:
    if problem.scheme.name != "fp8" or problem.device != "cuda":
        return "multiplies fp8 on CUDA"
    if ops.capability() < (8, 9):
        return "fp8 needs compute capability 8.9"
    if problem.n % 16 or problem.k % 16:
        return f"N = {problem.n} and K = {problem.k} must be multiples of 16"
    return None


def _triton(problem: Problem, q: Tensor, x_scale: Maybe, weight: Tensor, scale: Maybe, bias: Maybe) -> Tensor:
    return ops.w8a8(q, weight, x_scale, scale, bias, problem.dtype)


def _triton_sums(problem: Problem, q: Tensor, weight: Tensor, scale: Maybe) -> Tensor:
    return ops.w8a8(q, weight, ones(q.device, q.shape[0]).view(-1, 1), scale, None, torch.bfloat16)


def _not_triton(problem: Problem) -> str | None:
    if problem.scheme.name != "int8" or problem.device != "cuda":
        return "multiplies int8 on CUDA"
    return int32_overflow(problem) if ops.has_triton() else "triton is not installed"


def _cublaslt(problem: Problem, q: Tensor, x_scale: Maybe, weight: Tensor, scale: Maybe, bias: Maybe) -> Tensor:
    return finish(problem, torch._int_mm(q, weight.t())[: x_scale.shape[0]], x_scale, scale, bias)


def _not_cublaslt(problem: Problem) -> str | None:
    if problem.scheme.name != "int8" or problem.device != "cuda":
        return "multiplies int8 on CUDA"
    if problem.n % 8 or problem.k % 8:
        return f"N = {problem.n} and K = {problem.k} must be multiples of 8"
    return int32_overflow(problem)


def _exact(problem: Problem, q: Tensor, x_scale: Maybe, weight: Tensor, scale: Maybe, bias: Maybe) -> Tensor:
    """On any device: integer sums exact, others in float32, one rounding."""
    sums = products(q, weight) if problem.scheme.dynamic else q.to(weight.dtype) @ weight.t()
    return finish(problem, sums, x_scale, scale, bias)


def _exact_sums(problem: Problem, q: Tensor, weight: Tensor, scale: Maybe) -> Tensor:
    sums = products(q, weight)
    return (sums.to(torch.float32) * scale.view(1, -1) if problem.scales_sums else sums).to(torch.bfloat16)


def _takes_all(problem: Problem) -> str | None:
    return int32_overflow(problem)


_ROUTES = {
    "native": Route(_not_native, _native),
    "rowwise": Route(_not_rowwise, _rowwise, _rowwise_sums),
    "tensorwise": Route(_not_scaled_mm, _tensorwise, _tensorwise_sums, roundings=2),
    "triton": Route(_not_triton, _triton, _triton_sums),
    "cublaslt": Route(_not_cublaslt, _cublaslt, rows=32),  # the library wants more than 16 rows
    "exact": Route(_takes_all, _exact, _exact_sums),
}
