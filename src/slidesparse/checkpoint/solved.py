"""What a calibrated method hands to the conversion: solved layers, block by block, in files beside the output's shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..format import Scheme, dense_tensors
from .formats.compressed_tensors import Quantized
from .formats.floating import Floating
from .layers import tensors_of
from .recipe import LayerPlan, Recipe
from .source import Checkpoint
from .tensorfile import DTYPE_NAMES, TensorInfo, TensorWriter, read_header

REPORT = "pruning_report.json"
"""The output's side file with the `PruningReport`."""
_NAME = "block-{:05d}.solved.safetensors"
_METADATA = "report"
INPUT_NORMS = "input_norms"
"""What follows a layer's name where a solved block holds the norms of its inputs, float32 ``[K]``."""


@dataclass(frozen=True)
class Job:
    """What a solver is asked for: the plans' layers pruned and rounded, written to ``folder`` by `write_block`.

    ``progress`` is called with weights' bytes done, bytes in all, and what is being worked on.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    plans: tuple[LayerPlan, ...]
    folder: Path
    device: str
    progress: Callable[[int, int, str], None]


@dataclass
class PruningReport:
    """How a calibrated method went: where its samples came from, and per block the layers' methods and errors."""

    method: str
    calibration: str
    blocks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """Method and relative output error of every layer, by name."""
        return {name: layer for block in self.blocks for name, layer in block["layers"].items()}


Solver = Callable[[Job], PruningReport]


def block_file(folder: Path, index: int) -> Path:
    """Where a solved block lies."""
    return folder / _NAME.format(index)


def write_block(folder: Path, index: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
    """Write a block's solved tensors, by their names in the checkpoint: values, scales where quantised, norms; whole or not at all."""
    specs = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape), math.prod(t.shape) * t.element_size()) for name, t in tensors.items()}
    with TensorWriter(block_file(folder, index), specs, {"format": "pt", _METADATA: json.dumps(report)}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor.detach().cpu())


def read_block(folder: Path, index: int) -> tuple[dict[str, TensorInfo], dict[str, Any]] | None:
    """Tensors and report of a solved block, None where it is not there yet."""
    path = block_file(folder, index)
    if not path.exists():
        return None
    tensors, metadata = read_header(path)
    return tensors, json.loads(metadata[_METADATA])


def read_report(folder: Path) -> PruningReport | None:
    """The report that an earlier run left once all its blocks were solved, None where there is none."""
    path = folder / REPORT
    return PruningReport(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def remove_blocks(folder: Path) -> None:
    """Remove every solved block."""
    for path in folder.glob(_NAME.replace("{:05d}", "*")):
        path.unlink()


def with_solved(plans: list[LayerPlan], folder: Path) -> list[LayerPlan]:
    """The plans with their layers' rows in the solved files."""
    tensors = _solved_tensors(folder)
    done = []
    for plan in plans:
        layer, scheme = plan.layer, solved_scheme(plan)
        kind = Quantized if scheme.dynamic else Floating
        own = tensors_of(layer.name, ("weight", "weight_scale"), tensors)
        done.append(replace(plan, solved=kind(layer.name, layer.n, layer.k, scheme, own)))
    return done


def solved_norms(plans: list[LayerPlan], folder: Path) -> dict[str, TensorInfo]:
    """Norms of the inputs that the solved files hold, by layer."""
    tensors = _solved_tensors(folder)
    names = {plan.layer.name: f"{plan.layer.name}.{INPUT_NORMS}" for plan in plans}
    return {layer: tensors[name] for layer, name in names.items() if name in tensors}


def _solved_tensors(folder: Path) -> dict[str, TensorInfo]:
    return {name: info for path in sorted(folder.glob(_NAME.replace("{:05d}", "*"))) for name, info in read_header(path)[0].items()}


def solved_scheme(plan: LayerPlan) -> Scheme:
    """How a solver stores a layer: as the output will, nvfp4 excepted, which the conversion rounds to."""
    return plan.layer.scheme if plan.scheme.pair else plan.scheme


def solved_bytes(plan: LayerPlan) -> int:
    """Bytes of a solved layer, scales included."""
    return sum(spec.nbytes for spec in dense_tensors(solved_scheme(plan), plan.layer.n, plan.layer.k))
