"""What advice is asked about: the linear layers of a model, merged as serving engines hold them, and how often each shape is there."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from ..checkpoint import Checkpoint
from ..checkpoint.source import read_config
from ..errors import CheckpointError
from ..format import SCHEMES
from ..gemm.tune import LinearShape
from ..integrations.engine.shapes import checkpoint_layers, merged_layers
from ..integrations.reading import linear_layers
from ..pattern import Pattern
from .models import MODELS, Shape

_SHAPE = re.compile(r"(\d+)[x×,](\d+)")


def shapes_of(target: str) -> Counter[Shape]:
    """N and K of the merged linear layers behind a target, and how many of each there are.

    Args:
        target: a folder, with weights or with config.json alone; a config.json; a model of `MODELS`; a name on the hub; or NxK.

    Raises:
        CheckpointError: none of these, or nothing linear in it.
        UnsupportedError: a configuration alone that transformers is needed for, or that it cannot build.
    """
    match = _SHAPE.fullmatch(target.strip())
    if match is not None:
        n, k = int(match[1]), int(match[2])
        if not n or not k:
            raise CheckpointError(f"{target!r} is no shape: write NxK, for example 4096x14336")
        return Counter({(n, k): 1})
    if target in MODELS and not Path(target).exists():
        shape = MODELS[target]
        return Counter(dict.fromkeys(shape.linears.values(), shape.layers))
    layers = {name: LinearShape(n, k, Pattern(6, 8), SCHEMES["int8"]) for name, (n, k) in _linears(target).items()}
    found = Counter((layer.n, layer.k) for layer in merged_layers(layers).values())
    if not found:
        raise CheckpointError(f"{target}: no linear layers in it")
    return found


def _linears(target: str) -> dict[str, Shape]:
    path = Path(target)
    if path.is_dir() and any(path.glob("*.safetensors")):
        Checkpoint.open(path)
        return {name: (layer.n, layer.k) for name, layer in checkpoint_layers(path).items()}
    if path.is_dir():
        return linear_layers(read_config(path))
    if not path.is_file():
        from ..integrations.hub import config_file

        path = config_file(target)
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a config.json: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a model configuration")
    return linear_layers(config)
