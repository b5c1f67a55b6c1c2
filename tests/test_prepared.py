"""Prepared layers behind one opaque op: the same numbers as an execution, one graph, nothing kept longer than its owner."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slidesparse import reference
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Execution, Weights, prepared
from slidesparse.pack import Shard
from slidesparse.pattern import Pattern
from slidesparse.prune import prune
from slidesparse.quant import quantize_weight
from slidesparse.testing import check_bitwise

INT8, DTYPE = SCHEMES["int8"], torch.bfloat16


def layer(shard: Shard, n: int = 16, *, bias: bool = False, memory: str = "fast") -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """An owner, the tensor that names the layer, and the dense weights and scales of the shard."""
    weight, scale = quantize_weight(prune(torch.randn(n, shard.columns), shard.pattern, offset=shard.offset), INT8)
    owner = nn.Module()
    execution = Execution(Weights(shard.pack(weight), INT8, scale), memory=memory)
    kind = DTYPE if bias else None
    return owner, prepared.prepare(owner, execution, DTYPE, torch.device("cpu"), kind, margins=shard.margins), weight, scale


def expected(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    q, x_scale = reference.quantize(x, INT8)
    return reference.linear(q, x_scale, weight, scale, bias, DTYPE)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_shard_computes_what_the_oracle_does(rank: int, memory: str) -> None:
    shard = Shard.even(Pattern.parse("4:6"), 56, rank, 4)
    owner, name, weight, scale = layer(shard, bias=True, memory=memory)
    for m in (0, 1, 7, 33):
        x, bias = torch.randn(m, 14).to(DTYPE), torch.randn(16).to(DTYPE)
        check_bitwise(prepared.linear(x, name, bias, 16), expected(x, weight, scale, bias))
        check_bitwise(prepared.linear(x, name, None, 16), expected(x, weight, scale))
    prepared.warm(name, (1, 8))
    del owner


def test_packed_weights_are_let_go_unless_a_route_reads_them() -> None:
    shard = Shard.even(Pattern.parse("6:8"), 32, 0, 1)
    for memory, device in (("fast", "meta"), ("lean", "cpu")):
        owner, name, *_ = layer(shard, memory=memory)
        assert prepared._PREPARED[int(name)].execution.weights.packed.values.device.type == device
        del owner


def test_equal_layers_share_one_graph_for_any_number_of_tokens() -> None:
    shard, graphs = Shard.even(Pattern.parse("6:8"), 32, 0, 1), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, name: prepared.linear(x, name, None, 16) * 2, backend=backend, fullgraph=True, dynamic=True)
    kept = [layer(shard) for _ in range(3)]
    for _, name, weight, scale in kept:
        for m in (3, 9):
            x = torch.randn(m, 32).to(DTYPE)
            check_bitwise(compiled(x, name), expected(x, weight, scale) * 2)
    assert len(graphs) == 1


def test_the_op_keeps_the_rules_of_its_library() -> None:
    owner, name, *_ = layer(Shard.even(Pattern.parse("6:8"), 32, 0, 1), bias=True)
    for bias in (None, torch.randn(16).to(DTYPE)):
        torch.library.opcheck(torch.ops.slidesparse.linear, (torch.randn(3, 32).to(DTYPE), name, bias, 16))
    del owner


def test_other_types_and_layers_that_are_gone_are_refused() -> None:
    owner, name, *_ = layer(Shard.even(Pattern.parse("6:8"), 32, 0, 1))
    with pytest.raises(UnsupportedError, match=r"float32"):
        prepared.linear(torch.randn(2, 32), name, None, 16)
    with pytest.raises(UnsupportedError, match="a bias of None was given"):
        prepared.linear(torch.randn(2, 32).to(DTYPE), name, torch.randn(16).to(DTYPE), 16)
    held = len(prepared._PREPARED)
    del owner
    assert len(prepared._PREPARED) == held - 1
    with pytest.raises(UnsupportedError, match="no prepared layer"):
        prepared.linear(torch.randn(2, 32).to(DTYPE), name, None, 16)


def test_the_name_stays_on_the_host_whatever_the_default_device_is() -> None:
    shard = Shard.even(Pattern.parse("6:8"), 32, 0, 1)
    weight, scale = quantize_weight(prune(torch.randn(16, 32), shard.pattern), INT8)
    execution, owner = Execution(Weights(shard.pack(weight), INT8, scale)), nn.Module()
    with torch.device("meta"):
        name = prepared.prepare(owner, execution, DTYPE, torch.device("cpu"), None)
    assert name.device.type == "cpu"


@pytest.mark.needs_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_captured_graph_runs_the_prepared_layer() -> None:
    shard = Shard.even(Pattern.parse("4:6"), 56, 1, 2)
    weight, scale = quantize_weight(prune(torch.randn(64, 28), shard.pattern, offset=shard.offset), INT8)
    execution, owner = Execution(Weights(shard.pack(weight.cuda()), INT8, scale.cuda())), nn.Module()
    name = prepared.prepare(owner, execution, DTYPE, torch.device("cuda", 0), None, margins=shard.margins)
    prepared.warm(name, (16,))
    x, graph = torch.zeros(16, 28, dtype=DTYPE, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = prepared.linear(x, name, None, 64)
    fresh = torch.randn(16, 28).to(DTYPE)
    x.copy_(fresh)
    graph.replay()
    check_bitwise(y.cpu(), expected(fresh, weight, scale))
