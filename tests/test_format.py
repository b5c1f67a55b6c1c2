"""config.json: round trips, every refusal, layer matching; names and shapes of the stored tensors."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidesparse.errors import CheckpointError
from slidesparse.format import SCHEMES, VERSION, PackedConfig, dense_tensors, packed_tensors, scheme_named
from slidesparse.packing import pack
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.select import DEFAULT_IGNORE, matches

SINGLE = [*KNOWN, Pattern.parse("12:16@4:8")]
PAIRS = [Pattern.parse("6:8x2"), Pattern.parse("8:10x2")]
NAMES = st.text(min_size=1, max_size=20)


@st.composite
def configs(draw: st.DrawFn) -> PackedConfig:
    """Any configuration that may be written: nvfp4 goes with pairs only."""
    scheme = draw(st.sampled_from(list(SCHEMES.values())))
    patterns = st.sampled_from(PAIRS if scheme.pair else SINGLE + PAIRS)
    overrides = draw(st.dictionaries(NAMES, patterns, max_size=3))
    in_features = draw(st.dictionaries(NAMES, st.integers(1, 1 << 20), max_size=3))
    return PackedConfig(draw(patterns), scheme, draw(st.lists(NAMES, max_size=3)), overrides, in_features)


@given(configs())
def test_round_trip_through_json(config):
    assert PackedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_pairs_are_asked_for_by_name():
    data = PackedConfig(PAIRS[0], SCHEMES["nvfp4"]).to_dict()
    with pytest.raises(CheckpointError, match=r"nvfp4 stores pairs.*6:8"):
        PackedConfig.from_dict(data | {"pattern": "6:8"})
    with pytest.raises(CheckpointError, match=r"nvfp4 stores pairs.*4:6"):
        PackedConfig.from_dict(data | {"overrides": {"a": "4:6"}})


def test_the_json_form():
    config = PackedConfig(Pattern(6, 8), SCHEMES["int8"], ["lm_head"], {"a.b": Pattern(2, 4)}, {"c": 20})
    assert config.to_dict() == {
        "quant_method": "slidesparse",
        "version": 1,
        "pattern": "6:8",
        "weights": {"dtype": "int8", "strategy": "channel", "symmetric": True},
        "activations": {"dtype": "int8", "strategy": "token", "dynamic": True, "symmetric": True},
        "ignore": ["lm_head"],
        "overrides": {"a.b": "2:4"},
        "in_features": {"c": 20},
    }
    assert PackedConfig(Pattern(6, 8), SCHEMES["bf16"]).to_dict()["activations"] is None
    assert PackedConfig(Pattern(6, 8), SCHEMES["nvfp4"]).to_dict()["weights"]["strategy"] == "tensor_group"
    assert config.pattern_of("a.b") == Pattern(2, 4) and config.pattern_of("a") == Pattern(6, 8)
    assert config.ignores("lm_head") and not config.ignores("model.lm_head")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, "version must be a positive integer"),
        ({"version": 0}, "version must be a positive integer, got 0"),
        ({"version": True}, "version must be a positive integer"),
        ({"version": "1"}, "version must be a positive integer"),
        ({"version": VERSION + 1}, "newer than this slidesparse reads"),
        ({"weights": None}, "weights must be an object with a dtype"),
        ({"weights": {}}, "weights must be an object with a dtype"),
        ({"weights": {"dtype": ["int8"]}}, "weights must be an object with a dtype"),
        ({"weights": {"dtype": "int4"}}, "unknown scheme 'int4': choose one of int8, fp8"),
        ({"pattern": None}, "cannot read pattern"),
        ({"pattern": "5:8"}, "supported ones that keep about as much: 2:4, 4:6, 6:8 (weights that are 5:8 obey 6:8)"),
        ({"ignore": "lm_head"}, "ignore must be a list of layer names"),
        ({"ignore": [1]}, "ignore must be a list of layer names"),
        ({"overrides": ["a"]}, "overrides must map layer names to str"),
        ({"overrides": {"a": 6}}, "overrides must map layer names to str"),
        ({"overrides": {"a": "7:8"}}, "supported ones that keep about as much: 12:14, 14:16, 16:18 (weights that are 7:8 obey 14:16)"),
        ({"activations": None}, "activations is None, which is not implemented: int8 layers compute with {'dtype': 'int8'"),
        ({"activations": {"dtype": "fp8"}}, "activations.dtype is 'fp8', which is not implemented: int8 layers compute with 'int8'"),
        ({"activations": {"dtype": "int8", "strategy": "tensor"}}, "activations.strategy is 'tensor', which is not implemented"),
        ({"activations": {"dtype": "int8", "dynamic": False}}, "activations.dynamic is False, which is not implemented"),
        ({"weights": {"dtype": "int8", "symmetric": False}}, "weights.symmetric is False, which is not implemented"),
        ({"weights": {"dtype": "int8", "strategy": "group"}}, "weights.strategy is 'group', which is not implemented"),
        ({"weights": {"dtype": "int8", "group_size": 128}}, "weights.group_size is 128, which is not implemented"),
        ({"weights": {"dtype": "bf16"}}, "activations is {'dtype': 'int8'"),
        ({"in_features": {"a": "20"}}, "in_features must map layer names to int"),
        ({"in_features": {"a": True}}, "in_features must map layer names to int"),
    ],
)
def test_bad_entries_are_named(change, message):
    good = PackedConfig(Pattern(6, 8), SCHEMES["int8"]).to_dict()
    with pytest.raises(CheckpointError) as error:
        PackedConfig.from_dict(good | change)
    assert message in str(error.value)


def test_optional_entries_may_be_missing():
    config = PackedConfig.from_dict({"version": 1, "pattern": "6:8", "weights": {"dtype": "fp8"}, "some_later_key": 1})
    assert (config.ignore, config.overrides, config.in_features) == ([], {}, {})


def test_unknown_scheme():
    with pytest.raises(ValueError, match="unknown scheme 'int2'"):
        scheme_named("int2")


def test_matches():
    assert matches("lm_head", ["lm_head"]) and not matches("lm_head2", ["lm_head"])
    assert matches("model.layers.3.mlp.gate", ["*.gate"]) and not matches("model.layers.3.mlp.gate_proj", ["*.gate"])
    assert matches("model.layers.3.q", ["x", "re:model\\.layers\\.[0-3]\\."]) and not matches("a.model.layers.3.", ["re:model"])
    assert not matches("LM_HEAD", ["lm_head"]) and not matches("anything", [])
    with pytest.raises(ValueError, match="bad regular expression 're:\\("):
        matches("layer", ["re:("])


def test_default_ignore_spares_what_is_no_plain_linear():
    for layer in ("lm_head", "model.embed_tokens", "transformer.wte", "model.norm", "model.layers.0.mlp.gate", "a.mlp.experts.3.w1"):
        assert matches(layer, DEFAULT_IGNORE), layer
    for layer in ("model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        assert not matches(layer, DEFAULT_IGNORE), layer


@pytest.mark.parametrize("name", ["int8", "fp8", "bf16", "fp16"])
def test_tensor_specs_are_what_pack_makes(name):
    scheme = SCHEMES[name]
    for pattern in KNOWN:
        for k in (16, 37, 3 * pattern.group):
            packed = pack(torch.zeros(5, k).to(scheme.dtype), pattern)
            values, keep, *scales = packed_tensors(scheme, pattern, 5, k)
            assert (values.suffix, values.dtype, values.shape) == ("weight_values", scheme.dtype, tuple(packed.values.shape))
            assert (keep.suffix, keep.dtype, keep.shape) == ("weight_keep", torch.uint8, tuple(packed.keep.shape))
            wanted = [("weight_scale", torch.float32, (5, 1))] if scheme.dynamic else []
            assert [(spec.suffix, spec.dtype, spec.shape) for spec in scales] == wanted
            dense, *dense_scales = dense_tensors(scheme, 5, k)
            assert (dense.suffix, dense.shape, dense_scales) == ("weight", (5, k), scales)


def test_tensor_specs_of_nvfp4():
    specs = packed_tensors(SCHEMES["nvfp4"], Pattern.parse("6:8x2"), 4, 64)
    assert [(spec.suffix, spec.shape) for spec in specs] == [
        ("weight_values", (4, 24)),
        ("weight_keep", (4, 4)),
        ("weight_scale", (4, 4)),
        ("weight_global_scale", (1,)),
    ]
    assert dense_tensors(SCHEMES["nvfp4"], 4, 64)[0].suffix == "weight_packed"
