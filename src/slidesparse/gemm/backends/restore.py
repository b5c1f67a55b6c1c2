"""Packed weights, restored in every call: the memory of the packed form, the results of dense weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..numerics import dense_weights, int32_overflow
from ..problem import Problem, Weights
from ..routes import route_refuses, routes, run_route


class Restore:
    """Expands the stored tensors into scratch that the allocator reuses per stream, multiplies, and forgets the expansion."""

    name = "restore"
    layout = "packed"

    def refuses(self, problem: Problem, variant: str | None = None) -> str | None:
        """int32 sums must not overflow; a route may ask for more."""
        return int32_overflow(problem) if variant is None else route_refuses(variant, problem)

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        """The dense routes that take the problem."""
        return routes(problem, m)

    def search(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None) -> tuple[str, ...]:
        """Every dense route but the slow exact one, unless it is alone."""
        names = routes(problem, x.shape[0])
        return tuple(name for name in names if name != "exact") or names

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]:
        """The stored tensors themselves."""
        return weights.tensors()

    def run(
        self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None, variant: str
    ) -> Tensor:
        """``[M, K]`` → ``[M, N]``."""
        return run_route(variant, problem, x, dense_weights(problem, Weights.from_tensors(problem, resident)), scale, bias)
