"""Compiled kernels are found again only where Triton would have compiled the same one."""

from __future__ import annotations

import pytest
import torch

from slidesparse.ops import launching


class Compiled:
    def __init__(self, log: list) -> None:
        self.log = log

    def __getitem__(self, grid: tuple):
        return lambda *arguments: self.log.append((grid, arguments))


class Kernel:
    arg_names = ("x", "m", "k", "BLOCK", "INT8")

    def __init__(self) -> None:
        self.compiled, self.direct = [], []

    def __getitem__(self, grid: tuple):
        def run(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            return Compiled(self.direct)

        return run


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(launching, "_compiled", {})
    return Kernel()


def test_the_second_call_goes_straight_to_the_compiled_kernel(kernel):
    x = torch.zeros(64, dtype=torch.int8)
    constants = {"INT8": True, "num_warps": 4, "BLOCK": 32}
    launching.launch(kernel, (5,), (x, 48, 1), constants)
    launching.launch(kernel, (7, 2), (x, 96, 1), constants)
    assert len(kernel.compiled) == 1
    assert kernel.direct == [((7, 2, 1), (x, 96, 1, 32, True))]


def test_whatever_triton_specialises_on_compiles_anew(kernel):
    x = torch.zeros(64, dtype=torch.int8)
    base = ((x, 48, 2), {"BLOCK": 32, "INT8": True, "num_warps": 4})
    others = [
        ((x[1:], 48, 2), base[1]),
        ((x.view(torch.uint8), 48, 2), base[1]),
        ((x, None, 2), base[1]),
        ((x, 50, 2), base[1]),
        ((x, 48, 1), base[1]),
        ((x, 1 << 31, 2), base[1]),
        ((x, 1.5, 2), base[1]),
        (base[0], base[1] | {"BLOCK": 64}),
        (base[0], base[1] | {"num_warps": 8}),
    ]
    for arguments, constants in [base, *others]:
        launching.launch(kernel, (1,), arguments, constants)
    assert len(kernel.compiled) == 1 + len(others) and not kernel.direct
