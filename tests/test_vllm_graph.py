"""Packed linears in vLLM's graph: numbers by rank, one op, and what the compile cache is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'slidesparse[vllm]'")

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, set_current_vllm_config
from vllm.model_executor.layers import linear as layers

from slidesparse.format import SCHEMES
from slidesparse.integrations.vllm import graph, methods, register
from slidesparse.tolerance import check_bitwise, check_close
from vllm_layers import config_of, load, model_config, oracle, part

pytestmark = pytest.mark.usefixtures("bfloat16")


@pytest.mark.parametrize(("pattern", "k", "size"), [("6:8", 96, 1), ("6:8", 96, 4), ("4:6", 3584, 2), ("8:10", 52, 2)])
@pytest.mark.parametrize(("form", "name"), [("packed", "int8"), ("packed", "fp8"), ("dense", "int8"), ("dense", "fp8")])
def test_ranks_compute_the_oracles_numbers(form: str, name: str, pattern: str, k: int, size: int, rank: Callable, compiled: None) -> None:
    scheme, one = SCHEMES[name], part(64, k, SCHEMES[name], pattern, bias=True)
    ragged = {"in_features": {"a.down_proj": k}} if form == "packed" else {}
    for number in range(size):
        rank(number, size)
        config = config_of(form, name, pattern, **ragged)
        layer = layers.RowParallelLinear(k, 64, bias=True, quant_config=config, prefix="a.down_proj")
        layer.reduce_results = False  # vLLM refuses that with a bias, which is to be tested on the first rank
        load(layer, {None: one}, form)
        columns, bias = slice(number * k // size, (number + 1) * k // size), layer.bias if number == 0 else None
        weight, x = one.weight[:, columns].contiguous(), torch.randn(2, 200, k // size)  # of fewer tokens a single error decides
        with torch.inference_mode():
            y = layer.quant_method.apply(layer, x, bias).view(400, 64)
            check_bitwise(layer.quant_method.apply(layer, x[:, :3], bias), y.view(2, 200, 64)[:, :3])
        x, exact = x.view(400, -1), oracle(x.view(400, -1), weight, one.scale, bias, scheme, torch.float64).detach()
        check_close(y, exact, oracle(x, weight, one.scale, bias, scheme).detach())


def test_one_graph_and_one_op_whatever_the_number_of_tokens(compiled: None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(found: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(found)
        return found.forward

    layer = layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config_of("packed", "int8"), prefix="m.up_proj")
    load(layer, {None: part(8, 64, SCHEMES["int8"])}, "packed")
    run = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for m in (7, 3, 16):
            x = torch.randn(m, 64)
            check_bitwise(run(x)[0], layer(x)[0])
    assert len(graphs) == 1
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function" and "slidesparse" in str(node.target)]
    assert calls == ["slidesparse.linear.default"]


def test_vllms_compile_cache_tells_graphs_apart(tmp_path: Path, rank: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config(tmp_path)
    users = config.additional_config = {"slidesparse": {"memory": "fast"}}
    inner = dataclasses.replace(config)
    hashes = {(config.compute_hash(), inner.compute_hash())}
    for name, whose in (("m.up_proj", "slidesparse"), ("m.down_proj", "slidesparse"), ("m.down_proj", "vllm")):
        assert graph.enter_cache_key((inner, config), name, whose)
        hashes.add((config.compute_hash(), inner.compute_hash()))
    assert len(hashes) == len({outer for outer, _ in hashes}) == len({own for _, own in hashes}) == 4
    assert users == {"slidesparse": {"memory": "fast"}}
    assert graph.enter_cache_key((config, None), "m.up_proj", "slidesparse") and (config.compute_hash(), inner.compute_hash()) in hashes
    monkeypatch.setattr(graph, "__version__", "another")  # after an update
    assert graph.enter_cache_key((inner, config), "m.up_proj", "slidesparse")
    assert config.compute_hash() not in {outer for outer, _ in hashes}
    config.additional_config = type("Own", (), {"compute_hash": lambda self: "own"})()
    assert not graph.enter_cache_key((config,), "m.up_proj", "slidesparse") and graph.enter_cache_key((None,), "m.up_proj", "slidesparse")


@pytest.mark.parametrize(
    ("kind", "size", "route"),
    [
        (layers.ColumnParallelLinear, 2, None),
        (layers.RowParallelLinear, 1, None),
        (layers.RowParallelLinear, 2, None),
        (layers.ColumnParallelLinear, 1, "dense:exact"),
        (layers.ColumnParallelLinear, 1, "packed"),
    ],
)
def test_every_kind_of_layer_and_route_is_the_oracle(kind, size, route, rank: Callable, compiled: None, monkeypatch) -> None:
    rank(0, size)
    monkeypatch.setattr(methods.Settings, "current", classmethod(lambda cls: methods.Settings(route=route)))
    layer = kind(64, 16, bias=False, quant_config=config_of("packed", "int8"), prefix="m.up_proj")
    one = part(16, 64, SCHEMES["int8"])
    load(layer, {None: one}, "packed")
    x = torch.randn(200, 64)
    y = layer.quant_method.apply(layer, x[:, : layer.input_size_per_partition])
    weight = one.weight[: y.shape[1], : layer.input_size_per_partition].contiguous()
    x, scale = x[:, : weight.shape[1]].contiguous(), one.scale[: y.shape[1]]
    exact = oracle(x, weight, scale, None, SCHEMES["int8"], torch.float64).detach()
    check_close(y.detach(), exact, oracle(x, weight, scale, None, SCHEMES["int8"]).detach())


def test_the_compile_cache_is_told_whose_a_layer_is(tmp_path: Path, rank: Callable) -> None:
    register()
    config = model_config(tmp_path)
    rank(0, 1)
    with set_current_vllm_config(config):
        layer = layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config_of("packed", "int8"), prefix="m.up_proj")
        load(layer, {None: part(8, 64, SCHEMES["int8"])}, "packed")
    assert config.additional_config["slidesparse_layers"]["m.up_proj"] == "slidesparse"


def test_only_where_vllm_compiles(tmp_path: Path, rank: Callable) -> None:
    config = model_config(tmp_path)
    assert not graph.compiles(None)
    for mode, expected in ((CompilationMode.VLLM_COMPILE, True), (CompilationMode.NONE, False)):
        config.compilation_config = CompilationConfig(mode=mode)
        assert graph.compiles(config) == expected


@pytest.mark.parametrize(("mode", "replayed"), [("NONE", 0), ("PIECEWISE", 512), ("FULL_DECODE_ONLY", 0), ("FULL_AND_PIECEWISE", 512)])
def test_graphs_of_decoding_alone_replay_no_other_steps(mode: str, replayed: int, tmp_path: Path) -> None:
    register()
    config = model_config(tmp_path)
    config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
    config.compilation_config.cudagraph_capture_sizes = [1, 512]
    with set_current_vllm_config(config):
        assert methods.Settings.current().replayed == replayed


@pytest.mark.parametrize(
    ("replayed", "most", "compiles", "said"),
    [(512, 8192, True, [512]), (0, 8192, True, [0]), (2048, 8192, True, []), (512, 512, True, []), (512, 8192, False, [])],
)
def test_where_larger_graphs_would_help_products_of_ours_that_is_said(
    replayed: int, most: int, compiles: bool, said: list[int], compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(methods, "_say_graphs", told.append)
    monkeypatch.setattr(methods, "compiles", lambda config: compiles)
    monkeypatch.setattr(methods.Settings, "current", classmethod(lambda cls: methods.Settings(replayed=replayed, most=most)))
    layer = layers.RowParallelLinear(64, 16, bias=False, quant_config=config_of("packed", "int8"), prefix="m.down_proj")
    load(layer, {None: part(16, 64, SCHEMES["int8"])}, "packed")
    assert told == said
