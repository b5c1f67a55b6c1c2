"""Layers that no plan makes faster are vLLM's own, and vLLM's product takes part in plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from plans import HERE, at, plan_of, problem_of, times

vllm = pytest.importorskip("vllm", reason="vllm is not installed: pip install 'slidesparse[vllm]'")

from vllm.config import VllmConfig  # noqa: E402
from vllm.model_executor.layers import linear as layers  # noqa: E402

from slidesparse import reference  # noqa: E402
from slidesparse.format import SCHEMES, PackedConfig  # noqa: E402
from slidesparse.gemm import Plan, Problem, Route, Runner, Weights, use_plan  # noqa: E402
from slidesparse.gemm.kernels import refusal  # noqa: E402
from slidesparse.gemm.tune import LinearShape, tune  # noqa: E402
from slidesparse.integrations import vllm as adapter  # noqa: E402
from slidesparse.integrations.engine.policy import Decision  # noqa: E402
from slidesparse.integrations.vllm import dense, methods  # noqa: E402
from slidesparse.integrations.vllm_facts import KERNEL  # noqa: E402
from slidesparse.packing import pack  # noqa: E402
from slidesparse.pattern import Pattern  # noqa: E402
from slidesparse.pruning import prune  # noqa: E402
from slidesparse.quantization import quantize_weight  # noqa: E402
from slidesparse.tolerance import check_bitwise  # noqa: E402
from vllm_layers import alone, config_of, load, part  # noqa: E402

PATTERN, DTYPE, KEY = Pattern(6, 8), torch.bfloat16, (256, 512, "6:8", "int8")


@pytest.fixture
def config(tmp_path: Path, rank: Callable, bfloat16: None) -> Iterator[VllmConfig]:
    """A model's configuration, in force, on a rank that is alone."""
    with alone(tmp_path, rank) as made:
        yield made


def weights(n: int, k: int, scheme: str) -> tuple[Tensor, Tensor | None]:
    return quantize_weight(prune(torch.randn(n, k).to(DTYPE) * k**-0.5, PATTERN), SCHEMES[scheme])


def packed_layer(weight: Tensor, scale: Tensor | None, bias: Tensor, scheme: str) -> nn.Module:
    made = adapter.SlideSparseConfig.from_config(PackedConfig(PATTERN, SCHEMES[scheme], ["lm_head"]).to_dict())
    layer = layers.ColumnParallelLinear(weight.shape[1], weight.shape[0], bias=True, quant_config=made, prefix="m.up_proj")
    stored = pack(weight, PATTERN)
    tensors = {"weight_values": stored.values, "weight_keep": stored.keep, "bias": bias}
    for name, tensor in (tensors if scale is None else tensors | {"weight_scale": scale}).items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def test_a_layer_gives_its_packed_weights_up_unless_they_are_read(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(methods, "Runner", lambda *arguments, **rest: made.append(Runner(*arguments, **rest)) or made[-1])
    for memory, gone in (("fast", True), ("lean", False)):
        monkeypatch.setattr(methods.Settings, "current", classmethod(lambda cls, memory=memory: methods.Settings(memory=memory)))
        packed_layer(*weights(16, 32, "int8"), torch.randn(16), "int8")
        assert made[-1].weights.packed.values.is_meta == gone == (made[-1].resident_bytes > 0)


def test_a_16_bit_layer_given_back_is_an_ordinary_linear(config: VllmConfig) -> None:
    layer = layers.ColumnParallelLinear(32, 16, bias=False, prefix="m.up_proj")
    weight, _ = weights(16, 32, "bf16")
    apply = dense.give_back(layer, SCHEMES["bf16"], weight, None)
    x = torch.randn(5, 32)
    check_bitwise(apply(layer, x, None).detach(), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize(
    ("n", "k", "scheme", "dtype", "card", "bias", "told"),
    [
        (64, 64, "bf16", DTYPE, (9, 0), None, "int8 and fp8"),
        (64, 64, "int8", DTYPE, (0, 0), None, "on CUDA"),
        (64, 64, "int8", torch.float32, (9, 0), None, "16-bit output"),
        (64, 64, "int8", DTYPE, (9, 0), torch.float16, "bias of its type"),
        (60, 64, "int8", DTYPE, (9, 0), None, "multiples of 16"),
    ],
)
def test_vllms_kernel_says_why_it_cannot_run(n, k, scheme, dtype, card, bias, told, config: VllmConfig) -> None:
    problem = Problem(n, k, PATTERN, SCHEMES[scheme], card, dtype, bias)
    for layout in ("dense", "packed"):
        assert told in refusal(Route(layout, KERNEL), problem)


@pytest.mark.parametrize(
    ("slid", "swiglu", "most", "ours"), [(50, False, 77, True), (200, False, 77, False), (200, True, 77, True), (50, False, 8, False)]
)
def test_the_plan_in_force_decides_with_what_vllm_has_here(slid, swiglu, most, ours, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {Route("slid", "cusparselt", "alg=9"): times(dense=1)[Route("dense", "triton")]}
    cells = {8: times(dense_cutlass=100, slid=120) | absent, 64: times(dense_cutlass=100, slid=slid) | absent}
    monkeypatch.setattr(dense, "cannot_run", lambda plan, problem: frozenset({Route("slid", "cusparselt", "alg=9")}))
    use_plan(plan_of(KEY, cells))
    try:
        found = dense.decided(problem_of(KEY), most=most, swiglu=swiglu)
        unmeasured = dense.decided(problem_of((256, 512, "6:8", "bf16")), most=most, swiglu=False)
        use_plan(Plan(HERE))
        assert "nothing was measured: run `slidesparse tune --vllm`" in dense.decided(problem_of(KEY), most=77, swiglu=True).why
    finally:
        use_plan(None)
    assert (found.why is None) == ours and "nothing was measured" in unmeasured.why
    if ours:
        assert {str(route) for _, route in found.steps} == {"dense:cutlass" if swiglu else "slid:cusparselt:alg=1"}


def test_settings_reach_the_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, object] = {}
    monkeypatch.setattr(methods, "decided", lambda problem, **rest: told.update(rest) or Decision("the test says so"))
    monkeypatch.setattr(methods, "can_give_back", lambda *_: True)
    method = methods.PackedLinearMethod.__new__(methods.PackedLinearMethod)
    method.scheme, method.settings = SCHEMES["int8"], methods.Settings(most=77)
    assert method._decision(None, torch.device("cuda"), False).why == "the test says so"
    assert told == {"most": 77, "swiglu": False}
    for settings in (methods.Settings(route="dense"), methods.Settings(memory="lean")):
        method.settings = settings
        assert method._decision(None, torch.device("cuda"), False) == Decision(None), "the user has chosen how it runs"


def test_what_a_decision_names_runs(config: VllmConfig, compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan that comes with it chooses the routes, as on a card, by kernels that run anywhere."""
    cells = {m: times(packed_exact=1, dense_exact=2) for m in (1, 16)}
    monkeypatch.setattr(methods, "can_give_back", lambda *_: True)
    monkeypatch.setattr(methods, "decided", lambda problem, **_: Decision(None, plan_of(KEY, cells)))
    monkeypatch.setattr(Problem, "cuda", property(lambda problem: True))
    made = []
    monkeypatch.setattr(methods, "Runner", lambda *arguments, **rest: made.append(Runner(*arguments, **rest)) or made[-1])
    packed_layer(*weights(256, 512, "int8"), torch.randn(256), "int8")
    assert [str(route) for _, route in made[0].routes] == ["packed:exact"] and made[0].resident_bytes == 0


@pytest.mark.parametrize(
    ("scheme", "card", "can"),
    [("int8", (8, 6), True), ("int8", (10, 0), False), ("fp8", (8, 6), False), ("fp8", (10, 0), True), ("bf16", (12, 0), True)],
)
def test_only_what_vllm_multiplies_on_the_card_is_given_back(scheme, card, can, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense.ops, "capability", lambda device: card)
    assert dense.can_give_back(SCHEMES[scheme], torch.device("cuda")) == can
    assert not dense.can_give_back(SCHEMES[scheme], torch.device("cpu"))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_a_cut_shard_is_given_back_as_the_ranks_own_columns(form: str, scheme: str, rank: Callable, bfloat16: None, monkeypatch) -> None:
    given = []
    monkeypatch.setattr(methods, "can_give_back", lambda *_: True)
    monkeypatch.setattr(methods, "give_back", lambda layer, scheme, weight, scale: given.append((weight, scale)) or (lambda *_: weight))
    one = part(8, 56, SCHEMES[scheme], "4:6")
    for number in range(4):
        rank(number, 4)
        ragged = {"in_features": {"a.down_proj": 56}} if form == "packed" else {}
        layer = layers.RowParallelLinear(56, 8, bias=False, quant_config=config_of(form, scheme, "4:6", **ragged), prefix="a.down_proj")
        load(layer, {None: one}, form)
        weight, scale = given.pop()
        check_bitwise(weight, one.weight[:, number * 14 : (number + 1) * 14])
        assert weight.is_contiguous() and not hasattr(layer, "slidesparse_name")
        if scale is not None:
            check_bitwise(scale, one.scale)


@pytest.fixture
def untuned() -> None:
    if torch.cuda.is_available():
        use_plan(Plan(HERE))
    yield
    use_plan(None)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_an_untuned_layer_is_what_vllm_makes_of_the_dense_checkpoint(scheme: str, config: VllmConfig, untuned: None) -> None:
    weight, scale = weights(256, 512, scheme)
    bias = torch.randn(256).to(DTYPE)
    with torch.device("cuda"):
        layer = packed_layer(weight, scale, bias, scheme)
        stock = layers.ColumnParallelLinear(512, 256, bias=True, prefix="m.up_proj")
        apply = dense.give_back(stock, SCHEMES[scheme], weight.cuda(), None if scale is None else scale.cuda())
    assert layer.quant_method.stock is not None and not hasattr(layer, "slidesparse_name")
    for m in (1, 7, 64, 300):
        x = torch.randn(m, 512).cuda()
        y, real = layer(x)[0].detach(), weight.float() * (1 if scale is None else scale)
        exact = torch.nn.functional.linear(x.float(), real.cuda(), bias.float().cuda())
        check_bitwise(y, apply(stock, x, bias.cuda()).detach())
        assert float((y - exact).norm() / exact.norm()) < (0.05 if scheme == "fp8" else 0.02)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_vllms_product_is_timed_and_runs_where_a_plan_chose_it(scheme: str, config: VllmConfig, tmp_path: Path) -> None:
    plan = tune([LinearShape(256, 512, PATTERN, SCHEMES[scheme])], tmp_path / "plan.json", ms=[16, 256])
    (cells,) = plan.cells.values()
    route = Route("dense", KERNEL)
    assert all(route in cell.times for cell in cells.values())
    weight, scale = weights(256, 512, scheme)
    runner = Runner(Weights(pack(weight.cuda(), PATTERN), SCHEMES[scheme], scale.cuda()), route=str(route))
    x = torch.randn(33, 512).cuda()
    exact = x.float() @ (weight.float() * scale).cuda().t()
    assert float((runner(x) - exact).norm() / exact.norm()) < 0.05


@pytest.mark.needs_gpu
def test_a_layer_that_pays_is_ours(config: VllmConfig) -> None:
    cells = {m: times(dense=100, dense_cutlass=100) | {Route("slid", "cusparselt", "default"): at(50)} for m in (1, 256)}
    use_plan(plan_of(KEY, cells))
    try:
        weight, scale = weights(256, 512, "int8")
        with torch.device("cuda"):
            layer = packed_layer(weight, scale, torch.zeros(256), "int8")
    finally:
        use_plan(None)
    assert layer.quant_method.stock is None
    for m in (3, 300):
        x = torch.randn(m, 512).cuda()
        q, x_scale = reference.quantize(x.cpu(), SCHEMES["int8"])
        exact = reference.linear(q, x_scale, weight, scale, None, torch.float64)
        assert float((layer(x)[0].cpu() - exact).norm() / exact.norm()) < 0.005
