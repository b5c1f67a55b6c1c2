"""Stored tensors that change under a layer, come and go with accelerate's offloading, or are read as a weight."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import slidesparse.nn.linear as linear
from layers import DTYPE, tokens
from slidesparse import pruning
from slidesparse.errors import UnsupportedError, WeightError
from slidesparse.gemm.layouts import LAYOUTS
from slidesparse.nn import SlideSparseLinear
from slidesparse.pattern import Pattern
from slidesparse.tolerance import check_bitwise

SCHEMES = ["int8", "fp8", "bf16", "fp16", "nvfp4"]


def layer_of(scheme: str = "int8", n: int = 24, k: int = 48, bias: bool = True) -> SlideSparseLinear:
    pattern = Pattern(6, 8, unit=2 if scheme == "nvfp4" else 1)
    shift = torch.randn(n).to(DTYPE) if bias else None
    layer = SlideSparseLinear.from_dense(pruning.prune(torch.randn(n, k), pattern), shift, pattern=pattern, scheme=scheme)
    layer.name = "model.layers.3.up"
    return layer


def overwritten(layer: SlideSparseLinear, other: SlideSparseLinear) -> SlideSparseLinear:
    for name, tensor in other.named_buffers():
        layer.get_buffer(name).copy_(tensor)
    layer.bias.copy_(other.bias)
    return layer


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_into_stored_tensors_counts_from_the_next_call(scheme: str, memory: str, first: Callable) -> None:
    layer, other, x = layer_of(scheme), layer_of(scheme), tokens(3, 48)
    layer.memory = memory
    with first():
        layer(x)
    with torch.no_grad():
        overwritten(layer, other)
    check_bitwise(layer(x), other(x))
    with torch.inference_mode():
        overwritten(layer, layer_of(scheme))
        overwritten(layer, other)
        check_bitwise(layer(x), other(x))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["weight_values", "weight_scale"])
def test_one_tensor_of_several_is_enough(scheme: str, name: str) -> None:
    layer, x = layer_of(scheme, bias=False), tokens(3, 48)
    y = layer(x)
    layer.get_buffer(name).view(torch.int8 if name == "weight_values" else torch.float32)[:12] = 0 if name == "weight_values" else 2.0
    assert not torch.equal(layer(x)[:, :12], y[:, :12])
    check_bitwise(layer(x)[:, 12:], y[:, 12:])


def test_layers_loaded_in_inference_mode_notice_writes_too() -> None:
    with torch.inference_mode():
        layer, x = layer_of(), tokens(3, 48)
        layer(x)
        layer.weight_values.zero_()
        check_bitwise(layer(x), layer.bias.expand(3, -1).contiguous())


def test_damage_is_found_when_it_is_written() -> None:
    layer, x = layer_of(), tokens(3, 48)
    layer(x)
    layer.weight_keep[5, 0] ^= 1
    with pytest.raises(WeightError, match=r"layer model\.layers\.3\.up: weight_keep: row 5, group 0"):
        layer(x)


def test_keep_bits_are_counted_once_for_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, count = [], linear.check_packed
    monkeypatch.setattr(linear, "check_packed", lambda *arguments: counted.append(arguments) or count(*arguments))
    layer, x = layer_of(), tokens(3, 48)
    layer.check()
    layer(x)
    layer(x.float())
    assert len(counted) == 1
    layer.weight_scale.mul_(2)
    layer(x)
    assert len(counted) == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weight_is_of_the_models_type(scheme: str) -> None:
    layer = layer_of(scheme)
    for dtype in (DTYPE, torch.float16, torch.float32):
        weight = layer.to(dtype).weight
        assert isinstance(weight, torch.Tensor) and weight.dtype == dtype and weight.shape == (24, 48)
        check_bitwise(weight + 0, layer.dense_weight().to(dtype) + 0)
    bare = layer_of(scheme, bias=False)
    assert bare.weight.dtype == torch.get_default_dtype() and bare.half().weight.dtype == torch.float16


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "zero_": lambda weight: weight.zero_(),
    "item": lambda weight: weight.__setitem__((0, 0), 1.0),
    "operator": lambda weight: weight.__imul__(2),
    "out": lambda weight: torch.add(weight, 1, out=weight),
    "data": lambda weight: weight.data.copy_(weight),
    "new data": lambda weight: setattr(weight, "data", torch.zeros(24, 48)),
    "view": lambda weight: weight.t()[3:].fill_(0),
    "init": lambda weight: nn.init.normal_(weight),
    "inplace": lambda weight: nn.functional.relu(weight, inplace=True),
    "gradient": lambda weight: weight.requires_grad_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_into_the_weight_are_refused(write: str) -> None:
    layer = layer_of()
    before = layer.dense_weight()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(UnsupportedError, match=r"layer model\.layers\.3\.up: .*weight"):
            WRITES[write](layer.weight)
    check_bitwise(layer.dense_weight(), before)


def test_what_is_computed_from_the_weight_is_a_plain_tensor() -> None:
    layer, x = layer_of().float(), tokens(3, 48, torch.float32).requires_grad_()
    y = nn.functional.linear(x, layer.weight)
    assert type(y) is torch.Tensor and type(layer.weight * 2) is torch.Tensor
    y.add_(1).sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    assert torch.zeros(24, 48).copy_(layer.weight).abs().sum() > 0


@pytest.mark.parametrize("where", ["disk", "host"])
def test_offloaded_layers_are_not_made_anew_and_keep_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offloading = pytest.importorskip("accelerate")
    model = nn.Sequential(layer_of("int8", 64, 48), layer_of("bf16", 48, 64), layer_of("nvfp4", 32, 48)).requires_grad_(False)
    x = [tokens(3, 48) for _ in range(5)]
    expected = [model(one) for one in x]
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    counted, made, count = [], [], linear.check_packed
    monkeypatch.setattr(linear, "check_packed", lambda *arguments: counted.append(arguments) or count(*arguments))
    for layout in ("dense", "slid"):
        monkeypatch.setattr(LAYOUTS[layout], "prepare", lambda *arguments: made.append(arguments))
    if where == "disk":
        offloading.disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=True)
    else:
        offloading.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    for one, y in zip(x, expected, strict=True):
        check_bitwise(model(one), y)
        gc.collect()
        alive = [
            t for t in gc.get_objects() if type(t) is torch.Tensor and t.device.type == "cpu" and tuple(t.shape) in ((64, 48), (48, 64))
        ]
        assert [layer.weight_values.device.type for layer in model] == ["meta"] * 3 and not alive
        assert [layer.resident_bytes for layer in model] == [0] * 3
    assert len(counted) == 3 and made == []
    assert model[0].routes == (), "nothing stays ready"
