"""Dense weights, restored once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.launching import Call
from ...ops.library import allocator
from ...ops.quantize import padded_rows
from ..activations import Activations, call_for, inputs_of
from ..numerics import dense_weights
from ..problem import Problem, Weights
from ..routes import DenseRoutes, Route, make_ready, route_named, run_route, run_sums


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

    def sums(
        self, problem: Problem, x: Activations, resident: Mapping[str, Tensor], scale: Tensor | None, variant: str
    ) -> tuple[Tensor, Tensor]:
        """``[M, K]`` → ``[M, N]`` and ``[M, 1]``."""
        return run_sums(variant, problem, x, resident["weight"], scale)

    def bind(self, problem: Problem, x: Activations, resident: Mapping[str, Tensor], variant: str, *, sums: bool) -> Bound | None:
        """See `registry.Bound`: of schemes that quantise activations."""
        route, (m, k) = route_named(variant), x.shape
        quantize = call_for(problem, x, None, k) if problem.device == "cuda" and problem.scheme.dynamic else None
        if quantize is None:
            return None
        q = (padded_rows(m, 1 if sums else route.rows), k), (k, 1), problem.scheme.dtype
        return Bound(allocator(x.device), quantize, q, ((m, 1), (1, 1), torch.float32), problem, route)


class Bound(NamedTuple):
    """`Dense.run` and `Dense.sums` for inputs of one shape; ``q`` and ``scales`` are size, strides and type of what is allocated."""

    empty: Callable[..., Tensor]
    quantize: Call
    q: tuple
    scales: tuple
    problem: Problem
    route: Route

    def sums(self, x: Activations, resident: Mapping[str, Tensor], scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[M, K]`` → ``[M, N]`` and ``[M, 1]``."""
        q, x_scale = self.empty(*self.q), self.empty(*self.scales)
        self.quantize(*inputs_of(x, x_scale), q, x_scale)
        return self.route.sums(self.problem, q, resident["weight"], scale), x_scale

    def run(self, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """``[M, K]`` → ``[M, N]``."""
        q, x_scale = self.empty(*self.q), self.empty(*self.scales)
        self.quantize(x, q, x_scale)
        return self.route.run(self.problem, q, x_scale, resident["weight"], scale, bias)
