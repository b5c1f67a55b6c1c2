"""The vLLM adapter against vLLM's own classes, on the CPU: registration, loading by rank, and numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models

vllm = pytest.importorskip("vllm", reason="vllm is not installed: pip install 'slidesparse[vllm]'")

from vllm.config import DeviceConfig, LoadConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers import linear as layers  # noqa: E402
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config  # noqa: E402

from slidesparse.checkpoint import Recipe, convert  # noqa: E402
from slidesparse.errors import CheckpointError, PatternError, UnsupportedError, WeightError  # noqa: E402
from slidesparse.format import MARKER, SCHEMES, PackedConfig, Scheme  # noqa: E402
from slidesparse.gemm import op  # noqa: E402
from slidesparse.integrations import vllm as adapter  # noqa: E402
from slidesparse.integrations.vllm import methods  # noqa: E402
from slidesparse.pattern import Pattern  # noqa: E402
from slidesparse.tolerance import check_bitwise, check_close  # noqa: E402
from vllm_layers import MERGED, compressed_tensors, config_of, load, oracle, part  # noqa: E402

pytestmark = pytest.mark.usefixtures("bfloat16")


def hold(layer: nn.Module, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, scheme: Scheme) -> None:
    """The method's output against the oracle on what the rank should have."""
    with torch.inference_mode():
        y = layer.quant_method.apply(layer, x, bias)
    expected = oracle(x, weight, scale, bias, scheme)
    if scheme.name == "int8":
        check_bitwise(y, expected)
    else:
        same = expected if scheme.dynamic else torch.nn.functional.linear(x, weight, bias).detach()
        check_close(y, oracle(x, weight, scale, bias, scheme, torch.float64).detach(), same.detach())


FORMS = [("packed", "int8"), ("packed", "fp8"), ("packed", "bf16"), ("dense", "int8"), ("dense", "fp8"), ("dense", "bf16")]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("form", "name"), FORMS)
def test_column_parallel(form: str, name: str, size: int, rank: Callable) -> None:
    scheme, one = SCHEMES[name], part(32, 76, SCHEMES[name], bias=True)
    for number in range(size):
        rank(number, size)
        layer = layers.ColumnParallelLinear(76, 32, quant_config=config_of(form, name), prefix="a.up_proj")
        load(layer, {None: one}, form)
        rows = slice(number * 32 // size, (number + 1) * 32 // size)
        scale = None if one.scale is None else one.scale[rows]
        check_bitwise(layer.bias.data, one.bias[rows])
        hold(layer, torch.randn(5, 76), one.weight[rows], scale, layer.bias, scheme)
        assert not {"weight", "weight_values", "weight_keep", "weight_scale"} & dict(layer.named_parameters()).keys()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("form", "name"), FORMS)
def test_merged_columns(form: str, name: str, size: int, rank: Callable) -> None:
    scheme, parts = SCHEMES[name], {0: part(24, 64, SCHEMES[name]), 1: part(24, 64, SCHEMES[name])}
    for number in range(size):
        rank(number, size)
        layer = layers.MergedColumnParallelLinear(64, [24, 24], bias=False, quant_config=config_of(form, name), prefix="a.gate_up_proj")
        load(layer, parts, form)
        rows = slice(number * 24 // size, (number + 1) * 24 // size)
        weight = torch.cat([one.weight[rows].view(torch.uint8) for one in parts.values()]).view(scheme.dtype)
        scale = torch.cat([one.scale[rows] for one in parts.values()]) if scheme.dynamic else None
        hold(layer, torch.randn(3, 64), weight, scale, None, scheme)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("form", "name"), FORMS)
def test_query_key_value(form: str, name: str, size: int, rank: Callable) -> None:
    """Four query heads and two of keys and values, which four ranks hold twice."""
    scheme = SCHEMES[name]
    parts = {"q": part(32, 48, scheme, bias=True), "k": part(16, 48, scheme, bias=True), "v": part(16, 48, scheme, bias=True)}
    for number in range(size):
        rank(number, size)
        layer = layers.QKVParallelLinear(48, 8, 4, 2, bias=True, quant_config=config_of(form, name), prefix="a.qkv_proj")
        load(layer, parts, form)
        queries = slice(number * 32 // size, (number + 1) * 32 // size)
        head = number * 2 // size
        keys = slice(head * 8, head * 8 + max(8, 16 // size))
        cuts = {"q": queries, "k": keys, "v": keys}
        weight = torch.cat([parts[which].weight[rows].view(torch.uint8) for which, rows in cuts.items()]).view(scheme.dtype)
        scale = torch.cat([parts[which].scale[rows] for which, rows in cuts.items()]) if scheme.dynamic else None
        check_bitwise(layer.bias.data, torch.cat([parts[which].bias[rows] for which, rows in cuts.items()]))
        hold(layer, torch.randn(2, 48), weight, scale, layer.bias, scheme)


@pytest.mark.parametrize(("pattern", "k", "size"), [("6:8", 96, 1), ("6:8", 96, 4), ("4:6", 3584, 2), ("4:6", 56, 4), ("8:10", 52, 2)])
@pytest.mark.parametrize(("form", "name"), FORMS)
def test_row_parallel(form: str, name: str, pattern: str, k: int, size: int, rank: Callable) -> None:
    scheme, one = SCHEMES[name], part(8, k, SCHEMES[name], pattern, bias=True)
    ragged = {"in_features": {"a.down_proj": k}} if form == "packed" else {}
    for number in range(size):
        rank(number, size)
        config = config_of(form, name, pattern, **ragged)
        layer = layers.RowParallelLinear(k, 8, bias=True, quant_config=config, prefix="a.down_proj")
        load(layer, {None: one}, form)
        columns = slice(number * k // size, (number + 1) * k // size)
        bias = layer.bias if number == 0 else None
        hold(layer, torch.randn(3, k // size), one.weight[:, columns].contiguous(), one.scale, bias, scheme)


def test_replicated_layers_and_more_dimensions(rank: Callable) -> None:
    scheme, one = SCHEMES["int8"], part(16, 64, SCHEMES["int8"])
    rank(1, 2)
    for form in ("packed", "dense"):
        layer = layers.ReplicatedLinear(64, 16, bias=False, quant_config=config_of(form, "int8"), prefix="a.down_proj")
        load(layer, {None: one}, form)
        x = torch.randn(2, 3, 64)
        y = layer(x)[0]
        check_bitwise(y.view(6, 16), oracle(x.view(6, 64), one.weight, one.scale, None, scheme))


def test_scales_per_tensor(rank: Callable) -> None:
    config = adapter.SlideSparseConfig.from_config(compressed_tensors("fp8", "tensor"))
    config.packed_modules_mapping = MERGED
    layer = layers.MergedColumnParallelLinear(64, [8, 8], bias=False, quant_config=config, prefix="a.gate_up_proj")
    parts = {0: part(8, 64, SCHEMES["fp8"]), 1: part(8, 64, SCHEMES["fp8"])}
    for index, one in parts.items():
        one.scale = torch.tensor(0.5 + index)
    load(layer, parts, "dense")
    weight = torch.cat([one.weight.view(torch.uint8) for one in parts.values()]).view(torch.float8_e4m3fn)
    scale = torch.tensor([0.5] * 8 + [1.5] * 8, dtype=torch.float32).view(-1, 1)
    hold(layer, torch.randn(3, 64), weight, scale, None, SCHEMES["fp8"])


def test_refusals_name_the_layer(rank: Callable) -> None:
    one = part(8, 64, SCHEMES["int8"])
    one.weight[3, :8] = 1
    for form, error, config in (
        ("dense", PatternError, config_of("dense", "int8")),
        ("dense", PatternError, adapter.SlideSparseConfig.from_config(compressed_tensors("int8"))),
    ):
        if form == "dense" and config.claims.pattern is None:
            one.weight[3] = 1
        layer = layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config, prefix="m.up_proj")
        with pytest.raises(error, match=r"layer m.up_proj: obeys none of .*row 3, group 0"):
            load(layer, {None: one}, form)
    layer = layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config_of("packed", "int8"), prefix="m.up_proj")
    with pytest.raises(WeightError, match=r"layer m.up_proj: row 0 was not in the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)
    good = part(8, 64, SCHEMES["int8"])
    layer = layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config_of("packed", "int8"), prefix="m.up_proj")
    layer.weight_values.weight_loader(layer.weight_values, good.tensors("packed")["weight_values"])
    with pytest.raises(WeightError, match=r"layer m.up_proj: weight_keep: row 0, group 0"):
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(CheckpointError, match="K = 60"):
        config = config_of("packed", "int8", in_features={"m.up_proj": 60})
        layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config, prefix="m.up_proj")
    with pytest.raises(CheckpointError, match="cannot be merged"):
        config = config_of("packed", "int8", overrides={"m.up_proj": "4:6"})
        layers.MergedColumnParallelLinear(64, [8, 8], bias=False, quant_config=config, prefix="m.gate_up_proj")
    with pytest.raises(UnsupportedError, match="nvfp4"):
        adapter.SlideSparseConfig.from_config(PackedConfig(Pattern.parse("6:8x2"), SCHEMES["nvfp4"]).to_dict())


def test_layers_that_stay_dense_are_vllms(rank: Callable) -> None:
    for form in ("packed", "dense"):
        for name in ("int8", "bf16"):
            config = config_of(form, name, ignore=["m.up_proj", "re:.*vision.*"])
            if form == "dense" and name == "int8":
                config.ignore = ["m.up_proj", "re:.*vision.*"]
            for prefix in ("m.up_proj", "vision.up_proj"):
                layer = layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config, prefix=prefix)
                assert type(layer.quant_method) is layers.UnquantizedLinearMethod
            layer = layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config, prefix="m.down_proj")
            assert isinstance(layer.quant_method, methods.SlideSparseLinearMethod)


def test_parts_of_different_patterns_take_the_wider_in_dense_form(rank: Callable) -> None:
    config = config_of("dense", "int8", "6:8", overrides={"m.gate_proj": "2:4"})
    layer = layers.MergedColumnParallelLinear(64, [8, 8], bias=False, quant_config=config, prefix="m.gate_up_proj")
    parts = {0: part(8, 64, SCHEMES["int8"], "2:4"), 1: part(8, 64, SCHEMES["int8"], "6:8")}
    load(layer, parts, "dense")
    weight, scale = torch.cat([one.weight for one in parts.values()]), torch.cat([one.scale for one in parts.values()])
    hold(layer, torch.randn(2, 64), weight, scale, None, SCHEMES["int8"])


def test_random_weights_without_a_checkpoint(rank: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = methods.Settings(random=True)
    monkeypatch.setattr(methods.Settings, "current", classmethod(lambda cls: settings))
    for form, name in FORMS:
        rank(1, 2)
        layer = layers.RowParallelLinear(
            56, 8, bias=False, reduce_results=False, quant_config=config_of(form, name, "4:6"), prefix="m.o_proj"
        )
        layer.quant_method.process_weights_after_loading(layer)
        y = layer(torch.randn(3, 28))[0]
        assert torch.isfinite(y).all() and float(y.abs().mean()) > 0.05


def test_registration_is_idempotent_and_chosen_as_documented() -> None:
    adapter.register()
    adapter.register()
    assert QUANTIZATION_METHODS.count("slidesparse") == 1 and get_quantization_config("slidesparse") is adapter.SlideSparseConfig
    choose = adapter.SlideSparseConfig.override_quantization_method
    plain, marked = compressed_tensors("int8"), compressed_tensors("int8") | {MARKER: {"pattern": "6:8"}}
    assert choose(marked, None, hf_config=None) == "slidesparse" and choose(plain, None) is None
    assert choose(plain, "slidesparse") == "slidesparse" and choose(marked, "compressed-tensors") is None
    assert choose({"quant_method": "gptq", MARKER: {}}, "slidesparse") is None


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model in every form."""
    folder = tmp_path_factory.mktemp("served")
    models.write(folder / "dense")
    for form in ("packed", "dense"):
        for scheme in ("int8", "fp8", "bf16"):
            convert(folder / "dense", folder / f"{form}-{scheme}", Recipe(Pattern.parse("6:8"), "magnitude", scheme, form=form))
    return folder


@pytest.mark.parametrize(
    ("name", "asked", "chosen", "kind"),
    [
        ("packed-int8", None, "slidesparse", "SlideSparseConfig"),
        ("packed-fp8", None, "slidesparse", "SlideSparseConfig"),
        ("packed-bf16", "slidesparse", "slidesparse", "SlideSparseConfig"),
        ("dense-int8", None, "slidesparse", "MaskedCompressedTensorsConfig"),
        ("dense-fp8", "slidesparse", "slidesparse", "MaskedCompressedTensorsConfig"),
        ("dense-int8", "compressed-tensors", "compressed-tensors", "CompressedTensorsConfig"),
        ("dense-bf16", "slidesparse", "slidesparse", "SlideSparseConfig"),
        ("dense-bf16", None, None, "NoneType"),
    ],
)
def test_vllm_chooses_the_method_from_config_json(name: str, asked: str | None, chosen: str | None, kind: str, checkpoints: Path) -> None:
    adapter.register()
    folder = str(checkpoints / name)
    model = EngineArgs(model=folder, quantization=asked, skip_tokenizer_init=True, enforce_eager=True).create_model_config()
    config = VllmConfig(model_config=model, device_config=DeviceConfig(device="cpu"), load_config=LoadConfig())
    assert (model.quantization, type(config.quant_config).__name__) == (chosen, kind)
    if chosen == "slidesparse":
        assert str(config.quant_config.claims.pattern) == "6:8" and "lm_head" in config.quant_config.claims.ignore


def test_settings_come_from_additional_config(checkpoints: Path) -> None:
    adapter.register()
    model = EngineArgs(model=str(checkpoints / "packed-int8"), skip_tokenizer_init=True, enforce_eager=True).create_model_config()
    for chosen, loaded in (({"memory": "lean", "route": "packed:exact64"}, "auto"), ({}, "dummy")):
        config = VllmConfig(
            model_config=model,
            device_config=DeviceConfig(device="cpu"),
            load_config=LoadConfig(load_format=loaded),
            additional_config={"slidesparse": chosen},
        )
        with set_current_vllm_config(config):
            found = methods.Settings.current()
        assert (found.memory, found.route) == (chosen.get("memory", "fast"), chosen.get("route"))
        assert found.random == (loaded == "dummy") and found.most == config.scheduler_config.max_num_batched_tokens
    config.additional_config = {"slidesparse": {"layout": "dense"}}
    with set_current_vllm_config(config), pytest.raises(UnsupportedError, match="knows memory and route, not layout"):
        methods.Settings.current()


def test_one_graph_for_any_number_of_tokens(rank: Callable) -> None:
    """No graph break, one compilation, and no copy of the layer's identity in the graph: equal layers share it."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    made = []
    for prefix in ("m.up_proj", "m.down_proj"):
        layer = layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config_of("packed", "int8"), prefix=prefix)
        load(layer, {None: part(8, 64, SCHEMES["int8"])}, "packed")
        made.append(layer)
    compiled = torch.compile(made[0], backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for m in (7, 3, 16):
            x = torch.randn(m, 64)
            check_bitwise(compiled(x)[0], made[0](x)[0])
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function" and "slidesparse" in str(node.target)]
    assert len(calls) == 1 and isinstance(calls[0].args[1], torch.fx.Node) and calls[0].args[3] == 8


def test_layers_are_forgotten_with_their_model(rank: Callable) -> None:
    before = len(op._LAYERS)
    layer = layers.ColumnParallelLinear(64, 8, bias=False, quant_config=config_of("packed", "int8"), prefix="m.up_proj")
    load(layer, {None: part(8, 64, SCHEMES["int8"])}, "packed")
    name = layer.slidesparse_name
    assert len(op._LAYERS) == before + 1
    del layer
    assert len(op._LAYERS) == before
    with pytest.raises(UnsupportedError, match="a layer that is gone"):
        op.linear(torch.randn(1, 64), name, None, 8)


def test_the_entry_point_names_the_register_function() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nslidesparse = "slidesparse.integrations.vllm:register"' in text
