"""Dense weights, restored once and kept."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..numerics import dense_linear, dense_weights, int32_overflow
from ..problem import Problem, Weights


class Dense:
    """Multiplies by restored weights ``[N, K]`` that stay in memory."""

    name = "dense"
    layout = "dense"
    resident_copy = True

    def refuses(self, problem: Problem, m: int) -> str | None:
        """int32 sums must not overflow."""
        return int32_overflow(problem)

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]:
        """The dense weights."""
        return {"weight": dense_weights(problem, weights)}

    def run(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """``[M, K]`` → ``[M, N]``."""
        return dense_linear(problem, x, resident["weight"], scale, bias)
