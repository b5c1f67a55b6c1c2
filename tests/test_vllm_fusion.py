"""SwiGLU and norms in the product's op: the pass over compiled graphs, what it finds and what it leaves, and that numbers stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'slidesparse[vllm]'")

from vllm import ir
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

from slidesparse.format import SCHEMES
from slidesparse.integrations.vllm import fusion, register
from vllm_layers import config_of, load, model_config, part

pytestmark = pytest.mark.usefixtures("bfloat16")
N, K, LINEAR = 48, 96, "slidesparse.linear.default"


def made(kind: type, n: int, k: int, scheme: str, bias: bool, name: str) -> torch.nn.Module:
    ours = kind(k, n, bias=bias, quant_config=config_of("packed", scheme), prefix=name)
    load(ours, {None: part(n, k, SCHEMES[scheme], bias=bias)}, "packed")
    return ours


def check_near(y: Tensor, expected: Tensor, limit: float = 0.03) -> None:
    """The graph does not round everywhere that the layers do, and a quantised value may be the next one: 1/16 away in fp8."""
    error = (y.double() - expected.double()).norm() / expected.double().norm()
    assert error < limit, error


def ops_of(graph: torch.fx.Graph) -> list[str]:
    """The package's ops in a graph."""
    return [str(node.target) for node in graph.nodes if "slidesparse" in str(node.target)]


def fused(ops: list[str]) -> int:
    """How many of them take what stood in front of a product."""
    return sum(one.startswith(("slidesparse.silu_mul_linear", "slidesparse.add_rms_norm_linear")) for one in ops)


def graphs_of(run: Callable, *inputs: Tensor) -> tuple[object, list[str], int]:
    """What the compiled function returns, the ops that are left in its graph, and how many were found."""
    ops: list[str] = []

    class Look(fusion.FuseQuantisation):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            graph.lint()
            ops.extend(ops_of(graph))

    torch._dynamo.reset()
    settings = {"post_grad_custom_post_pass": Look(), "fx_graph_cache": False}
    with torch.inference_mode():
        found = torch.compile(run, fullgraph=True, options=settings)(*inputs)
    return found, ops, fused(ops)


@pytest.mark.parametrize(("first", "bias"), [(None, True), ("int8", False), ("fp8", True)])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_swiglu_block_is_two_ops(first: str | None, bias: bool, scheme: str, compiled: None) -> None:
    down = made(layers.RowParallelLinear, N, K, scheme, bias, "m.down_proj")
    up = None if first is None else made(layers.ColumnParallelLinear, 2 * K, N, first, False, "m.gate_up_proj")

    def block(x: Tensor) -> Tensor:
        gate_up = x if up is None else up(x)[0]
        return down(SiluAndMul.forward_native(gate_up))[0]

    x = torch.randn(19, 2 * K if up is None else N).mul(torch.logspace(-1, 1, 19).view(-1, 1)).bfloat16()
    torch._dynamo.mark_dynamic(x, 0)
    y, ops, found = graphs_of(block, x)
    assert found == 1
    assert ops == [*([LINEAR] if up else []), "slidesparse.silu_mul_linear.default"]
    with torch.inference_mode():
        check_near(y, block(x))


@pytest.mark.parametrize("k", [96, 104])
def test_on_a_rank_swiglu_stands_in_the_op_too(k: int, rank: Callable, compiled: None) -> None:
    """Of 104 columns the second rank's begin inside a group."""
    rank(1, 2)
    down = made(layers.RowParallelLinear, N, k, "int8", False, "m.down_proj")
    down.reduce_results = False

    def block(x: Tensor) -> Tensor:
        return down(SiluAndMul.forward_native(x))[0]

    x = torch.randn(19, k).bfloat16()
    y, ops, found = graphs_of(block, x)
    assert (ops, found) == (["slidesparse.silu_mul_linear.default"], 1)
    with torch.inference_mode():
        check_near(y, block(x))


@pytest.mark.parametrize(("first", "bias"), [(None, True), ("int8", False), ("fp8", True)])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_norm_and_the_layer_behind_it_are_one_op(first: str | None, bias: bool, scheme: str, compiled: None) -> None:
    up = made(layers.ColumnParallelLinear, N, K, scheme, bias, "m.gate_up_proj")
    out = None if first is None else made(layers.RowParallelLinear, K, N, first, False, "m.o_proj")
    weight = torch.rand(K).add(0.5).bfloat16()

    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = ir.ops.fused_add_rms_norm(x if out is None else out(x)[0], residual, weight, 1e-5, None)
        return up(normed)[0], total

    x, residual = torch.randn(19, K if out is None else N).bfloat16(), torch.randn(19, K).bfloat16()
    for tensor in (x, residual):
        torch._dynamo.mark_dynamic(tensor, 0)
    (y, total), ops, found = graphs_of(block, x, residual)
    assert found == 1
    assert ops == [*([LINEAR] if out else []), "slidesparse.add_rms_norm_linear.default"]
    with torch.inference_mode():
        expected, expected_total = block(x, residual)
        check_near(y, expected)
        check_near(total, expected_total, 0.003)


def test_what_is_no_swiglu_in_front_of_a_product_stays(compiled: None) -> None:
    down = made(layers.RowParallelLinear, N, K, "int8", False, "m.down_proj")

    def other_way_round(x: Tensor) -> Tensor:
        return down(x[..., :K] * F.silu(x[..., K:]))[0]

    def another_gate(x: Tensor) -> Tensor:
        return down(F.gelu(x[..., :K]) * x[..., K:])[0]

    def seen_elsewhere(x: Tensor) -> tuple[Tensor, Tensor]:
        gated = SiluAndMul.forward_native(x)
        return down(gated)[0], gated

    x = torch.randn(5, 2 * K, dtype=torch.bfloat16)
    for run in (other_way_round, another_gate, seen_elsewhere):
        _, ops, found = graphs_of(run, x)
        assert (ops, found) == ([LINEAR], 0)


@pytest.mark.parametrize(
    ("weight", "residual", "variance"),
    [
        (torch.rand(K, dtype=torch.float32), (19, K, torch.bfloat16), None),  # as Gemma's norms
        (None, (19, K, torch.bfloat16), None),
        (torch.rand(K).bfloat16(), (19, K, torch.float32), None),
        (torch.rand(K).bfloat16(), (1, K, torch.bfloat16), None),
        (torch.rand(K).bfloat16(), (19, K, torch.bfloat16), K // 2),
    ],
)  # fmt: skip
def test_a_norm_that_the_kernel_does_not_take_stays(weight, residual, variance, compiled: None) -> None:
    up = made(layers.ColumnParallelLinear, N, K, "int8", False, "m.gate_up_proj")

    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = ir.ops.fused_add_rms_norm(x, residual, weight, 1e-5, variance)
        return up(normed.bfloat16())[0], total

    *shape, dtype = residual
    _, ops, found = graphs_of(block, torch.randn(19, K, dtype=torch.bfloat16), torch.randn(*shape, dtype=dtype))
    assert (ops, found) == ([LINEAR], 0)


def test_a_layer_in_front_that_somebody_else_reads_stays(compiled: None) -> None:
    up = made(layers.ColumnParallelLinear, 2 * K, N, "int8", True, "m.gate_up_proj")
    down = made(layers.RowParallelLinear, N, K, "int8", False, "m.down_proj")

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        gate_up = up(x)[0]
        return down(SiluAndMul.forward_native(gate_up))[0], gate_up

    x = torch.randn(19, N, dtype=torch.bfloat16)
    both, ops, found = graphs_of(block, x)
    assert (ops, found) == ([LINEAR, "slidesparse.silu_mul_linear.default"], 1)
    with torch.inference_mode():
        for one, expected in zip(both, block(x), strict=True):
            check_near(one, expected)


def test_the_pass_is_put_where_vllm_looks_for_one(tmp_path: Path, rank: Callable) -> None:
    register()
    config = model_config(tmp_path)
    passes, key, before = config.compilation_config.inductor_compile_config, current_platform.pass_key, config.compute_hash()
    assert not fusion.fuses(None) and key not in passes
    assert fusion.fuses(config) and fusion.fuses(config)
    mine = passes[key]
    assert isinstance(mine, fusion.FuseQuantisation) and mine.uuid() == copy.deepcopy(mine).uuid() and config.compute_hash() != before
    known = mine.uuid()
    with pytest.MonkeyPatch.context() as patch:  # the caches tell what it puts into graphs apart
        patch.setattr(fusion, "silu_and_mul", part)
        assert mine.uuid() != known
    passes[key] = object()
    assert not fusion.fuses(config)
    config.model_config.hf_text_config.hidden_act = "silu"
    settings = config.compilation_config
    settings.custom_ops[:] = ["none"]
    assert fusion.sees_swiglu(config, "m.down_proj") and not fusion.sees_swiglu(config, "m.o_proj")
    for asked in (["none", "+silu_and_mul"], ["all"]):
        settings.custom_ops[:] = asked
        assert not fusion.sees_swiglu(config, "m.down_proj")
    settings.custom_ops[:], settings.backend = ["all", "-silu_and_mul"], "eager"
    assert not fusion.sees_swiglu(config, "m.down_proj")
    settings.backend = "inductor"
    assert fusion.sees_swiglu(config, "m.down_proj")
    config.model_config = None
    assert not fusion.sees_swiglu(config, "m.down_proj")


@pytest.mark.parametrize(("scheme", "asks"), [("int8", True), ("fp8", True), ("bf16", False)])
def test_layers_that_quantise_nothing_ask_for_no_pass(scheme: str, asks: bool, tmp_path: Path, rank: Callable) -> None:
    register()
    rank(0, 1)
    config = model_config(tmp_path)
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    with set_current_vllm_config(config):
        made(layers.RowParallelLinear, N, K, scheme, False, "m.down_proj")
    assert (current_platform.pass_key in config.compilation_config.inductor_compile_config) == asks


class Block(nn.Module):
    """A norm and a SwiGLU block of a model, as vLLM's models are built."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.norm, self.act = RMSNorm(N), SiluAndMul()
        self.up = layers.ColumnParallelLinear(N, 2 * K, bias=False, quant_config=config_of("packed", "int8"), prefix="m.gate_up_proj")
        self.down = layers.RowParallelLinear(K, N, bias=False, quant_config=config_of("packed", "int8"), prefix="m.down_proj")

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.norm(x, residual)
        return self.down(self.act(self.up(x)[0]))[0], residual


def test_vllms_compiler_runs_the_pass(tmp_path: Path, rank: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It copies the configuration's passes when the model's layers have been made, before they are loaded."""
    for name, value in {"VLLM_DISABLE_COMPILE_CACHE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}.items():
        monkeypatch.setenv(name, value)
    if not hasattr(torch.ops._C, "rotary_embedding"):  # a vLLM without its kernels
        monkeypatch.setattr(FixFunctionalizationPass, "__call__", lambda self, graph: None)
    register()
    config = model_config(tmp_path)
    settings = config.compilation_config
    settings.mode, settings.cudagraph_mode, settings.backend = CompilationMode.VLLM_COMPILE, CUDAGraphMode.NONE, "inductor"
    settings.custom_ops[:], settings.compile_sizes = ["none"], []
    settings.pass_config.fuse_norm_quant = settings.pass_config.fuse_act_quant = False
    ops, apply = [], fusion.FuseQuantisation.__call__
    monkeypatch.setattr(fusion.FuseQuantisation, "__call__", lambda self, graph: (apply(self, graph), ops.extend(ops_of(graph)))[0])
    with set_current_vllm_config(config), set_forward_context(None, config), torch.inference_mode():
        block = support_torch_compile(dynamic_arg_dims={"x": 0, "residual": 0})(Block)(vllm_config=config)
        load(block.up, {None: part(2 * K, N, SCHEMES["int8"])}, "packed")
        load(block.down, {None: part(N, K, SCHEMES["int8"])}, "packed")
        for m in (19, 7):
            x, residual = torch.randn(m, N), torch.randn(m, N)
            expected = block.forward(x.clone(), residual.clone())
            for found, one in zip(block(x, residual), expected, strict=True):
                check_near(found, one)
    assert fused(ops) == 2
