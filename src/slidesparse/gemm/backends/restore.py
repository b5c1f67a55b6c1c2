"""Packed weights, restored in every call: the memory of the packed form, the results of dense weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..numerics import dense_linear, dense_weights, int32_overflow
from ..problem import Problem, Weights


class Restore:
    """Expands the stored tensors, multiplies, and forgets the expansion."""

    name = "restore"
    layout = "packed"
    resident_copy = False

    def refuses(self, problem: Problem, m: int) -> str | None:
        """int32 sums must not overflow."""
        return int32_overflow(problem)

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]:
        """The stored tensors themselves."""
        return weights.tensors()

    def run(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """``[M, K]`` → ``[M, N]``."""
        return dense_linear(problem, x, dense_weights(problem, Weights.from_tensors(problem, resident)), scale, bias)
