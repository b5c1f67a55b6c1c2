"""Gradients of packed layers: of activations and bias, by every scheme and route; of packed weights, and second ones, none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stand_ins
from layers import DTYPE, tokens
from slidesparse import ops, pruning
from slidesparse.errors import UnsupportedError
from slidesparse.format import scheme_named
from slidesparse.gemm import Runner, Weights, op
from slidesparse.nn import SlideSparseLinear
from slidesparse.packing import Shard, pack
from slidesparse.pattern import Pattern
from slidesparse.quantization import quantize_weight
from slidesparse.tolerance import check_bitwise, check_close

SCHEMES = ["int8", "fp8", "bf16", "fp16", "nvfp4"]
N, K = 48, 96


def layer_of(scheme: str, dtype: torch.dtype = DTYPE, route: str | None = None, n: int = N, k: int = K) -> SlideSparseLinear:
    """A layer whose rows have very different scales, with a bias that is trained."""
    pattern = Pattern(6, 8, unit=2 if scheme == "nvfp4" else 1)
    weight = pruning.prune(torch.randn(n, k) * torch.logspace(-2, 1, n).view(-1, 1), pattern)
    layer = SlideSparseLinear.from_dense(weight, torch.randn(n).to(dtype), pattern=pattern, scheme=scheme)
    layer.bias.requires_grad_()
    layer.route = route
    return layer


def check_gradients(layer: SlideSparseLinear, x: Tensor, y: Tensor) -> None:
    """Send a fresh gradient back from ``y = layer(x)`` and hold what arrives to the tolerance policy."""
    grad = tokens(y[..., 0].numel(), y.shape[-1], y.dtype).view_as(y).to(y.device)
    weight = layer.dense_weight().double()
    y.backward(grad)
    assert x.grad.shape == x.shape and x.grad.dtype == x.dtype
    with torch.autocast(x.device.type, enabled=False):
        check_close(x.grad, grad.double() @ weight, grad @ weight.to(x.dtype))
    rows = grad.view(-1, y.shape[-1])
    check_close(layer.bias.grad, rows.double().sum(0), rows.float().sum(0).to(layer.bias.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("route", [None, "packed", "packed:exact64"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_of_the_input_is_that_of_the_weights_that_run(scheme: str, route: str | None, dtype: torch.dtype) -> None:
    layer = layer_of(scheme, dtype, route)
    for m in (1, 7, 40):
        x = tokens(m, K, dtype).requires_grad_()
        y = layer(x)
        check_bitwise(y.detach(), layer(x.detach()))
        layer.bias.grad = None
        check_gradients(layer, x, y)


@pytest.mark.parametrize(
    ("scheme", "route"),
    [("int8", "slid"), ("int8", "dense:triton"), ("fp8", "slid:cusparselt:exact"), ("fp8", "dense:rowwise"), ("bf16", "slid")],
)
def test_routes_of_a_card_have_the_same_gradient(scheme: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched past the dispatcher, played by torch."""
    stand_ins.pretend_a_card(monkeypatch)
    layer = layer_of(scheme, route=route)
    for _ in range(2):
        x = tokens(5, K).requires_grad_()
        layer.bias.grad = None
        check_gradients(layer, x, layer(x))
        assert x.grad.abs().sum() > 0


@pytest.mark.needs_gpu
@pytest.mark.parametrize(
    ("scheme", "route", "how"),
    [
        *((scheme, None, how) for scheme in SCHEMES for how in ("eager", "compiled", "lean")),
        *(
            (*row, how)
            for row in (
                ("int8", "slid"), ("int8", "dense:triton"), ("fp8", "slid:cusparselt:exact"), ("fp8", "dense:tensorwise"), ("bf16", "slid")
            )
            for how in ("eager", "compiled")
        ),
    ],
)  # fmt: skip
def test_gradients_on_a_gpu(scheme: str, route: str | None, how: str) -> None:
    layer = layer_of(scheme, route=route, n=272, k=528).cuda()
    layer.memory = "lean" if how == "lean" else "fast"
    torch.compiler.reset()  # or the layers of all tests count as one that is compiled too often
    run = torch.compile(layer, fullgraph=True) if how == "compiled" else layer
    for m in (1, 63, 1000):
        x = tokens(m, 528).cuda().requires_grad_()
        layer.bias.grad = None
        try:
            y = run(x)
        except UnsupportedError as error:
            if "nvmath" not in str(error):
                raise
            pytest.skip(str(error))
        check_gradients(layer, x, y)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_leading_dimensions_strides_and_no_token_at_all(scheme: str) -> None:
    layer = layer_of(scheme)
    x = tokens(2 * 3 * 5, K).view(2, 3, 5, K).transpose(0, 2).requires_grad_()
    check_gradients(layer, x, layer(x))
    empty = torch.zeros(0, K, dtype=DTYPE, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == (0, K)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_layers_have_the_gradients_of_eager_ones(scheme: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(layer_of(scheme), nn.SiLU(), layer_of(scheme, n=K, k=N))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for m in (3, 9):
        found, fresh = [], tokens(m, K)
        for run in (model, compiled):
            x = fresh.clone().requires_grad_()
            model.zero_grad()
            y = run(x)
            y.square().mean().backward()
            found.append((y.detach(), x.grad, model[0].bias.grad, model[2].bias.grad))
        for eager, traced in zip(*found, strict=True):
            assert eager.abs().sum() > 0
            check_bitwise(traced, eager)


def test_only_what_is_asked_for_is_computed_and_without_gradients_there_is_no_graph() -> None:
    layer, x = layer_of("int8"), tokens(3, K)
    y = layer(x)
    y.sum().backward()
    check_bitwise(layer.bias.grad, torch.full_like(layer.bias, 3.0))
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert layer(x.clone().requires_grad_()).grad_fn is None
    assert layer(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_restored_for_a_gradient_and_not_kept(scheme: str) -> None:
    layer, x = layer_of(scheme, torch.float32), tokens(3, K).requires_grad_()
    layer.memory = "lean"
    layer(x).sum().backward()
    assert layer.resident_bytes == 0
    layer.memory = "fast"
    layer(x)
    held = layer.resident_bytes
    torch.compile(layer, backend="aot_eager")(x).sum().backward()
    layer(x).sum().backward()
    assert layer.resident_bytes == held


@pytest.mark.parametrize("route", [None, "packed"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_graph_keeps_the_weights_that_ran(scheme: str, route: str | None) -> None:
    layer, other, x = layer_of(scheme, route=route), layer_of(scheme), tokens(3, K).requires_grad_()
    before, y = layer.dense_weight().double(), layer(x)
    for name, tensor in other.named_buffers():
        setattr(layer, name, tensor)
    layer(x)
    grad = torch.randn(3, N).to(DTYPE)
    y.backward(grad)
    check_close(x.grad, grad.double() @ before, grad @ before.to(DTYPE))


@pytest.mark.parametrize("route", [None, "packed"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_were_written_into_give_no_gradient(scheme: str, route: str | None) -> None:
    layer, x = layer_of(scheme, route=route), tokens(3, K).requires_grad_()
    y = layer(x)
    layer.load_state_dict(layer_of(scheme).state_dict())
    for again in (False, True):
        with pytest.raises(UnsupportedError, match=r"changed between a forward and its backward pass.*call backward first"):
            y.backward(torch.randn(3, N).to(DTYPE), retain_graph=True)
        assert x.grad is None
        if not again:
            layer(x)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("change", ["load", "write", "replace"])
def test_a_compiled_graph_gives_no_gradient_of_other_weights(change: str, called: bool) -> None:
    layer, other, x = layer_of("int8"), layer_of("int8"), tokens(3, K).requires_grad_()
    run = torch.compile(layer, backend="aot_eager")
    y = run(x)
    if change == "load":
        layer.load_state_dict(other.state_dict())
    elif change == "write":
        layer.weight_scale.mul_(2)
    else:
        layer.weight_scale = layer.weight_scale * 2
    if called:
        run(x.detach())
    with pytest.raises((RuntimeError, UnsupportedError), match=r"modified by an inplace operation|weights were changed"):
        y.sum().backward()
    assert x.grad is None
    run(x).sum().backward()
    assert x.grad is not None


def test_checkpointed_layers_and_layers_under_autocast_have_gradients() -> None:
    layer, x = layer_of("int8", torch.float32), tokens(4, K, torch.float32).requires_grad_()
    check_gradients(layer, x, checkpoint(layer, x, use_reentrant=False))
    x.grad = layer.bias.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_gradients(layer, x, layer(x))


def test_functional_gradients_are_the_same() -> None:
    layer, x = layer_of("int8"), tokens(4, K)
    check_bitwise(torch.func.grad(lambda x: layer(x).sum())(x), torch.autograd.grad(layer(x.requires_grad_()).sum(), x)[0])


def test_gradients_of_a_shard_are_those_of_its_columns() -> None:
    shard = Shard.even(Pattern.parse("4:6"), 56, 1, 4)
    weight, scale = quantize_weight(pruning.prune(torch.randn(16, shard.columns), shard.pattern, offset=shard.offset), "int8")
    owner, runner = nn.Module(), Runner(Weights(shard.pack(weight), layer_of("int8").scheme, scale))
    name = op.handle(owner, lambda dtype, device: runner, shard.margins)
    x, grad, dense = tokens(3, 14).requires_grad_(), tokens(3, 16), weight.double() * scale.double()
    for call in (op.linear, torch.ops.slidesparse.linear_with_gradient):
        x.grad = None
        call(x, name, None, 16).backward(grad)
        check_close(x.grad, grad.double() @ dense, grad @ dense.to(DTYPE))


def test_the_op_with_gradients_keeps_the_rules_of_its_library() -> None:
    layer = layer_of("int8")
    for bias in (None, layer.bias):
        torch.library.opcheck(torch.ops.slidesparse.linear_with_gradient, (tokens(3, K).requires_grad_(), layer._named, bias, N))


def test_what_would_need_another_gradient_is_refused() -> None:
    layer, x = layer_of("bf16"), tokens(3, K).requires_grad_()
    layer.name = "model.layers.3.up"
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    layer(x)
    layer.weight_values.requires_grad_()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(UnsupportedError, match=r"layer model\.layers\.3\.up: packed weights take no gradient"):
            layer(x)
    layer.weight_values.requires_grad_(False)
    assert layer(x).requires_grad
    scaled = layer_of("int8")
    scaled(x)
    scaled.weight_scale.requires_grad_()
    with pytest.raises(UnsupportedError, match="weight_scale"):
        torch.compile(scaled, backend="aot_eager")(x)


def gated(x: Tensor) -> object:
    layer = layer_of("int8")
    return op.silu_mul_linear(torch.cat((x, x), 1), layer._named, None, N)


def restored(x: Tensor) -> object:
    packed = pack(pruning.prune(x.detach(), Pattern(6, 8)), Pattern(6, 8))
    return ops.restore(replace(packed, values=packed.values.requires_grad_(x.requires_grad)))


PARTS: dict[str, Callable[[Tensor], object]] = {
    "silu_mul_linear": gated,
    "quantize": lambda x: ops.quantize(x, scheme_named("int8")),
    "lift": lambda x: ops.lift(x, Pattern(6, 8)),
    "restore": restored,
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_linear_refuse_rather_than_pass_a_wrong_gradient(part: str) -> None:
    x = tokens(8, K)
    PARTS[part](x)
    with torch.no_grad():
        PARTS[part](x.clone().requires_grad_())
    with pytest.raises(UnsupportedError, match="passes no gradient"):
        PARTS[part](x.clone().requires_grad_())
