"""Settings that let torch round the inputs of float32 products change no layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event, Thread

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layers import made
from slidesparse.gemm import Runner
from slidesparse.gemm.precision import matmul
from slidesparse.tolerance import check_bitwise


class Precisions(TorchDispatchMode):
    """What float32 products were allowed to be."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and args[-1].dtype == torch.float32:
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


def test_a_product_does_not_trust_what_another_thread_has_set_for_its_own(precision: Callable) -> None:
    precision("medium")
    inside, other, ended = Event(), Event(), Event()
    seen: dict[str, str] = {}

    class Waiting(TorchDispatchMode):
        def __init__(self, name: str, before: Callable[[], object]) -> None:
            super().__init__()
            self.name, self.before = name, before

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                self.before()
                seen[self.name] = torch.backends.mkldnn.matmul.fp32_precision
            return function(*args, **(kwargs or {}))

    def first() -> None:
        with Waiting("first", lambda: (inside.set(), other.wait(1))):  # holds its setting until the second multiplies, or waits
            matmul(torch.ones(4, 4), torch.ones(4, 4))
        ended.set()

    def second() -> None:
        inside.wait(10)
        with Waiting("second", lambda: (other.set(), ended.wait(10))):
            matmul(torch.ones(4, 4), torch.ones(4, 4))

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "ieee", "second": "ieee"}


@pytest.mark.parametrize("scheme", ["bf16", "nvfp4"])
@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_products_that_need_float32_are_of_float32_whatever_is_allowed(scheme: str, allowed: str, precision: Callable) -> None:
    weights, _ = made(256, 512, scheme, "6:8x2" if scheme == "nvfp4" else "6:8")
    found = []
    for setting in ("highest", allowed):
        precision(setting)
        before = torch.backends.mkldnn.matmul.fp32_precision
        x = (found[0][0].detach() if found else torch.randn(64, 512)).clone().requires_grad_()
        with Precisions() as products:
            y = Runner(weights)(x)
            y.backward(found[0][1].detach() if found else y.detach())
        assert products.seen == {"ieee"} and torch.backends.mkldnn.matmul.fp32_precision == before
        found.append((x, y, x.grad))
    for exact, same in zip(*found, strict=True):
        check_bitwise(same.detach(), exact.detach())
