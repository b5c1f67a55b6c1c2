"""The oracle as a backend: slow and exact, on any device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ... import reference
from ...quant import dequantize_nvfp4
from ..activations import Activations
from ..problem import Problem, Weights


class Reference:
    """Restores in every call and sums in float64."""

    name = "reference"
    layout = "packed"

    def refuses(self, problem: Problem, variant: str | None = None) -> str | None:
        """Runs everything."""
        return None

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        """One way."""
        return ("float64",)

    def search(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None) -> tuple[str, ...]:
        """Never worth timing."""
        return ()

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]:
        """The stored tensors themselves."""
        return weights.tensors()

    def roundings(self, variant: str) -> int:
        """One."""
        return 1

    def gives_sums(self, variant: str) -> bool:
        """The oracle of the sums, too."""
        return True

    def sums(
        self, problem: Problem, x: Activations, resident: Mapping[str, Tensor], scale: Tensor | None, variant: str
    ) -> tuple[Tensor, Tensor]:
        """``[M, K]`` → ``[M, N]`` and ``[M, 1]``."""
        weight = reference.restore(Weights.from_tensors(problem, resident).packed)
        q, x_scale = reference.quantize(x if isinstance(x, Tensor) else x.computed(), problem.scheme)
        exact = q.to(torch.float64) @ weight.to(torch.float64).t()
        return (exact * scale.view(1, -1) if problem.scales_sums else exact).to(torch.bfloat16), x_scale

    def run(
        self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None, variant: str
    ) -> Tensor:
        """``[M, K]`` → ``[M, N]``."""
        weights = Weights.from_tensors(problem, resident)
        weight, x_scale = reference.restore(weights.packed), None
        if problem.scheme.pair:
            weight = dequantize_nvfp4(weight, weights.scale, weights.global_scale)
        if problem.scheme.dynamic:
            x, x_scale = reference.quantize(x, problem.scheme)
        return reference.linear(x.to(torch.float64), x_scale, weight, scale, bias, problem.dtype)
