"""What advice is asked about: the linear layers of a model, merged as serving engines hold them, and how often each shape is there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.source import read_config
from ..errors import CheckpointError, UnsupportedError
from ..format import SCHEMES
from ..gemm.tune import LinearShape
from ..integrations.engine.shapes import checkpoint_layers, merged_layers
from ..integrations.reading import described
from ..pattern import Pattern
from .models import MODELS, Shape, shape_of

Weights = Mapping[str, tuple[tuple[int, ...], int]]


@dataclass(frozen=True)
class Target:
    """N and K of the merged linear layers behind a target, how many of each there are, and what to keep in mind of the others."""

    shapes: Counter[Shape]
    notes: tuple[str, ...] = ()


def target_of(target: str) -> Target:
    """What is asked about.

    Args:
        target: a folder, with weights or with config.json alone; a config.json; a model of `MODELS`; a name on the hub; or NxK.

    Raises:
        CheckpointError: none of these, or nothing linear in it.
        UnsupportedError: a configuration alone that transformers is needed for, or that it cannot build; or experts are most of it.
    """
    if shape := shape_of(target):
        return Target(Counter({shape: 1}))
    if target in MODELS and not Path(target).exists():
        model = MODELS[target]
        return Target(Counter(dict.fromkeys(model.linears.values(), model.layers)))
    linears, weights = _described(target)
    notes = _experts(target, weights)
    layers = {name: LinearShape(n, k, Pattern(6, 8), SCHEMES["int8"]) for name, (n, k) in linears.items()}
    found = Counter((layer.n, layer.k) for layer in merged_layers(layers).values())
    if not found:
        raise CheckpointError(f"{target}: no linear layers in it")
    return Target(found, notes)


def _experts(target: str, weights: Weights) -> tuple[str, ...]:
    """A note where a model has experts, which are not pruned: stacks of matrices, or a matrix each."""
    stacks = {name: each for name, each in weights.items() if len(each[0]) > 1 and _of_experts(name, each[0])}
    if not stacks:
        return ()
    count = sum(prod(shape[:-2]) for shape, _ in stacks.values())
    size, all_of_it = (sum(nbytes for _, nbytes in each.values()) for each in (stacks, weights))
    told = f"{count} matrices of experts, {size / 1e9:.3g} GB or {size / all_of_it:.0%} of all weights, stay dense"
    if 2 * size > all_of_it:
        raise UnsupportedError(f"{target}: {told}: advice about the other layers would say little; give shapes NxK to ask about some")
    return (f"{told}: neither their bytes nor their time is counted here.",)


def _of_experts(name: str, shape: tuple[int, ...]) -> bool:
    return ".experts." in name or (len(shape) == 3 and "conv" not in name)


def _described(target: str) -> tuple[dict[str, Shape], Weights]:
    """Linear layers, and shapes and bytes of all weights."""
    path = Path(target)
    if path.is_dir() and any(path.glob("*.safetensors")):
        stored = Checkpoint.open(path).tensors
        linears = {name: (layer.n, layer.k) for name, layer in checkpoint_layers(path).items()}
        return linears, {name: (tuple(info.shape), info.nbytes) for name, info in stored.items()}
    if path.is_dir():
        return _empty(read_config(path))
    if not path.is_file():
        from ..integrations.hub import config_file

        path = config_file(target)
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a config.json: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a model configuration")
    return _empty(config)


def _empty(config: dict[str, Any]) -> tuple[dict[str, Shape], Weights]:
    """Of a configuration alone; bytes are those of 16 bits a weight."""
    model = described(config)
    return model.linears, {name: (shape, 2 * prod(shape)) for name, shape in model.weights.items()}
