"""The packed linear and the call that swaps it in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from slidesparse import nn as packed_nn
from slidesparse import reference
from slidesparse.errors import PatternError, UnsupportedError, WeightError
from slidesparse.format import SCHEMES, packed_tensors
from slidesparse.nn import SlideSparseLinear, pack_model, packing_report
from slidesparse.packing import pack
from slidesparse.pattern import Pattern
from slidesparse.pruning import prune
from slidesparse.tolerance import check_bitwise

SIX_EIGHT = Pattern(6, 8)


def masked(n: int, k: int, dtype: torch.dtype = torch.bfloat16, pattern: Pattern = SIX_EIGHT) -> torch.Tensor:
    return prune(torch.randn(n, k).to(dtype), pattern)


def masked_linear(k: int, n: int, bias: bool = True, dtype: torch.dtype = torch.bfloat16, pattern: Pattern = SIX_EIGHT) -> nn.Linear:
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    linear.weight.data = masked(n, k, dtype, pattern)
    return linear


class Block(nn.Module):
    """Two linears, a head, and one that is tied to an embedding."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, pattern: Pattern = SIX_EIGHT) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 32).to(dtype)
        self.up = masked_linear(32, 44, dtype=dtype, pattern=pattern)
        self.down = masked_linear(44, 32, bias=False, dtype=dtype, pattern=pattern)
        self.lm_head = nn.Linear(32, 12, bias=False).to(dtype)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("scheme", ["bf16", "fp16", "int8", "fp8", "nvfp4"])
def test_state_is_the_stored_form(scheme: str) -> None:
    pattern = Pattern(6, 8, unit=2) if scheme == "nvfp4" else SIX_EIGHT
    layer = SlideSparseLinear(48, 20, pattern=pattern, scheme=scheme, dtype=torch.bfloat16)
    state = layer.state_dict()
    for spec in packed_tensors(SCHEMES[scheme], pattern, 20, 48):
        assert state[spec.suffix].dtype == spec.dtype and tuple(state.pop(spec.suffix).shape) == spec.shape
    assert list(state) == ["bias"] and state["bias"].dtype == torch.bfloat16
    with pytest.raises(WeightError, match="keep-bits"):
        layer(torch.randn(1, 48))
    weight = masked(20, 48, pattern=pattern)
    source = SlideSparseLinear.from_dense(weight, torch.randn(20).to(torch.bfloat16), pattern=pattern, scheme=scheme)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 48)
    check_bitwise(layer(x), source(x))
    source_again = SlideSparseLinear.from_dense(masked(20, 48, pattern=pattern), pattern=pattern, scheme=scheme)
    layer.load_state_dict({**source_again.state_dict(), "bias": torch.zeros(20)})
    assert layer.resident_bytes == 0
    check_bitwise(layer(x), source_again(x))


@pytest.mark.parametrize("scheme", ["bf16", "fp16", "int8", "fp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward_takes_any_leading_dimensions(scheme: str, dtype: torch.dtype) -> None:
    pattern = Pattern(6, 8, unit=2) if scheme == "nvfp4" else SIX_EIGHT
    weight, bias = masked(24, 48, pattern=pattern), torch.randn(24).to(dtype)
    layer = SlideSparseLinear.from_dense(weight, bias, pattern=pattern, scheme=scheme)
    x = torch.randn(2, 3, 5, 48).to(dtype)
    y = layer(x)
    assert y.shape == (2, 3, 5, 24) and y.dtype == dtype
    dense = torch.nn.functional.linear(x.double(), layer.dense_weight().double(), bias.double())
    bound = 0.02 if scheme == "int8" else 0.06 if scheme == "fp8" else 0.01
    assert (y.double() - dense).abs().max() <= bound * dense.abs().max()
    check_bitwise(layer(x[0, 0, 0]), layer(x[0, 0, :1])[0])
    assert layer(x[:0]).shape == (0, 3, 5, 24)
    # A view with other strides.
    check_bitwise(layer(x.transpose(0, 2)), layer(x.transpose(0, 2).contiguous()))


def test_int8_is_the_oracle() -> None:
    weight, bias = masked(30, 100), torch.randn(30).to(torch.bfloat16)
    layer = SlideSparseLinear.from_dense(weight, bias, pattern="6:8", scheme="int8")
    x = torch.randn(9, 100).to(torch.bfloat16)
    (q, s), (w, ws) = reference.quantize(x, SCHEMES["int8"]), reference.quantize(weight, SCHEMES["int8"])
    check_bitwise(layer(x), reference.linear(q, s, w, ws, bias, torch.bfloat16))


def test_bf16_weights_in_a_float32_model_lose_nothing() -> None:
    weight = masked(16, 64)
    layer = SlideSparseLinear.from_dense(weight, torch.randn(16), pattern="6:8", scheme="bf16")
    x = torch.randn(5, 64)
    out, exact = layer(x), x.double() @ weight.double().t() + layer.bias.double()
    assert (out.double() - exact).abs().max() < 1e-5
    # A bfloat16 input with a float32 bias: summed in float32, rounded once.
    low = x.to(torch.bfloat16)
    once = (low.double() @ weight.double().t() + layer.bias.double()).to(torch.bfloat16)
    assert (layer(low) != once).sum() <= 1


def test_casts_move_but_never_change_what_is_stored() -> None:
    for scheme in ("bf16", "fp8", "int8"):
        layer = SlideSparseLinear.from_dense(masked(8, 32), torch.randn(8).to(torch.bfloat16), pattern="6:8", scheme=scheme)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        x = torch.randn(2, 32)
        y = layer(x)
        for change in (torch.nn.Module.half, torch.nn.Module.float, lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")):
            change(layer)
            for name in set(before) - {"bias"}:
                check_bitwise(layer.state_dict()[name], before[name])
        assert layer.bias.dtype == torch.bfloat16
        check_bitwise(layer(x), y)


def test_copies_and_pickles() -> None:
    layer = SlideSparseLinear.from_dense(masked(8, 32), pattern="6:8", scheme="int8")
    x = torch.randn(2, 32)
    y = layer(x)
    assert layer.resident_bytes == 8 * 32
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.resident_bytes == 0 and twin.weight_values is not layer.weight_values
        check_bitwise(twin(x), y)
    lean = SlideSparseLinear.from_dense(masked(8, 32), pattern="6:8", scheme="int8", memory="lean")
    lean(x)
    assert lean.resident_bytes == 0


def test_replaced_buffers_are_noticed() -> None:
    layer = SlideSparseLinear.from_dense(masked(8, 32), pattern="6:8", scheme="bf16")
    x = torch.randn(2, 32)
    layer(x)
    other = pack(masked(8, 32), SIX_EIGHT)
    layer.weight_values, layer.weight_keep = other.values, other.keep
    assert torch.allclose(layer(x), x @ reference.restore(other).float().t(), atol=1e-5)
    layer.weight_values = -other.values
    assert torch.allclose(layer(x), -x @ reference.restore(other).float().t(), atol=1e-5)


def test_compiles() -> None:
    layer = SlideSparseLinear.from_dense(masked(8, 32), torch.randn(8), pattern="6:8", scheme="int8")
    x = torch.randn(4, 32)
    compiled = torch.compile(layer, backend="aot_eager")
    check_bitwise(compiled(x), layer(x))
    check_bitwise(compiled(x[:3]), layer(x[:3]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "nvfp4"])
def test_traces(scheme: str) -> None:
    pattern = Pattern(6, 8, unit=2) if scheme == "nvfp4" else SIX_EIGHT
    layers = [SlideSparseLinear.from_dense(masked(32, 32, pattern=pattern), torch.randn(32), pattern=pattern, scheme=scheme) for _ in "ab"]
    model = nn.Sequential(layers[0], nn.SiLU(), layers[1])
    traced = torch.jit.trace(model, torch.randn(2, 3, 32))
    for shape in ((2, 3, 32), (4, 5, 32)):
        x = torch.randn(shape)
        check_bitwise(traced(x), model(x))
    assert str(traced.inlined_graph).count("slidesparse::linear") == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda layer: layer.weight_keep.__setitem__((3, 0), layer.weight_keep[3, 0] ^ 1), "row 3, group 0"),
        (lambda layer: layer.weight_scale.__setitem__((2, 0), float("nan")), "row 2 holds nan"),
        (lambda layer: layer.weight_scale.__setitem__((2, 0), -1.0), "row 2"),
        (lambda layer: layer._buffers.__setitem__("weight_values", layer.weight_values[:, :-1]), r"weight_values is .*\[8, 23\]"),
        (lambda layer: layer._buffers.__setitem__("weight_scale", layer.weight_scale.half()), "weight_scale is torch.float16"),
    ],
)
def test_damaged_tensors_are_found_before_use(damage, message: str) -> None:
    layer = SlideSparseLinear.from_dense(masked(8, 32), pattern="6:8", scheme="int8")
    layer.name = "model.layers.3.up"
    damage(layer)
    with pytest.raises(WeightError, match=f"layer model.layers.3.up: .*{message}"):
        layer(torch.randn(1, 32))


def test_bad_arguments_are_refused() -> None:
    layer = SlideSparseLinear.from_dense(masked(8, 32), pattern="6:8", scheme="bf16")
    with pytest.raises(ValueError, match="31 features"):
        layer(torch.randn(1, 31))
    with pytest.raises(ValueError, match="int64"):
        layer(torch.ones(1, 32).long())
    with pytest.raises(ValueError, match="bf17"):
        SlideSparseLinear(32, 8, pattern="6:8", scheme="bf17")
    with pytest.raises(ValueError, match="multiple of 16"):
        SlideSparseLinear(24, 8, pattern="6:8x2", scheme="nvfp4")
    with pytest.raises(PatternError, match="row 0, group 0"):
        SlideSparseLinear.from_dense(torch.ones(8, 32), pattern="6:8", scheme="int8")
    with pytest.raises(WeightError, match="scale"):
        SlideSparseLinear.from_dense(torch.ones(8, 32).to(torch.int8), pattern="6:8", scheme="int8")
    infinite = torch.zeros(8, 32)
    infinite[4, 5] = float("inf")
    with pytest.raises(WeightError, match="row 4, column 5 is inf"):
        SlideSparseLinear.from_dense(infinite, pattern="6:8", scheme="bf16")
    layer.route = "nowhere"
    with pytest.raises(UnsupportedError, match="nowhere"):
        layer(torch.randn(1, 32))
    assert layer.cpu().dense_weight().shape == (8, 32) and layer.routes == ()  # nothing of the refused route is left
    assert "pattern=6:8, scheme=bf16" in repr(layer)


def test_pack_model_detects_the_tightest_pattern() -> None:
    model = Block(pattern=Pattern(4, 6))
    model.up.weight.data = masked(44, 32)
    x = torch.randn(5, 32).to(torch.bfloat16)
    expected = model(x)
    assert pack_model(model) is model
    report = packing_report(model)
    assert {name: str(pattern) for name, (pattern, _) in report.packed.items()} == {"up": "6:8", "down": "4:6"}
    assert list(report.dense) == ["lm_head"] and isinstance(model.lm_head, nn.Linear)
    assert model.up.name == "up" and "6:8" in str(report)
    check_bitwise(model(x), expected)


def test_pack_model_with_a_pattern_is_all_or_nothing() -> None:
    model = Block()
    model.down.weight.data[7, 16:] = torch.arange(1.0, 29.0)
    with pytest.raises(PatternError, match=r"layer down: row 7, group 2 .*8 non-zero") as caught:
        pack_model(model, pattern="6:8")
    assert (caught.value.row, caught.value.group, caught.value.values) == (7, 2, tuple(range(1, 9)))
    assert type(model.up) is nn.Linear, "nothing was swapped"
    late = Block()
    late.down.weight.data[7, 0] = torch.nan
    with pytest.raises(WeightError, match=r"layer down: .*row 7, column 0 is nan"):
        pack_model(late)
    assert type(late.up) is nn.Linear, "nothing was swapped before the last layer was found wrong"
    pack_model(model)
    assert type(model.down) is nn.Linear and "obeys none" in packing_report(model).dense["down"]
    with pytest.raises(ValueError, match="not called"):
        packing_report(Block())


def test_pack_model_never_prunes() -> None:
    model = Block()
    model.up.weight.data.uniform_(1, 2)
    before = model.up.weight.clone()
    pack_model(model)
    check_bitwise(model.up.weight.data, before.data)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp16", "nvfp4"])
def test_pack_model_quantises_when_asked(scheme: str) -> None:
    pattern = Pattern(6, 8, unit=2) if scheme == "nvfp4" else SIX_EIGHT
    model = nn.Sequential(masked_linear(32, 48, pattern=pattern))
    weight, x = model[0].weight.data.clone(), torch.randn(6, 32).to(torch.bfloat16)
    expected = model(x)
    pack_model(model, scheme=scheme)
    layer = model[0]
    assert layer.scheme.name == scheme and layer.pattern == pattern
    assert ((layer.dense_weight() == 0) | (weight != 0)).all(), "zeros stay zero"
    assert (layer(x) - expected).float().norm() < (0.15 if scheme == "nvfp4" else 0.05) * expected.float().norm()


def test_float32_needs_a_scheme() -> None:
    model = Block(dtype=torch.float32)
    pack_model(model)
    assert "scheme" in packing_report(model).dense["up"]
    with pytest.raises(WeightError, match=r"layer up: .*scheme='bf16'"):
        pack_model(model, pattern="6:8")
    pack_model(model, pattern="6:8", scheme="bf16")
    assert isinstance(model.up, SlideSparseLinear) and model(torch.randn(2, 32)).dtype == torch.float32


def test_pack_model_leaves_alone_what_it_would_break() -> None:
    class Special(nn.Linear):
        pass

    model = Block()
    model.special = Special(32, 8).to(torch.bfloat16)
    model.hooked, model.again = masked_linear(32, 8), model.up
    model.hooked.register_forward_hook(lambda *a: None)
    model.watched, model.left = masked_linear(32, 8), masked_linear(32, 8)
    model.watched.register_forward_pre_hook(lambda *a: None)
    pack_model(model, ignore=("le*",))
    dense = packing_report(model).dense
    assert "Special" in dense["special"] and "hooks" in dense["hooked"] and "shares" in dense["lm_head"]
    assert "hooks" in dense["watched"] and dense["left"] == "ignored" and type(model.left) is type(model.watched) is nn.Linear
    assert model.again is model.up and isinstance(model.up, SlideSparseLinear), "one layer under two names stays one"
    with pytest.raises(ValueError, match="from_dense"):
        pack_model(masked_linear(32, 8))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("shape", ["channel", "flat", "tensor"])
def test_pack_model_takes_quantised_linears(scheme: str, shape: str) -> None:
    linear = masked_linear(64, 24)
    values, scale = reference.quantize(linear.weight.data, SCHEMES[scheme])
    scale = {"channel": scale.to(torch.bfloat16), "flat": scale.flatten(), "tensor": scale[:1, 0]}[shape]
    linear.weight = nn.Parameter(values, requires_grad=False)
    linear.weight_scale = nn.Parameter(scale, requires_grad=False)
    model = nn.Sequential(linear)
    pack_model(model, pattern="6:8")
    x = torch.randn(3, 64).to(torch.bfloat16)
    q, s = reference.quantize(x, SCHEMES[scheme])
    expected = reference.linear(q, s, values, scale.float().expand(24) if shape == "tensor" else scale, linear.bias, torch.bfloat16)
    if scheme == "int8":
        check_bitwise(model(x), expected)
    assert (model(x).float() - expected.float()).abs().max() <= 0.01 * expected.float().abs().max()


def test_quantised_linears_that_mean_something_else_stay_dense() -> None:
    def quantised(**changes: object) -> nn.Sequential:
        linear = nn.Linear(64, 24)
        values, scale = reference.quantize(masked(24, 64), SCHEMES["int8"])
        linear.weight = nn.Parameter(values, requires_grad=False)
        linear.weight_scale = scale
        for name, value in changes.items():
            setattr(linear, name, value)
        return nn.Sequential(linear)

    for changes, reason in [
        ({"weight_scale": torch.ones(24, 4)}, "scales"),
        ({"weight_scale": None}, "without a scale"),
        ({"weight_zero_point": torch.ones(24, 1)}, "zero points"),
    ]:
        model = quantised(**changes)
        pack_model(model)
        assert reason in packing_report(model).dense["0"]
        with pytest.raises(WeightError, match=reason):
            pack_model(quantised(**changes), pattern="6:8")
    with pytest.raises(WeightError, match="already quantised"):
        pack_model(quantised(), pattern="6:8", scheme="fp8")
    with pytest.raises(WeightError, match=r"layer 0: .*row 3"):
        pack_model(quantised(weight_scale=torch.ones(24).index_fill(0, torch.tensor(3), float("nan"))))


def test_moving_to_where_it_is_keeps_what_was_made() -> None:
    layer = SlideSparseLinear.from_dense(masked(8, 32), torch.randn(8), pattern="6:8", scheme="int8")
    x = torch.randn(4, 32)
    expected = layer(x)
    made = layer._runner.ready
    layer.to("cpu")
    assert layer._runner.ready is made
    layer.half()
    assert layer.bias.dtype == torch.float16 and layer.weight_scale.dtype == torch.float32
    assert torch.allclose(layer.float()(x), expected, atol=0.01)
    layer.to("meta")
    assert layer._runner is None


def test_another_route_or_policy_counts_from_the_next_call() -> None:
    layer = SlideSparseLinear.from_dense(masked(8, 32), pattern="6:8", scheme="int8")
    x = torch.randn(4, 32)
    expected = layer(x)
    assert [str(route) for _, route in layer.routes] == ["dense:exact"] and layer.resident_bytes == 8 * 32
    layer.route = "packed:exact64"
    check_bitwise(layer(x), expected)
    assert [str(route) for _, route in layer.routes] == ["packed:exact64"] and layer.resident_bytes == 0
    layer.route, layer.memory = None, "lean"
    check_bitwise(layer(x), expected)
    assert [str(route) for _, route in layer.routes] == ["packed:exact"] and layer.resident_bytes == 0


def test_public_names() -> None:
    calls = {"pack_model", "packing_report", "place", "restore_model"}
    assert set(packed_nn.__all__) == {"PackingReport", "Placement", "SlideSparseLinear"} | calls


@pytest.mark.parametrize("scheme", ["int8", "bf16"])
@pytest.mark.parametrize("bias", [torch.zeros(1), torch.zeros(5), torch.zeros(8, 1), torch.zeros(8, device="meta")])
def test_a_bias_that_is_not_the_layers_is_refused(bias: torch.Tensor, scheme: str) -> None:
    layer = SlideSparseLinear.from_dense(prune(torch.randn(8, 16), SIX_EIGHT), torch.randn(16)[::2], pattern=SIX_EIGHT, scheme=scheme)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    layer(x)
    layer.bias = nn.Parameter(bias)
    with pytest.raises(ValueError, match=r"the layer takes a bias \[8\] on cpu, not \["):
        layer(x)
