"""Packed weights, restored in every call: the memory of the packed form, the results of dense weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..activations import Activations
from ..numerics import dense_weights
from ..problem import Problem, Weights
from ..routes import DenseRoutes, make_ready, run_route, run_sums


class Restore(DenseRoutes):
    """Expands the stored tensors into scratch that the allocator reuses per stream, multiplies, and forgets the expansion."""

    name = "restore"
    layout = "packed"

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]:
        """The stored tensors themselves."""
        make_ready(weights.packed.values.device)
        return weights.tensors()

    def run(
        self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None, variant: str
    ) -> Tensor:
        """``[M, K]`` → ``[M, N]``."""
        return run_route(variant, problem, x, dense_weights(problem, Weights.from_tensors(problem, resident)), scale, bias)

    def sums(
        self, problem: Problem, x: Activations, resident: Mapping[str, Tensor], scale: Tensor | None, variant: str
    ) -> tuple[Tensor, Tensor]:
        """``[M, K]`` → ``[M, N]`` and ``[M, 1]``."""
        return run_sums(variant, problem, x, dense_weights(problem, Weights.from_tensors(problem, resident)), scale)
