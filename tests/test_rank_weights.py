"""Checks and packing of a rank's weights take small blocks, whatever the layer's size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slidesparse.format import SCHEMES
from slidesparse.integrations.engine.rank_weights import cut, pack
from slidesparse.packing import Shard
from slidesparse.packing import pack as packed_of
from slidesparse.pattern import Pattern

NEVER_SPLIT = 20 << 20
"""Bytes from which on torch's allocator splits no block while vLLM loads."""

N, K, PATTERN = 6144, 4096, Pattern(2, 4)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function: Callable, types: object, arguments: tuple = (), more: dict | None = None) -> object:
        given = {one.untyped_storage().data_ptr() for one in arguments if isinstance(one, Tensor)}
        found = function(*arguments, **(more or {}))
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in given:
            self.nbytes = max(self.nbytes, found.untyped_storage().nbytes())
        return found


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """Masked, ``[N, K]`` int8: 24 MB."""
    return torch.randint(1, 128, (N, K), dtype=torch.int8) * torch.tensor([1, 1, 0, 0], dtype=torch.int8).repeat(K // 4)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_packed_weights_are_checked_in_small_blocks(scheme: str, weight: Tensor) -> None:
    values = weight if scheme == "int8" else weight.clamp(max=100).view(SCHEMES[scheme].dtype)
    stored = packed_of(values, PATTERN)
    with Largest() as largest:
        assert cut(stored, torch.ones(N, 1), Shard(PATTERN, K, 0, K)) is stored
    assert 0 < largest.nbytes < NEVER_SPLIT


def test_dense_weights_are_packed_in_small_blocks(weight: Tensor) -> None:
    with Largest() as largest:
        packed, _ = pack(weight, torch.ones(N, 1), K, 0, (PATTERN,))
    assert torch.equal(packed.values, packed_of(weight, PATTERN).values)
    assert 0 < largest.nbytes < NEVER_SPLIT
