"""Layers as serving engines hold them: merged, cut by rank, behind SwiGLU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slidesparse.format import SCHEMES
from slidesparse.gemm.tune import LinearShape
from slidesparse.integrations.engine.shapes import follows_swiglu, merged_layers, rank_layers
from slidesparse.pattern import Pattern


def one(n: int, scheme: str = "int8") -> LinearShape:
    return LinearShape(n, 64, Pattern(6, 8), SCHEMES[scheme])


def test_merged_layers_are_those_of_serving_engines() -> None:
    layers = {f"layers.{i}.attn.{name}": one(n) for i in range(2) for name, n in (("q_proj", 64), ("k_proj", 16), ("v_proj", 16))}
    layers |= {"layers.0.mlp.gate_proj": one(96), "layers.0.mlp.up_proj": one(96), "layers.1.mlp.gate_proj": one(96)}
    layers |= {"layers.1.mlp.up_proj": one(96, "fp8"), "layers.0.mlp.down_proj": one(64)}
    merged = merged_layers(layers)
    assert merged == {
        "layers.0.attn.qkv_proj": one(96), "layers.1.attn.qkv_proj": one(96), "layers.0.mlp.gate_up_proj": one(192),
        "layers.1.mlp.gate_proj": one(96), "layers.1.mlp.up_proj": one(96, "fp8"), "layers.0.mlp.down_proj": one(64),
    }  # fmt: skip
    assert rank_layers(merged, 1) == list(dict.fromkeys(merged.values()))


def test_ranks_hold_rows_or_columns_widened_where_a_group_is_cut() -> None:
    layer = LinearShape(64, 3584, Pattern(4, 6), SCHEMES["int8"])
    found = rank_layers({"a.qkv_proj": layer, "a.o_proj": layer, "b.odd_proj": replace(layer, n=63)}, 2)
    # The second rank begins at column 1792, 4 past the start of a group: 4 zeros to its left, 28 to its right make 57 · 32 columns.
    assert found == [replace(layer, n=32), replace(layer, k=1792), replace(layer, k=1824)]


@pytest.mark.parametrize(
    ("activation", "name", "follows"),
    [("silu", "model.layers.0.mlp.down_proj", True), ("swish", "w2", True), ("silu", "m.o_proj", False), ("gelu", "m.down_proj", False),
     (None, "m.down_proj", False), ("silu", "m.mlp.shared_expert.down_proj", False)],
)  # fmt: skip
def test_which_layers_follow_swiglu(activation: str | None, name: str, follows: bool) -> None:
    assert follows_swiglu(name, activation) == follows
