"""The kernel for compute capability 9.0: its layout, its variants, and on a GPU its products against the oracle."""

from __future__ import annotations

import pytest
import torch

from layers import made
from slidesparse import ops, reference
from slidesparse.format import SCHEMES
from slidesparse.gemm.kernels.sm90 import Sm90, TiledLayout
from slidesparse.gemm.problem import Problem
from slidesparse.ops import sm90
from slidesparse.pattern import Pattern
from slidesparse.testing import check_bitwise

HOPPER = (9, 0)
SHAPES = [("2:4", 128, 128), ("4:6", 130, 300), ("6:8", 5, 40), ("6:8", 384, 1024), ("8:10", 257, 190), ("14:16", 64, 640)]


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(("pattern", "n", "k"), SHAPES)
def test_weights_come_back_from_tiles(pattern: str, n: int, k: int, scheme: str) -> None:
    weights, dense = made(n, k, scheme, pattern, "cpu")
    layout, problem = TiledLayout(), Problem(n, k, Pattern.parse(pattern), SCHEMES[scheme], HOPPER, torch.bfloat16)
    copy = layout.prepare(problem, weights)
    assert copy[0].numel() == layout.nbytes(problem)
    check_bitwise(layout.dense(problem, copy), dense)


def test_a_window_of_three_is_refused() -> None:
    with pytest.raises(ValueError, match="more than two"):
        sm90.tile(torch.ones(4, 8, dtype=torch.int8))
