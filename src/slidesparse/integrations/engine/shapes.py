"""The linear layers of a model as serving engines hold them: merged, cut by rank, behind SwiGLU, as their names say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...checkpoint import Checkpoint, inspect
from ...format import MERGED, SCHEMES, scheme_named
from ...gemm.tune import LinearShape
from ...packing import Shard
from ...pattern import Pattern

_ROW_PARALLEL = ("o_proj", "out_proj", "wo", "down_proj", "fc2", "w2", "c_proj", "dense", "dense_4h_to_h")


def merged_layers(layers: Mapping[str, LinearShape]) -> dict[str, LinearShape]:
    """A model's layers by name as serving engines hold them: q, k and v as one, gate and up as one, the others as they are."""
    found = dict(layers)
    for name, first in layers.items():
        head, _, tail = name.rpartition(".")
        for merged, parts in MERGED.items():
            whole = {f"{head}.{part}": layers.get(f"{head}.{part}") for part in parts}
            if tail == parts[0] and all(part is not None and replace(part, n=first.n) == first for part in whole.values()):
                found[f"{head}.{merged}"] = replace(first, n=sum(part.n for part in whole.values() if part is not None))
                for part in whole:
                    del found[part]
    return found


def rank_layers(layers: Mapping[str, LinearShape], ranks: int) -> list[LinearShape]:
    """The distinct layers that ``ranks`` tensor-parallel ranks hold: part of the rows, or of the columns where outputs are summed.

    Columns that begin inside a group are widened to its start, see `slidesparse.packing.Shard`. Layers that cannot be divided are left out.
    Names say which layers are split by columns. Layers that every rank holds whole are not known here, nor are key and value heads that
    ranks repeat because they are fewer: give such shapes by hand.
    """
    found: dict[LinearShape, None] = {}
    for name, layer in layers.items():
        if name.rpartition(".")[2] not in _ROW_PARALLEL:
            if layer.n % ranks == 0:
                found[replace(layer, n=layer.n // ranks)] = None
        elif layer.k % ranks == 0:
            for rank in range(ranks):
                shard = Shard.even(layer.pattern, layer.k, rank, ranks)
                found[replace(layer, k=shard.columns + sum(shard.margins))] = None
    return list(found)


def follows_swiglu(name: str, activation: str | None) -> bool:
    """Whether a layer of this name, in a model of this activation, reads silu(gate) · up in the graph; experts, shared ones too, do not."""
    return activation in ("silu", "swish") and name.rpartition(".")[2] in ("down_proj", "w2") and "expert" not in name


def checkpoint_layers(model: Path, pattern: Pattern | None = None, scheme: str | None = None) -> dict[str, LinearShape]:
    """The linear layers of a checkpoint that plans know (not packed nvfp4), by name.

    ``pattern`` and ``scheme`` are for layers of which the checkpoint says neither: 6:8 and int8 by default.

    Raises:
        CheckpointError: as `slidesparse.inspect`.
    """
    found: dict[str, LinearShape] = {}
    for layer in inspect(model, scan=False).layers:
        stored = layer.form == "packed"
        if stored and SCHEMES[layer.scheme].pair:
            continue
        told = layer.scheme in SCHEMES and (stored or (scheme is None and SCHEMES[layer.scheme].dynamic))
        own = layer.scheme if told else scheme or "int8"
        text = layer.pattern if stored and layer.pattern else str(pattern or layer.pattern or "6:8")
        found[layer.name] = LinearShape(layer.n, layer.k, Pattern.parse(text), scheme_named(own))
    return found


def served_layers(layers: Mapping[str, LinearShape], ranks: int = 1) -> list[LinearShape]:
    """The distinct layers that each of an engine's ranks holds."""
    return rank_layers(merged_layers(layers), ranks)


def layers_behind_swiglu(model: Path, layers: Mapping[str, LinearShape], ranks: int = 1) -> frozenset[LinearShape]:
    """Those of `served_layers`, 8 bits in a bfloat16 model, whose input is silu(gate) · up."""
    config = Checkpoint.open(model).config
    text = config.get("text_config") or config
    activation = text.get("hidden_act") if (text.get("dtype") or text.get("torch_dtype")) == "bfloat16" else None
    behind = {name: layer for name, layer in layers.items() if layer.scheme.dynamic and follows_swiglu(name, activation)}
    return frozenset(served_layers(behind, ranks))
