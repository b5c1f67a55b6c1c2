"""torchao's fused FP8 2:4 GEMM, row and column scales in its epilogue, measured among our routes: arguments as for linears.py.

python benchmarks/rival_torchao.py OUT.csv COMMIT --schemes fp8 --patterns 6:8 2:4
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torchao
from torch import Tensor

import linears
from slidesparse import ops
from slidesparse.gemm import Problem, Weights, register


class Torchao:
    """A backend on torchao's ops, which importing it registers."""

    name = "torchao"
    layout = "torchao"

    def refuses(self, problem: Problem, variant: str | None = None) -> str | None:
        return None if problem.scheme.name == "fp8" and problem.dtype == torch.bfloat16 else "multiplies fp8 to bfloat16"

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        return (torchao.__version__,)

    def search(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None) -> tuple[str, ...]:
        return self.variants(problem, x.shape[0])

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]:
        data, meta = torch.ops.torchao.to_sparse_semi_structured_cutlass_sm9x_f8(ops.slide(weights.packed))
        return {"data": data, "meta": meta}

    def roundings(self, variant: str) -> int:
        return 1

    def gives_sums(self, variant: str) -> bool:
        return False

    def run(
        self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None, variant: str
    ) -> Tensor:
        q, x_scale = ops.quantize_lift(x, problem.pattern, problem.scheme)
        return torch.ops.torchao.rowwise_scaled_linear_sparse_cutlass_f8f8(
            q, x_scale.view(-1), resident["data"], resident["meta"], scale.view(-1), bias, problem.dtype
        )


if __name__ == "__main__":
    register(Torchao())
    linears.main()
