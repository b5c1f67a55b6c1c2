"""Ops go straight to their kernel unless somebody traces, transforms or watches."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slidesparse.ops import launch, library


class Mode(TorchDispatchMode):
    """Sees every op and changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Sees every function and changes nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def watchers():
    return [Mode(), Functions()]


def bystanders():
    """What must not change what runs."""
    return [torch.device("cpu"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])]


def test_modes_tracers_and_transforms_watch_and_nobody_else_does() -> None:
    assert not launch._watched()
    for watcher in watchers():
        with watcher:
            assert launch._watched()
            with torch.device("cpu"):
                assert launch._watched()
    for bystander in bystanders():
        with bystander:
            assert not launch._watched()
    torch.set_default_device("cpu")
    try:
        assert not launch._watched()
    finally:
        torch.set_default_device(None)
    seen = []
    torch.func.vmap(lambda x: (seen.append(launch._watched()), x)[1])(torch.ones(2))
    torch.jit.trace(lambda x: (seen.append(launch._watched()), x + 1)[1], torch.ones(2), check_trace=False)
    assert seen == [True, True] and not launch._watched()


class OnCard:
    """Stands for a tensor on a card."""

    is_cuda, requires_grad = True, False

    def get_device(self) -> int:
        return 0


@pytest.fixture(scope="module")
def op():
    kernel = lambda first, number: ("kernel", number)  # noqa: E731
    return library.define("stands_for_any(Tensor x, int number) -> Tensor", cuda=kernel, fake=lambda x, number: x)


def test_a_plain_tensor_on_a_card_goes_to_the_kernel(op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_PLAIN", (OnCard,))
    assert op(OnCard(), 3) == ("kernel", 3)
    for bystander in bystanders():
        with bystander:
            assert op(OnCard(), 4) == ("kernel", 4)
    for watcher in watchers():
        # The dispatcher takes tensors only, which shows that it was asked.
        with watcher, pytest.raises(RuntimeError, match="stands_for_any"):
            op(OnCard(), 3)
    monkeypatch.setattr(launch, "_PLAIN", (torch.Tensor,))
    with pytest.raises(RuntimeError, match="stands_for_any"):
        op(OnCard(), 3)
