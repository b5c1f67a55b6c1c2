"""Copies of a layer whose weights changed are given up once no stream reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from slidesparse import SlideSparseLinear
from slidesparse.pattern import Pattern
from slidesparse.pruning import prune
from slidesparse.tolerance import check_bitwise


def masked(n: int, k: int) -> Tensor:
    return prune(torch.randn(n, k) * k**-0.5, Pattern(6, 8))


def test_the_device_is_waited_for_while_the_copies_still_live(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SlideSparseLinear.from_dense(masked(16, 32), pattern="6:8", scheme="int8")
    x = torch.randn(4, 32)
    before = layer(x)
    runner, card = layer._runner, torch.device("cuda", 0)
    ((copy, *_),) = runner._copies.values()
    storage, found = StorageWeakRef(copy.untyped_storage()), []
    del copy
    # As if it had run on a card.
    runner._kinds = {(dtype, card, bias): ready for (dtype, _, bias), ready in runner._kinds.items()}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: found.append((device, storage.expired())))
    layer.weight_scale.mul_(2)
    check_bitwise(layer(x), 2 * before)
    assert found == [(card, False)] and storage.expired()


@pytest.mark.parametrize("change", [lambda layer: layer.to("meta"), lambda layer: layer.load_state_dict(layer.state_dict())])
def test_a_move_and_another_state_let_go_as_well(change, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SlideSparseLinear.from_dense(masked(16, 32), pattern="6:8", scheme="int8")
    layer(torch.randn(4, 32))
    runner, waited = layer._runner, []
    runner._kinds = {(dtype, torch.device("cuda", 0), bias): ready for (dtype, _, bias), ready in runner._kinds.items()}
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    change(layer)
    assert len(waited) == 1 and not runner._copies and runner.ready is None


@pytest.mark.needs_gpu
@pytest.mark.parametrize("scheme", ["int8", "bf16"])
def test_a_call_on_another_stream_reads_the_weights_it_began_with(scheme: str) -> None:
    n, k = 4096, 4096
    layer, other = (SlideSparseLinear.from_dense(masked(n, k).cuda(), pattern="6:8", scheme=scheme) for _ in range(2))
    x = torch.randn(64, k, device="cuda", dtype=torch.bfloat16)
    values, keep = other.weight_values, other.weight_keep
    before, side = layer(x).clone(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(1 << 28)  # the call below stands behind it
        y = layer(x)
    layer.weight_values, layer.weight_keep = values, keep
    after = layer(x)
    torch.cuda.synchronize()
    check_bitwise(y, before)
    assert not torch.equal(after, before)
