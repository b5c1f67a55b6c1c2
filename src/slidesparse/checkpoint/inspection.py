"""What a checkpoint is: forms, patterns, shapes, bytes against dense, and what violates its pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import packing
from ..errors import CheckpointError, PatternError
from ..select import DEFAULT_IGNORE, matches
from .layers import Layer
from .source import Checkpoint
from .tensorfile import TensorReader
from .transform import detect_pattern


@dataclass
class InspectedLayer:
    """One linear layer: stored and dense bytes (same element type), the pattern it claims or was found to obey, and what violates it."""

    name: str
    n: int
    k: int
    form: str
    scheme: str
    pattern: str | None
    nbytes: int
    dense_nbytes: int
    problem: str | None = None


@dataclass
class Inspection:
    """A checkpoint's summary; ``scanned`` says whether the weights themselves were read."""

    path: Path
    architecture: str
    kind: str
    pattern: str | None
    scheme: str
    nbytes: int
    layers: list[InspectedLayer]
    scanned: bool

    @property
    def layer_bytes(self) -> int:
        """Bytes of all linear layers listed."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_layer_bytes(self) -> int:
        """Bytes the same layers take in dense form."""
        return sum(layer.dense_nbytes for layer in self.layers)

    @property
    def problems(self) -> list[InspectedLayer]:
        """Layers that contradict the pattern they claim."""
        return [layer for layer in self.layers if layer.problem]


def inspect(path: str | Path, *, scan: bool = True, progress: Callable[[int, int, str], None] | None = None) -> Inspection:
    """Describe a checkpoint directory; with ``scan`` the weights are read too, to find patterns and violations.

    Raises:
        CheckpointError: the directory cannot be read as a checkpoint.
    """
    checkpoint = Checkpoint.open(path)
    unlisted = (*DEFAULT_IGNORE, *checkpoint.of_vocabulary)
    layers = [layer for layer in checkpoint.layers.values() if layer.pattern or not matches(layer.name, unlisted)]
    total, done, rows = sum(layer.nbytes for layer in layers), 0, []
    with TensorReader() as reader:
        for layer in layers:
            rows.append(_inspect_layer(reader, checkpoint, layer, scan))
            done += layer.nbytes
            if progress:
                progress(done, total, layer.name)
    plain = all(layer.scheme.bound is None and not layer.scheme.pair for layer in checkpoint.layers.values())
    kind = "packed" if checkpoint.packed else "dense twin" if checkpoint.marker else "dense" if plain else "quantised"
    patterns = {row.pattern for row in rows}
    claimed = checkpoint.packed.pattern if checkpoint.packed else (checkpoint.marker or {}).get("pattern")
    pattern = str(claimed) if claimed else next(iter(patterns)) if len(patterns) == 1 else None
    schemes = sorted({row.scheme for row in rows})
    architectures = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "unknown")]
    return Inspection(checkpoint.path, str(architectures[0]), kind, pattern, ", ".join(schemes), checkpoint.nbytes, rows, scan)


def _inspect_layer(reader: TensorReader, checkpoint: Checkpoint, layer: Layer, scan: bool) -> InspectedLayer:
    claimed = layer.pattern or checkpoint.marked_pattern(layer.name)
    pattern, sizes = str(claimed) if claimed else None, (layer.nbytes, layer.dense_nbytes)
    row = InspectedLayer(layer.name, layer.n, layer.k, layer.holds, layer.scheme.name, pattern, *sizes)
    if not scan:
        return row
    try:
        if claimed is None:
            row.pattern = str(detect_pattern(reader, layer, lambda nbytes: None))
            return row
        for block in layer.blocks(reader):
            violation = packing.find_violation(block.values, layer.scheme.pattern_stored(claimed), first_row=block.first)
            if violation is not None:
                row.problem = str(violation)
                break
    except PatternError:
        row.pattern = None  # a dense layer that was never pruned claims nothing and violates nothing
    except CheckpointError as error:
        row.problem = str(error)
    return row
