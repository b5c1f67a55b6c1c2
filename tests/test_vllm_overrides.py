"""Checkpoints whose layers have different patterns, on vLLM's own layers: from the files to the products of every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models

vllm = pytest.importorskip("vllm", reason="vllm is not installed: pip install 'slidesparse[vllm]'")

from vllm.config import DeviceConfig, LoadConfig, VllmConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers import linear as layers  # noqa: E402

from slidesparse.checkpoint import Recipe, convert  # noqa: E402
from slidesparse.errors import CheckpointError, PatternError  # noqa: E402
from slidesparse.format import SCHEMES  # noqa: E402
from slidesparse.gemm import op  # noqa: E402
from slidesparse.integrations import vllm as adapter  # noqa: E402
from slidesparse.pattern import Pattern  # noqa: E402
from test_vllm import hold  # noqa: E402
from vllm_layers import MERGED, config_of, load, part  # noqa: E402

pytestmark = pytest.mark.usefixtures("bfloat16")

MIXED = {"*.qkv_proj": "4:6", "*.0.*.o_proj": "2:4", "*.1.mlp.gate_up_proj": "8:10", "*.down_proj": "14:16"}
"""Over 6:8."""
KINDS = {
    "self_attn.qkv_proj": (("4:6", "4:6"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v")),
    "self_attn.o_proj": (("2:4", "6:8"), ("o_proj",), (None,)),
    "mlp.gate_up_proj": (("6:8", "8:10"), ("gate_proj", "up_proj"), (0, 1)),
    "mlp.down_proj": (("14:16", "14:16"), ("down_proj",), (None,)),
}
"""Patterns of both blocks, parts, and vLLM's names for those."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    models.write(folder / "source")
    overrides = {entry: Pattern.parse(text) for entry, text in MIXED.items()}
    for form in ("packed", "dense"):
        for scheme in ("int8", "fp8", "bf16"):
            recipe = Recipe(Pattern.parse("6:8"), "magnitude", scheme, form, overrides=overrides)
            convert(folder / "source", folder / f"{form}-{scheme}", recipe)
    return folder


def served(folder: Path) -> object:
    """What vLLM makes of config.json."""
    adapter.register()
    model = EngineArgs(model=str(folder), quantization="slidesparse", skip_tokenizer_init=True, enforce_eager=True).create_model_config()
    config = VllmConfig(model_config=model, device_config=DeviceConfig(device="cpu"), load_config=LoadConfig()).quant_config
    config.packed_modules_mapping = MERGED
    return config


def made(kind: str, prefix: str, config: object) -> nn.Module:
    if kind == "qkv_proj":
        return layers.QKVParallelLinear(64, 16, 4, 2, bias=False, quant_config=config, prefix=prefix)
    if kind == "gate_up_proj":
        return layers.MergedColumnParallelLinear(64, [100, 100], bias=False, quant_config=config, prefix=prefix)
    return layers.RowParallelLinear(64 if kind == "o_proj" else 100, 64, bias=False, quant_config=config, prefix=prefix)


def held(tensor: Tensor, kind: str, number: int, size: int) -> Tensor:
    """The rank's share: rows of layers merged of several, columns of the others."""
    axis = 1 if kind in ("o_proj", "down_proj") else 0
    return tensor.chunk(size, axis)[number].contiguous()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("name", ["int8", "fp8", "bf16"])
def test_every_layer_runs_in_its_own_pattern(name: str, form: str, size: int, checkpoints: Path, rank: Callable) -> None:
    scheme, tensors, twin = SCHEMES[name], models.read(checkpoints / f"{form}-{name}"), models.read(checkpoints / f"dense-{name}")
    config = served(checkpoints / f"{form}-{name}")
    for number in range(size):
        rank(number, size)
        for block in range(2):
            for whole, (patterns, parts, shards) in KINDS.items():
                kind = whole.rpartition(".")[2]
                layer = made(kind, f"model.layers.{block}.{whole}", config)
                names = [f"model.layers.{block}.{whole.partition('.')[0]}.{one}" for one in parts]
                for one, shard in zip(names, shards, strict=True):
                    for suffix in [tensor.rpartition(".")[2] for tensor in tensors if tensor.startswith(f"{one}.")]:
                        parameter = getattr(layer, suffix)
                        parameter.weight_loader(parameter, tensors[f"{one}.{suffix}"], *(() if shard is None else (shard,)))
                layer.quant_method.process_weights_after_loading(layer)
                find, *_ = op._LAYERS[int(layer.slidesparse_name)]
                assert str(find(torch.bfloat16, torch.device("cpu")).ready.problem.pattern) == patterns[block]
                # Floating-point types are put together as bytes: the CPU cannot with all of them.
                weights = [held(twin[f"{one}.weight"], kind, number, size).view(torch.uint8) for one in names]
                weight, scale = torch.cat(weights).view(scheme.dtype), None
                if scheme.dynamic:
                    scales = [twin[f"{one}.weight_scale"] for one in names]
                    scale = torch.cat(scales if len(names) == 1 else [held(one, kind, number, size) for one in scales])
                hold(layer, torch.randn(3, weight.shape[1]), weight, scale, None, scheme)


@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_parts_of_different_patterns_cannot_be_merged_once_packed(name: str, rank: Callable) -> None:
    config = config_of("packed", name, overrides={"m.k_proj": "4:6"})
    with pytest.raises(CheckpointError, match=r"layer m\.qkv_proj is merged of m\.q_proj \(6:8\), m.k_proj \(4:6\), m.v_proj \(6:8\)"):
        made("qkv_proj", "m.qkv_proj", config)
    config = config_of("packed", name, overrides={f"m.{one}_proj": "4:6" for one in "qkv"})
    assert str(made("qkv_proj", "m.qkv_proj", config).quant_method.pattern) == "4:6"


@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_weights_are_held_against_their_own_pattern_only(name: str, rank: Callable) -> None:
    """Weights that obey the pattern of other layers, but not the one that a twin claims for theirs."""
    one = part(8, 64, SCHEMES[name], "6:8")
    layer = layers.ColumnParallelLinear(
        64, 8, bias=False, quant_config=config_of("dense", name, overrides={"m.up_proj": "2:4"}), prefix="m.up_proj"
    )
    with pytest.raises(PatternError, match=r"layer m\.up_proj: obeys none of 2:4"):
        load(layer, {None: one}, "dense")
    layer = layers.ColumnParallelLinear(
        64, 8, bias=False, quant_config=config_of("dense", name, overrides={"m.up_proj": "2:4"}), prefix="m.o_proj"
    )
    load(layer, {None: one}, "dense")
    hold(layer, torch.randn(3, 64), one.weight, one.scale, None, SCHEMES[name])
