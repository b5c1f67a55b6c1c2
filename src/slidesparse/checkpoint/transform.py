"""One block of rows of one layer: prune, quantise, store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import pack, prune
from ..errors import PatternError, WeightError
from ..format import TensorSpec, dense_tensors, packed_tensors
from ..pattern import KNOWN, Pattern
from ..quant import nvfp4_global_scale, quantize_nvfp4, quantize_weight
from .layers import Form, Layer
from .recipe import LayerPlan, Recipe
from .rows import Block, largest_magnitude, mean_magnitude, read_block, row_ranges
from .tensorfile import TensorReader

Advance = Callable[[int], None]


def output_specs(plan: LayerPlan, recipe: Recipe) -> tuple[TensorSpec, ...]:
    """Tensors the layer becomes."""
    layer = plan.layer
    if plan.scheme is None:
        return (TensorSpec("weight", torch.float32, (layer.n, layer.k)),)
    if recipe.form == "packed":
        return packed_tensors(plan.scheme, plan.pattern, layer.n, layer.k)
    return dense_tensors(plan.scheme, layer.n, layer.k)


def transform(
    reader: TensorReader, plan: LayerPlan, recipe: Recipe, advance: Advance, device: str = "cpu"
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (tensor suffix, first row, rows) until every row of every output tensor has been given; computes on ``device``.

    Raises:
        PatternError: a group violates the pattern; names layer, row, group and values.
        CheckpointError: NaN or Inf; names the layer.
        WeightError: a weight that does not fit the type asked for; names the layer.
    """
    layer = plan.source
    mean = mean_magnitude(reader, layer) if layer.form is Form.MASTER else None
    global_scale = _global_scale(reader, plan)
    if global_scale is not None:
        yield "weight_global_scale", 0, global_scale
    for first, last in row_ranges(layer.n, layer.k, device):
        block = read_block(reader, layer, first, last, mean).to(device)
        try:
            yield from _store(_quantize(_prune(block, plan, recipe), plan, global_scale), plan, recipe)
        except PatternError as error:
            raise PatternError(f"layer {layer.name}: {error}", row=error.row, group=error.group, values=error.values) from error
        except WeightError as error:
            raise WeightError(f"layer {layer.name}: {error}") from error
        advance((last - first) * plan.layer.main.nbytes // max(layer.n, 1))


def detect_pattern(reader: TensorReader, layer: Layer, advance: Advance, *, unit: int = 1) -> Pattern:
    """The tightest known pattern a layer obeys, in units of ``unit`` weights (nvfp4 layers: always pairs).

    Raises:
        PatternError: it obeys none; names the first group that violates the widest.
    """
    pairs_stored = layer.scheme is not None and layer.scheme.pair
    candidates = [Pattern(p.kept, p.group, unit=1 if pairs_stored else unit) for p in KNOWN]
    mean = mean_magnitude(reader, layer) if layer.form is Form.MASTER else None
    for first, last in row_ranges(layer.n, layer.k):
        values = read_block(reader, layer, first, last, mean).values
        for pattern in list(candidates):
            violation = pack.find_violation(values, pattern, first_row=first)
            if violation is None:
                continue
            candidates.remove(pattern)
            if not candidates:
                raise PatternError(
                    f"layer {layer.name} obeys no pattern from {KNOWN[0]} to {KNOWN[-1]}: {violation}. "
                    "Prune it, or leave it dense with --ignore",
                    row=violation.row,
                    group=violation.group,
                    values=violation.values,
                )
        advance((last - first) * layer.main.nbytes // max(layer.n, 1))
    tightest = candidates[0]
    return Pattern(tightest.kept, tightest.group, unit=2 if pairs_stored else unit)


def _global_scale(reader: TensorReader, plan: LayerPlan) -> Tensor | None:
    if plan.scheme is None or not plan.scheme.pair:
        return None
    if plan.source.form is Form.FLOAT:
        return torch.tensor([nvfp4_global_scale(largest_magnitude(reader, plan.source))])
    return reader.read(plan.source.tensors["weight_global_scale"]).float()


def _prune(block: Block, plan: LayerPlan, recipe: Recipe) -> Block:
    if recipe.method is None or recipe.calibrated:
        return block
    # Seeded by place, so that a resumed run makes the same choices.
    place = hashlib.sha256(f"{recipe.seed}/{plan.layer.name}/{block.first}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(place[:7], "little"))
    pruned = prune.prune(block.values, plan.pattern, recipe.method, statistics=plan.statistics, generator=generator)
    return Block(block.first, pruned, block.scale)


def _quantize(block: Block, plan: LayerPlan, global_scale: Tensor | None) -> Block:
    if not plan.requantize or plan.scheme is None:
        return block
    if plan.scheme.pair:
        return Block(block.first, *quantize_nvfp4(block.values, float(global_scale), first_row=block.first))
    return Block(block.first, *quantize_weight(block.values, plan.scheme, first_row=block.first))


def _store(block: Block, plan: LayerPlan, recipe: Recipe) -> Iterator[tuple[str, int, Tensor]]:
    scheme, pattern = plan.scheme, plan.pattern
    stored = None if pattern is None else pattern if scheme is None else scheme.pattern_stored(pattern)
    if recipe.form == "packed":
        try:
            packed = pack.pack(block.values, stored)
        except PatternError as error:
            raise pack.find_violation(block.values, stored, first_row=block.first) or error from error
        yield "weight_values", block.first, packed.values
        yield "weight_keep", block.first, packed.keep
    else:
        if stored is not None and recipe.method is None and (violation := pack.find_violation(block.values, stored, first_row=block.first)):
            raise violation
        yield "weight_packed" if scheme is not None and scheme.pair else "weight", block.first, block.values
    if block.scale is not None:
        yield "weight_scale", block.first, block.scale
