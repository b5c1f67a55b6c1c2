"""ADMM: the pattern as a projection between least-squares steps, then the best weights on the support that came out.

After ALPS (Meng et al., arXiv 2406.07831): min tr((W − Ŵ) H (W − Ŵ)ᵀ) over W that obeys the pattern.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..pattern import Pattern
from .selection import threshold
from .sparsegpt import sweep
from .statistics import Scaled, Statistics, positive_inverse, row_errors

_FIRST_RHO, _CHECK_EVERY, _RESTARTS = 0.1, 3, 4
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""A larger share of the support changed between two checks → ρ grows by this factor."""
_ROUGHLY = 0.1
"""Supports are compared when at most this share of the output error of each is left to gain."""
_STILL = 1e-4
"""A smaller share ends the steps; at the first check it says that ρ is too large to begin with."""


def admm(
    weight: Tensor,
    pattern: Pattern,
    statistics: Statistics,
    *,
    damping: float = 0.01,
    iterations: int = 300,
    refinements: int = 40,
    tolerance: float = 1e-3,
) -> Tensor:
    """Pruned and corrected weights, float32 ``[N, K]``.

    Two supports are tried, ADMM's and SparseGPT's; each row keeps the one whose best weights give the smaller output error.

    Args:
        weight: ``[N, K]``, any float type.
        statistics: with the Hessian.
        damping: this part of the mean of diag H is added to the diagonal.
        iterations: ADMM steps at most; they end when the support all but stands still.
        refinements: steps of conjugate gradients on a support at most.
        tolerance: conjugate gradients end where less than this share of the output error before them is left to gain.

    Raises:
        WeightError: a Hessian that cannot be factorised.
    """
    problem = Scaled.of(statistics, damping)
    # Transposed, [K, N]: a group's positions are whole rows, and both products read contiguous memory.
    target = (weight.float() * problem.scale).t().contiguous()
    product = problem.hessian @ target
    # NaN until a solution takes its place: a row whose errors all overflow must not look like a pruned one.
    best, least = torch.full_like(target, torch.nan), target.new_full((target.shape[1],), torch.inf, dtype=torch.float64)

    def keep(found: Tensor) -> Tensor:
        """Take the rows that are the best so far; give the errors of all."""
        nonlocal best, least
        error = row_errors(target.t(), found.t(), problem.hessian)
        best, least = torch.where(error < least, found, best), torch.where(error < least, error, least)
        return error

    supports: tuple[Callable[[], Tensor], ...] = (
        lambda: _support(target, product, pattern, problem.hessian, iterations),
        lambda: sweep(target.t(), pattern, problem).t(),
    )
    # What refinement starts from counts, too: rounding may spoil a row where the Hessian is close to singular.
    for support in supports:
        start = support()
        keep(refine(product, start != 0, start, problem, refinements, _ROUGHLY * float(keep(start).sum())))
    keep(refine(product, best != 0, best, problem, refinements, tolerance * float(least.sum())))
    return (best.t() / problem.scale).contiguous() + 0.0


def _support(target: Tensor, product: Tensor, pattern: Pattern, hessian: Tensor, iterations: int) -> Tensor:
    """The feasible point ``[K, N]`` that ADMM arrives at; ``product`` is ``hessian @ target``."""
    rho = _FIRST_RHO
    for attempt in range(_RESTARTS + 1):
        point, moved = _iterate(target, product, pattern, hessian, rho, iterations, patient=attempt == _RESTARTS)
        if moved:
            break
        rho /= 5
    return point


def _iterate(
    target: Tensor, product: Tensor, pattern: Pattern, hessian: Tensor, rho: float, iterations: int, *, patient: bool
) -> tuple[Tensor, bool]:
    """ADMM from the projection of ``target [K, N]``; false beside the point when the first check shows almost no change."""
    point = project(target, pattern)
    dual, support, inverse = torch.zeros_like(target), point != 0, None
    kept = max(int(support.sum()), 1)
    for step in range(1, iterations + 1):
        if inverse is None:
            inverse = positive_inverse(hessian, rho)
        free = inverse @ torch.add(product, point, alpha=rho).sub_(dual)
        point = project(torch.add(free, dual, alpha=1 / rho), pattern)
        dual.add_(free.sub_(point), alpha=rho)
        if step % _CHECK_EVERY:
            continue
        now = point != 0
        changed, support = int(torch.count_nonzero(now != support)) / kept, now
        if step == _CHECK_EVERY and changed < _STILL and not patient:
            return point, False
        if changed < _STILL:
            break
        rho *= next(factor for share, factor in _GROWTH if changed > share)
        inverse = None  # [K, K]: gone before the next one is made
    return point, True


def project(point: Tensor, pattern: Pattern) -> Tensor:
    """Transposed weights ``[K, N]`` with the smallest units of every group at 0; units that tie with the last to go, go too."""
    k, n = point.shape
    score = point.abs()
    if pattern.unit > 1:
        score = score.view(pattern.units(k), pattern.unit, n).sum(1)
    units = score.shape[0]
    if units % pattern.group:
        score = torch.nn.functional.pad(score, (0, 0, 0, -units % pattern.group), value=-1.0)
    score = score.unflatten(0, (-1, pattern.group))
    keep = (score > threshold(score.transpose(0, 1), pattern).unsqueeze(1)).flatten(0, 1)[:units]
    keep = keep.repeat_interleave(pattern.unit, dim=0) if pattern.unit > 1 else keep
    return point * keep.to(point.dtype)  # floats: a product with booleans is slow on a CPU


def refine(product: Tensor, keep: Tensor, start: Tensor, problem: Scaled, steps: int, excess: float) -> Tensor:
    """The least-squares weights ``[K, N]`` on a support, by conjugate gradients for all outputs at once, for ``product`` H w.

    The preconditioner is the Hessian's inverse on the support. It is the inverse that is wanted but for a part whose rank is at most the
    number of weights that went, so that few steps suffice, however ill-conditioned the Hessian is. They end early where the output error
    (s − w) H (s − w)ᵀ of all rows lies at most ``excess`` above the least: the residual's size by that inverse is never below the rest.
    """
    hessian, inverse, keep = problem.hessian, problem.inverse, keep.to(product.dtype)
    solution = start.clone()
    residual = (product - hessian @ solution).mul_(keep)
    direction = (inverse @ residual).mul_(keep)
    tiny = torch.finfo(product.dtype).tiny
    size = (residual * direction).sum(0)
    for _ in range(steps):
        if size.sum() <= excess:
            break
        image = (hessian @ direction).mul_(keep)
        length = size / (direction * image).sum(0).clamp(min=tiny)
        solution.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        preconditioned = (inverse @ residual).mul_(keep)
        before, size = size, (residual * preconditioned).sum(0)
        direction.mul_(size / before.clamp(min=tiny)).add_(preconditioned)
    return solution
