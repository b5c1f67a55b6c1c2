"""Where steps wait for the host, layers of ours that are dense are multiplied by vLLM's own product, in graphs of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'slidesparse[vllm]'")

from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.layers.activation import SiluAndMul

from slidesparse import reference
from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan, active_plan, use_plan
from slidesparse.gemm.handover import RIVAL
from slidesparse.gemm.machine import Machine, kernels_hash
from slidesparse.integrations.vllm import dense, methods, register
from slidesparse.integrations.vllm.graph import compile_apart
from slidesparse.measure import Timing
from slidesparse.testing import check_bitwise
from test_vllm_fusion import K, N, check_near, graphs_of, made
from vllm_layers import config_of, load, model_config, part

pytestmark = pytest.mark.usefixtures("bfloat16")


@pytest.fixture
def waiting(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a plan by which steps of 513 to 1541 tokens wait for the host."""
    for name, found in (("fuses", True), ("behind_swiglu", True), ("waiting", (513, 1541))):
        monkeypatch.setattr(methods, name, lambda *arguments, found=found: found)
    monkeypatch.setattr(methods.SlideSparseLinearMethod, "_handed_over", lambda *arguments: (None, None))


@pytest.mark.parametrize(("tokens", "whose"), [((1, 512), "ours"), ((513, 1541), "vLLM's"), ((600, 600), "vLLM's"), ((1542, 8192), "ours"),
                                               ((1, 8192), "ours")])  # fmt: skip
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_while_steps_wait_for_the_host_the_product_is_vllms(scheme: str, tokens: tuple[int, int], whose: str, waiting: None) -> None:
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        down = made(layers.RowParallelLinear, N, K, scheme, True, "m.down_proj")
        x = torch.randn(19, 2 * K).mul(torch.logspace(-1, 1, 19).view(-1, 1)).bfloat16()
    x[3], x[5, 7] = 0, torch.nan

    def block(x: Tensor) -> Tensor:
        return down(SiluAndMul.forward_native(x))[0]

    torch._dynamo.mark_dynamic(x, 0)
    y, ops, found = graphs_of(block, x, tokens=tokens)
    assert (ops, found) == ((["slidesparse.silu_mul_sums.default"], 1) if whose == "ours" else (["vLLM's"], 0))
    with torch.inference_mode():
        expected = block(x)
    assert expected[5].isnan().all()
    assert y[5].isnan().all() if (scheme, whose) != ("int8", "vLLM's") else y[5].isfinite().all()  # as in vLLM's dense models
    check_near(y[:5], expected[:5])
    check_near(y[6:], expected[6:])


@pytest.fixture
def planned(compiled: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plan in which vLLM's product takes 120 µs at 1024 tokens and 240 at 2048, and a model in which SwiGLU stands in front."""
    for name, found in (("fuses", True), ("behind_swiglu", True), ("can_give_back", True)):
        monkeypatch.setattr(methods, name, lambda *arguments, found=found: found)
    monkeypatch.setattr(dense, "cannot_run", lambda plan, problem: frozenset())
    monkeypatch.setattr(dense, "refusal", lambda name, problem: None)
    plan = Plan(Machine("A card", "580", "13.0", "2.11.0", "3.6.0", "0.8.0", kernels_hash()))
    for m, us in ((16, 20.0), (1024, 120.0), (2048, 240.0)):
        times = {RIVAL: Timing(us, us, us)}
        plan.add((N, K, "6:8", "int8"), Cell(m, times, {}, times))
    use_plan(plan)
    yield
    use_plan(None)


@pytest.mark.parametrize(
    ("replayed", "most", "tokens"), [(0, 8192, (1, 1280)), (512, 8192, (513, 1280)), (512, 1000, (513, 1000)), (1232, 8192, None)]
)
def test_the_plan_says_for_how_many_tokens_steps_wait(replayed, most, tokens, planned: None, monkeypatch) -> None:
    monkeypatch.setattr(methods.Settings, "current", lambda: methods.Settings(replayed=replayed, most=most))
    down = made(layers.RowParallelLinear, N, K, "int8", True, "m.down_proj")
    assert down.slidesparse_waiting == tokens
    if tokens is not None:
        weight, scale, unit = (down.get_buffer(f"slidesparse_engine_{i}") for i in range(3))
        assert weight.shape == (K, N) and weight.dtype == torch.int8 and scale.shape == (N, 1) and unit.tolist() == [1]


def test_sparse_products_stay_and_what_helps_is_said(planned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(methods, "_say_graphs", told.append)
    made(layers.RowParallelLinear, N, K, "int8", True, "m.down_proj")
    assert not told
    monkeypatch.setattr(methods, "_sparse_beyond", lambda execution, tokens: True)
    assert made(layers.RowParallelLinear, N, K, "int8", True, "m.down_proj").slidesparse_waiting is None and told == [0]


def test_on_several_ranks_nothing_waits(planned: None, rank: Callable) -> None:
    rank(0, 2)
    down = layers.RowParallelLinear(
        2 * K, N, bias=False, reduce_results=False, quant_config=config_of("packed", "int8"), prefix="m.down_proj"
    )
    load(down, {None: part(N, 2 * K, SCHEMES["int8"])}, "packed")
    assert down.quant_method.opened and down.slidesparse_waiting is None


def test_where_no_swiglu_stands_in_front_nothing_waits(planned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "behind_swiglu", lambda *arguments: False)
    monkeypatch.setattr(methods.SlideSparseLinearMethod, "_handed_over", lambda *arguments: (None, active_plan().plan))
    assert made(layers.RowParallelLinear, N, K, "int8", True, "m.o_proj").slidesparse_waiting is None


@pytest.mark.parametrize(("mode", "replayed"), [("NONE", 0), ("PIECEWISE", 512), ("FULL_DECODE_ONLY", 0), ("FULL_AND_PIECEWISE", 512)])
def test_graphs_of_decoding_alone_replay_no_other_steps(mode: str, replayed: int, tmp_path: Path) -> None:
    register()
    config = model_config(tmp_path)
    config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
    config.compilation_config.cudagraph_capture_sizes = [1, 512]
    with set_current_vllm_config(config):
        assert methods.Settings.current().replayed == replayed


def test_graphs_are_compiled_apart(tmp_path: Path) -> None:
    register()
    one, other = model_config(tmp_path / "one"), model_config(tmp_path / "other")
    most = one.compilation_config.compile_ranges_endpoints[-1]
    compile_apart((one, None, other), 513, 1280)
    compile_apart((one,), 1, 1024)
    assert one.compilation_config.compile_ranges_endpoints == [512, 1024, 1280, most]
    assert other.compilation_config.compile_ranges_endpoints == [512, 1280, most]
    other.compilation_config.compile_ranges_endpoints = None  # of a configuration that is not made for an engine
    compile_apart((other,), 513, 1280)
    assert other.compilation_config.compile_ranges_endpoints is None


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_sums_by_vllms_product_are_the_oracles(scheme: str) -> None:
    """On a CPU, where divisions are exact, and a stand-in for vLLM's int8 kernel tells only that it is given what it takes."""
    of, stored = SCHEMES[scheme], part(N, K, SCHEMES[scheme])
    x = torch.randn(19, K).mul(torch.logspace(-3, 3, 19).view(-1, 1)).bfloat16()
    x[3], x[5, 7], x[7, 5] = 0, torch.nan, torch.inf
    unit = torch.ones(1)
    y, x_scale = dense.engine_sums(x.t().contiguous().t(), stored.weight.t(), stored.scale if scheme == "int8" else unit, unit)
    q, expected = reference.quantize(x, of)
    sums = (q.double() @ stored.weight.double().t()).float() * (stored.scale.view(1, -1) if scheme == "int8" else 1)
    # vLLM's int8 kernel has scales of its own for rows of zeros and poisoned ones.
    exact = x.isfinite().all(1) & (x != 0).any(1) if scheme == "int8" else ...
    check_bitwise(x_scale[exact], expected[exact])
    real = expected.isfinite().squeeze(1)
    check_bitwise(y[real], sums.bfloat16()[real])
    others = y.float() * x_scale
    assert (others[3] == 0).all() and not others[7].isfinite().any()
    assert others[5].isnan().all() if scheme == "fp8" else others[5].isfinite().all()
