"""Ops go straight to their kernel unless somebody traces, transforms or watches."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slidesparse import doctor, reference
from slidesparse.compat.torch import watched
from slidesparse.format import SCHEMES
from slidesparse.gemm import Problem, Route
from slidesparse.gemm.kernels import refusal, unmeasured
from slidesparse.ops import launch, launches, library
from slidesparse.pattern import Pattern

rescale, w8a8 = (import_module(f"slidesparse.ops.{name}") for name in ("rescale", "w8a8"))
"""The modules, whose ops have the same names."""


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
    assert not watched()
    for watcher in watchers():
        with watcher:
            assert watched()
            with torch.device("cpu"):
                assert watched()
    for bystander in bystanders():
        with bystander:
            assert not watched()
    torch.set_default_device("cpu")
    try:
        assert not watched()
    finally:
        torch.set_default_device(None)
    seen = []
    torch.func.vmap(lambda x: (seen.append(watched()), x)[1])(torch.ones(2))
    torch.jit.trace(lambda x: (seen.append(watched()), x + 1)[1], torch.ones(2), check_trace=False)
    assert seen == [True, True] and not watched()


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


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch finds a card, and Triton, which is real, fails to compile for it."""
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **kind: empty(*size, **kind))
    library._tried.cache_clear()
    yield
    library._tried.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton compiles")
def test_a_triton_that_cannot_compile_is_named_once_and_nothing_runs_on_it(no_compiler, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert not library.has_triton() and not library.runs_kernels(torch.device("cuda"), torch.bfloat16)
    (told,) = caplog.messages
    assert told.startswith("triton cannot compile here: ") and told.endswith("; kernels of torch run instead") and "\n" not in told
    fault = library.triton_fault()
    problem = Problem(64, 64, Pattern(6, 8), SCHEMES["int8"], (9, 0), torch.bfloat16)
    assert refusal(Route("dense", "triton"), problem) == fault
    assert unmeasured(problem, 128, "dense") == Route("dense", "cublaslt")
    found = {one.what: one for one in doctor._packages()}
    assert not found["triton"].ok and found["triton"].found and fault in found["triton"].means


def test_where_triton_need_only_be_there_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for spec, fault in ((object(), None), (None, "triton is not installed")):
        monkeypatch.setattr(library.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert library.triton_fault() == fault


@pytest.mark.parametrize(
    ("capability", "version", "writes"),
    [((8, 0), "3.9.0", False), ((8, 9), "3.8.0", False), ((8, 9), "3.9.0", True), ((9, 0), "3.6.0", True), ((0, 0), "3.9.0", False)],
)
def test_a_triton_that_rounds_e4m3_twice_writes_none(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: str, writes: bool
) -> None:
    monkeypatch.setattr(library, "installed", lambda name: version)
    monkeypatch.setattr(library, "has_triton", lambda: True)
    library.writes_e4m3.cache_clear()
    assert library.runs_kernels(library.Card(capability), torch.float8_e4m3fn) is writes
    assert library.runs_kernels(library.Card(capability), torch.int8)
    library.writes_e4m3.cache_clear()


@pytest.mark.parametrize(
    ("capability", "version", "fuses"), [((9, 0), "3.6.0", False), ((10, 0), "3.6.1", True), ((10, 0), "3.7.0", False)]
)
def test_a_triton_that_fuses_products_and_sums_scales_nothing(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: str, fuses: bool
) -> None:
    monkeypatch.setattr(library, "installed", lambda name: version)
    library.fuses.cache_clear()
    problem = Problem(512, 512, Pattern.parse("6:8"), SCHEMES["int8"], capability, torch.bfloat16)
    reason = refusal(Route("dense", "triton"), problem)
    assert ("update to 3.7" in (reason or "")) is fuses
    scaling = {"rescale_kernel", "sum_kernel", "tile_kernel"}
    listed = {launch.name for launch in launches.shipped_launches(capability) if "BIAS" in launch.constants}
    assert listed == (set() if fuses else scaling)
    library.fuses.cache_clear()


def test_where_triton_fuses_the_oracles_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    acc, scales = torch.randint(-9, 9, (3, 16), dtype=torch.int32), (torch.rand(3, 1), torch.rand(16, 1))
    q, weight = (torch.randint(-9, 9, (rows, 16), dtype=torch.int8) for rows in (3, 16))
    for module in (rescale, w8a8):
        monkeypatch.setattr(module, "fuses", lambda capability: True)
    monkeypatch.setattr(rescale, "launch_rescale", lambda *_: pytest.fail("a kernel of Triton's is launched"))
    monkeypatch.setattr(w8a8, "launch_w8a8", lambda *_: pytest.fail("a kernel of Triton's is launched"))
    y = rescale._rescale_cuda(acc, *scales, None, torch.bfloat16, 3, 16)
    assert torch.equal(y, reference.scaled(acc, scales[0], scales[1].view(1, -1), None, torch.bfloat16))
    y = w8a8._w8a8_cuda(q, weight, *scales, None, torch.bfloat16)
    assert torch.equal(y, reference.linear(q, scales[0], weight, scales[1], None, torch.bfloat16))
