"""Loading in vLLM calls no allocator, and what it leaves behind is the layouts that run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

vllm = pytest.importorskip("vllm", reason="vllm is not installed: pip install 'slidesparse[vllm]'")

from vllm.config import VllmConfig  # noqa: E402
from vllm.model_executor.layers import linear as layers  # noqa: E402

from slidesparse.format import SCHEMES, PackedConfig  # noqa: E402
from slidesparse.gemm import Runner  # noqa: E402
from slidesparse.integrations import vllm as adapter  # noqa: E402
from slidesparse.integrations.vllm import loading, methods  # noqa: E402
from slidesparse.pattern import Pattern  # noqa: E402
from vllm_layers import alone  # noqa: E402

SHAPES = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
"""N and K of a decoder's layers."""

ALLOCATED = 20 << 20
"""Bytes of the blocks in which torch's allocator takes memory for tensors of 1 to 10 MiB."""


@pytest.fixture
def config(tmp_path: Path, rank: Callable, bfloat16: None) -> Iterator[VllmConfig]:
    """A model's configuration, in force, on a rank that is alone."""
    with alone(tmp_path, rank) as made:
        yield made


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how much memory is free, and begins with nothing held."""
    for module in (loading, methods):
        monkeypatch.setattr(module, "LOADING", fresh := loading.Loading() if module is loading else loading.LOADING)
    assert not fresh.held
    return lambda free: monkeypatch.setattr(loading, "free_bytes", lambda device: free)


def unfilled(n: int, k: int, scheme: str = "int8") -> nn.Module:
    made = adapter.SlideSparseConfig.from_config(PackedConfig(Pattern(2, 4), SCHEMES[scheme], ["lm_head"]).to_dict())
    return layers.ColumnParallelLinear(k, n, bias=False, quant_config=made, prefix="m.up_proj")


def fill(layer: nn.Module) -> None:
    """As a loader does: the first two of every four are kept, none is zero."""
    layer.weight_values.data.view(torch.int8).random_(1, 100)
    layer.weight_keep.data.fill_(0b00110011)
    layer.weight_scale.data.fill_(0.001)


def ready(layer: nn.Module) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def loaded(layer: nn.Module) -> list[StorageWeakRef]:
    return [StorageWeakRef(tensor.data.untyped_storage()) for tensor in (layer.weight_values, layer.weight_keep)]


def test_no_allocator_is_called(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for module in (torch.cuda, torch.cuda.memory, torch.accelerator):
        monkeypatch.setattr(module, "empty_cache", lambda: called.append("empty_cache"))
    model = [unfilled(16, 32, scheme) for scheme in ("int8", "fp8")]
    for layer in model:
        fill(layer)
    for layer in model:
        ready(layer)
    assert not called


def test_loaded_weights_are_held_until_every_layer_is_ready(config: VllmConfig, room: Callable) -> None:
    room(1 << 60)
    model = [unfilled(16, 32) for _ in range(3)]
    stored = [one for layer in model for one in loaded(layer)]
    for layer in model:
        fill(layer)
    for layer in model[:-1]:
        ready(layer)
        assert not any(one.expired() for one in stored)
    ready(model[-1])
    assert all(one.expired() for one in stored)


def test_they_go_at_once_where_memory_is_short(config: VllmConfig, room: Callable) -> None:
    first, second = model = [unfilled(16, 32) for _ in range(2)]
    for layer in model:
        fill(layer)
    stored = loaded(first), loaded(second)
    nbytes = sum(getattr(first, name).nbytes for name in ("weight_values", "weight_keep"))
    room(loading.ROOM * nbytes - 1)
    ready(first)
    assert all(one.expired() for one in stored[0]) and not any(one.expired() for one in stored[1])


def test_a_layer_that_is_gone_is_not_waited_for(config: VllmConfig, room: Callable) -> None:
    room(1 << 60)
    layer = unfilled(16, 32)
    unfilled(16, 32)
    gc.collect()
    fill(layer)
    stored = loaded(layer)
    ready(layer)
    assert all(one.expired() for one in stored)


def test_tensors_that_share_memory_count_once(config: VllmConfig, room: Callable) -> None:
    model = [unfilled(16, 32) for _ in range(2)]
    for layer in model:
        fill(layer)
    first = model[0]
    stored = loaded(first)
    room(loading.ROOM * sum(getattr(first, name).nbytes for name in ("weight_values", "weight_keep", "weight_scale")))
    ready(first)
    assert not any(one.expired() for one in stored)


@pytest.mark.parametrize("built", [True, False], ids=["built on meta", "moved to meta"])
def test_a_layer_that_has_no_memory_is_not_waited_for(built: bool, config: VllmConfig, room: Callable) -> None:
    """vLLM builds parts that the model can do without on the meta device, or moves them there, keeps them, and never makes them ready."""
    room(1 << 60)
    layer = unfilled(16, 32)
    with torch.device("meta" if built else "cpu"):
        without = unfilled(16, 32)
    without.to("meta")
    fill(layer)
    stored = loaded(layer)
    ready(layer)
    assert all(parameter.is_meta for parameter in without.parameters())
    assert all(one.expired() for one in stored)


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_held_once_a_layer_runs(compiled: bool, config: VllmConfig, room: Callable) -> None:
    """Not even for a layer that has memory, and is never made ready; nor does a layer that is made ready later wait for this one."""
    room(1 << 60)
    first, second, never = [unfilled(16, 32) for _ in range(3)]
    stored = loaded(first), loaded(second)
    for layer in (first, second):
        fill(layer)
    ready(first)
    assert not any(one.expired() for one in stored[0])
    run = torch.compile(first, backend="eager", fullgraph=True) if compiled else first
    with torch.inference_mode():
        run(torch.randn(3, 32, dtype=torch.bfloat16))
    assert all(one.expired() for one in stored[0])
    ready(second)
    assert all(one.expired() for one in stored[1]) and never.weight_values.numel()


@contextmanager
def as_vllm_loads() -> Iterator[None]:
    """Blocks of more than 20 MB are not split."""
    torch._C._accelerator_setAllocatorSettings("max_split_size_mb:20")
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings("max_split_size_mb:-1")


def pools() -> dict[bool, tuple[Callable[[], AbstractContextManager], Callable[[], int]]]:
    """The pool that loading runs in, and the bytes that the driver gave to it, without and with sleep mode."""
    from vllm.device_allocator import cumem  # which may want a driver

    if not cumem.cumem_available:
        return {False: (nullcontext, torch.cuda.memory_reserved)}
    sleeper = cumem.CuMemAllocator.get_instance()
    return {
        False: (nullcontext, torch.cuda.memory_reserved),
        True: (lambda: sleeper.use_memory_pool(tag="weights"), sleeper.get_current_usage),
    }


@pytest.mark.needs_gpu
@pytest.mark.parametrize("sleep", [False, True])
def test_a_loaded_model_takes_what_its_layouts_take(sleep: bool, config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of int8 and of fp8, in one test: a process enters the pool of sleep mode once, and the second time may abort it (vLLM 0.26)."""
    known = pools()
    if sleep not in known:
        pytest.skip("this vLLM was built without its pool for sleep mode")
    pool, taken = known[sleep]
    runners: list[Runner] = []
    monkeypatch.setattr(methods, "Runner", lambda *arguments, **more: runners.append(Runner(*arguments, **more)) or runners[-1])
    monkeypatch.setattr(methods.Settings, "current", classmethod(lambda cls: methods.Settings(route="dense")))
    gc.collect()
    torch.cuda.empty_cache()
    before = taken()
    with pool(), as_vllm_loads(), torch.device("cuda"):
        model = [unfilled(n, k, scheme) for scheme in ("int8", "fp8") for _ in range(4) for n, k in SHAPES]
        for layer in model:
            fill(layer)
        for layer in model:
            ready(layer)
    gc.collect()
    torch.cuda.empty_cache()
    rest = sum(runner.weights.scale.nbytes for runner in runners)
    assert len(runners) == len(model) and not methods.LOADING.held
    # Besides 1 %, the two blocks of the allocator that layouts and scales leave partly empty, whatever the size of the model.
    assert taken() - before <= 1.01 * (sum(runner.resident_bytes for runner in runners) + rest) + 2 * ALLOCATED
