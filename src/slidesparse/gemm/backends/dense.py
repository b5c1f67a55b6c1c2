"""Dense weights, restored once and kept."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..numerics import dense_weights
from ..problem import Problem, Weights
from ..routes import DenseRoutes, make_ready, run_route, run_sums


class Dense(DenseRoutes):
    """Multiplies by restored weights ``[N, K]`` that stay in memory."""

    name = "dense"
    layout = "dense"

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]:
        """The dense weights."""
        make_ready(weights.packed.values.device)
        return {"weight": dense_weights(problem, weights)}

    def run(
        self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None, variant: str
    ) -> Tensor:
        """``[M, K]`` → ``[M, N]``."""
        return run_route(variant, problem, x, resident["weight"], scale, bias)

    def sums(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], variant: str) -> tuple[Tensor, Tensor]:
        """``[M, K]`` → ``[M, N]`` and ``[M, 1]``."""
        return run_sums(variant, problem, x, resident["weight"])
