"""Layers behind one opaque op: the same numbers as the oracle, one graph, nothing kept longer than its owner."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from layers import DTYPE, made, tokens
from slidesparse import reference
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Runner, Weights, op, runner
from slidesparse.packing import Shard
from slidesparse.pattern import Pattern
from slidesparse.pruning import prune
from slidesparse.quantization import quantize_weight
from slidesparse.tolerance import check_bitwise

INT8 = SCHEMES["int8"]
WHOLE = Shard.even(Pattern.parse("6:8"), 32, 0, 1)


class Named:
    """An owner, the tensor that names its layer, and the dense weights and scales of the shard."""

    def __init__(self, shard: Shard, n: int = 16, *, memory: str = "fast", device: str = "cpu") -> None:
        self.weight, self.scale = quantize_weight(prune(torch.randn(n, shard.columns), shard.pattern, offset=shard.offset), INT8)
        self.runner = Runner(Weights(shard.pack(self.weight), INT8, self.scale).to(torch.device(device)), memory=memory)
        self.owner, runner = nn.Module(), self.runner
        self.name = op.handle(self.owner, lambda dtype, device: runner, shard.margins)

    def expected(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, x_scale = reference.quantize(x, INT8)
        return reference.linear(q, x_scale, self.weight, self.scale, bias, x.dtype)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_shard_computes_what_the_oracle_does(rank: int, memory: str) -> None:
    layer = Named(Shard.even(Pattern.parse("4:6"), 56, rank, 4), memory=memory)
    for m in (0, 1, 7, 33):
        x, bias = torch.randn(m, 14).to(DTYPE), torch.randn(16).to(DTYPE)
        check_bitwise(op.linear(x, layer.name, bias, 16), layer.expected(x, bias))
        check_bitwise(op.linear(x, layer.name, None, 16), layer.expected(x))
        check_bitwise(op.linear(x.float(), layer.name, None, 16), layer.expected(x.float()))


def test_packed_weights_are_given_up_only_where_that_was_asked_for_and_no_route_reads_them() -> None:
    x = tokens(3, 64)
    for memory, unread, device in (("fast", "meta", "meta"), ("lean", "meta", "cpu"), ("fast", "cpu", "cpu")):
        weights, dense = made(32, 64, "bf16")
        run = Runner(weights, memory=memory, unread=unread)
        check_bitwise(run(x), torch.nn.functional.linear(x, dense))
        assert {tensor.device.type for tensor in (run.weights.packed.values, run.weights.packed.keep)} == {device}
        if device == "meta":
            with pytest.raises(UnsupportedError, match="gave its packed weights up"):
                run(x.float())
            check_bitwise(run(x), torch.nn.functional.linear(x, dense))
        else:
            assert run(x.float()).dtype == torch.float32


def test_equal_layers_share_one_graph_for_any_number_of_tokens() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, name: op.linear(x, name, None, 16) * 2, backend=backend, fullgraph=True, dynamic=True)
    for layer in [Named(WHOLE) for _ in range(3)]:
        for m in (3, 9):
            x = torch.randn(m, 32).to(DTYPE)
            check_bitwise(compiled(x, layer.name), layer.expected(x) * 2)
    assert len(graphs) == 1


def test_the_op_keeps_the_rules_of_its_library() -> None:
    layer = Named(WHOLE)
    for bias in (None, torch.randn(16).to(DTYPE)):
        torch.library.opcheck(torch.ops.slidesparse.linear, (torch.randn(3, 32).to(DTYPE), layer.name, bias, 16))


def test_outputs_are_contiguous_as_the_graph_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries pad N: their outputs are parts of wider ones."""
    layer, wide = Named(WHOLE), torch.randn(3, 20).to(DTYPE)
    monkeypatch.setattr(Runner, "__call__", lambda self, x, bias: wide[:, :16])
    monkeypatch.setattr(Runner, "behind", lambda self, x, bias: wide[:, :16])
    x, residual, weight = *torch.randn(2, 3, 32).to(DTYPE), torch.ones(32, dtype=DTYPE)
    found = [op.linear(x, layer.name, None, 16), op.silu_mul_linear(torch.cat((x, x), 1), layer.name, None, 16)]
    for y in (*found, op.add_rms_norm_linear(x, residual, weight, 1e-6, layer.name, None, 16)[0]):
        assert y.is_contiguous()
        check_bitwise(y, wide[:, :16].contiguous())


def test_layers_are_known_as_long_as_their_owner_lives() -> None:
    layer, held = Named(WHOLE), len(op._LAYERS)
    x = torch.randn(2, 32).to(DTYPE)
    check_bitwise(op.linear(x, layer.name, None, 16), layer.expected(x))
    del layer.owner
    assert len(op._LAYERS) == held - 1
    with pytest.raises(UnsupportedError, match="a layer that is gone"):
        op.linear(x, layer.name, None, 16)


def test_the_name_stays_on_the_host_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        name = op.handle(owner := nn.Module(), lambda dtype, device: None)
    assert name.device.type == "cpu" and owner is not None


def test_warming_runs_a_layer_once_with_each_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_calls", lru_cache(lambda *kind: runner.Calls()))
    ran = []
    for number in range(2):
        layer = Named(WHOLE)
        layer.runner.prepare(DTYPE, torch.device("cpu"), DTYPE)
        name = op.handle(layer.owner, lambda dtype, device, number=number, runner=layer.runner: ran.append(number) or runner)
        for _ in range(2):
            op.warm(name, layer.runner.ready, (1, 8, 1))
    assert ran == [0] * 2, "an equal layer needs none"
    monkeypatch.setattr(runner, "MOST_CALLS", 2)
    layer.runner(torch.zeros(9, 32, dtype=DTYPE), torch.zeros(16, dtype=DTYPE))
    op.warm(name, layer.runner.ready, (1,))
    assert ran == [0] * 2 + [1], "what was made for the first layer was forgotten"


@pytest.mark.needs_gpu
def test_a_captured_graph_runs_the_layer() -> None:
    layer = Named(Shard.even(Pattern.parse("4:6"), 56, 1, 2), 64, device="cuda")
    layer.runner.prepare(DTYPE, torch.device("cuda", 0))
    op.warm(layer.name, layer.runner.ready, (16,))
    x, graph = torch.zeros(16, 28, dtype=DTYPE, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.linear(x, layer.name, None, 64)
    fresh = torch.randn(16, 28).to(DTYPE)
    x.copy_(fresh)
    graph.replay()
    check_bitwise(y.cpu(), layer.expected(fresh))
