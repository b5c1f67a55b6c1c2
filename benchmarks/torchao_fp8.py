"""torchao's fused FP8 2:4 GEMM, row and column scales in its epilogue, measured among the other routes: arguments as for linears.py.

python benchmarks/torchao_fp8.py OUT.csv COMMIT --schemes fp8 --patterns 6:8 2:4
"""

from __future__ import annotations

import torch
import torchao
from torch import Tensor

import linears
from slidesparse import ops
from slidesparse.gemm import Problem, Weights, register
from slidesparse.gemm.kernels import Pipeline
from slidesparse.gemm.layouts import Copy
from slidesparse.ops.prologue import quantiser


class Torchaos:
    """The layout of torchao's kernel: values and metadata of the slid weights."""

    name = "torchao"

    def nbytes(self, problem: Problem) -> int:
        return problem.n * problem.pattern.slid_k(problem.k) * 5 // 8

    def prepare(self, problem: Problem, weights: Weights) -> Copy:
        return tuple(torch.ops.torchao.to_sparse_semi_structured_cutlass_sm9x_f8(ops.slide(weights.packed)))

    def dense(self, problem: Problem, copy: Copy) -> Tensor:
        raise NotImplementedError("torchao has no way back")


class Torchao:
    """A kernel on torchao's ops, which importing torchao registers."""

    name = "torchao"
    layouts = ("torchao",)
    worth_timing = True
    version = 1
    code = ()

    def refuses(self, problem: Problem, variant: str = "") -> str | None:
        return None if problem.scheme.name == "fp8" and problem.dtype == torch.bfloat16 else "multiplies fp8 to bfloat16"

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]:
        return (torchao.__version__,)

    def search(self, problem: Problem, x: Tensor, copy: Copy) -> tuple[str, ...]:
        return self.variants(problem, x.shape[0])

    def leaves(self, problem: Problem, variant: str) -> frozenset[str]:
        return frozenset()

    def roundings(self, variant: str) -> int:
        return 1

    def bind(self, problem: Problem, layout: str, variant: str, x: Tensor, *, unscaled: bool, direct: bool) -> Pipeline:
        def multiply(q: Tensor, x_scale: Tensor, copy: Copy, scale: Tensor, bias: Tensor | None) -> Tensor:
            return torch.ops.torchao.rowwise_scaled_linear_sparse_cutlass_f8f8(
                q, x_scale.view(-1), *copy, scale.view(-1), bias, problem.dtype
            )  # fmt: skip

        width = problem.pattern.slid_k(problem.k)
        return Pipeline(layout, quantiser(x, problem.scheme, problem.pattern, width, 1, direct), multiply)


if __name__ == "__main__":
    register(Torchao(), Torchaos())
    linears.main()
