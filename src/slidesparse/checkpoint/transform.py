"""One block of rows of one layer: prune, quantise, store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .. import packing, pruning
from ..errors import PatternError, WeightError
from ..format import TensorSpec, dense_tensors, packed_tensors
from ..pattern import KNOWN, Pattern
from ..quantization import nvfp4_global_scale, quantize_nvfp4, quantize_weight
from .layers import Block, Layer
from .recipe import LayerPlan, Recipe
from .tensorfile import TensorReader

Advance = Callable[[int], None]


def output_specs(plan: LayerPlan, recipe: Recipe) -> tuple[TensorSpec, ...]:
    """Tensors the layer becomes."""
    n, k, pattern = plan.layer.n, plan.layer.k, _packs(plan, recipe)
    if pattern is not None:
        return packed_tensors(plan.scheme, pattern, n, k)
    specs = dense_tensors(plan.scheme, n, k)
    return (replace(specs[0], shape=(k,)),) if plan.layer.vector else specs


def _packs(plan: LayerPlan, recipe: Recipe) -> Pattern | None:
    """The pattern in which the layer is packed; those without one in a packed checkpoint stay dense."""
    return plan.pattern if recipe.form == "packed" else None


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
    global_scale = _global_scale(reader, plan)
    if global_scale is not None:
        yield "weight_global_scale", 0, global_scale
    for block in layer.blocks(reader, device):
        try:
            yield from _store(_quantize(_prune(block, plan, recipe), plan, global_scale), plan, recipe)
        except PatternError as error:
            raise error.reworded(f"layer {layer.name}: {error}") from error
        except WeightError as error:
            raise WeightError(f"layer {layer.name}: {error}") from error
        advance(_share(plan.layer, block))


def detect_pattern(reader: TensorReader, layer: Layer, advance: Advance, *, unit: int = 1) -> Pattern:
    """The tightest known pattern a layer obeys, in units of ``unit`` weights (nvfp4 layers: always pairs).

    Raises:
        PatternError: it obeys none; names the first group that violates the widest.
    """
    unit = 2 if layer.scheme.pair else unit
    candidates = [layer.scheme.pattern_stored(replace(pattern, unit=unit)) for pattern in KNOWN]

    def rows() -> Iterator[tuple[int, Tensor]]:
        for block in layer.blocks(reader):
            yield block.first, block.values
            advance(_share(layer, block))

    try:
        return replace(packing.detect(rows(), candidates), unit=unit)
    except PatternError as error:
        way_out = "Prune it, or leave it dense with --ignore" if "packed" in layer.may_stay else "Prune it"
        raise error.reworded(f"layer {layer.name} obeys no pattern from {KNOWN[0]} to {KNOWN[-1]}: {error}. {way_out}") from error


def _share(layer: Layer, block: Block) -> int:
    """The stored bytes of a block's weights."""
    return block.values.shape[0] * layer.main.nbytes // max(layer.n, 1)


def _global_scale(reader: TensorReader, plan: LayerPlan) -> Tensor | None:
    if not plan.scheme.pair:
        return None
    if not plan.requantize:
        return reader.read(plan.source.tensors["weight_global_scale"]).float()
    largest = (float(block.values.float().abs().max()) for block in plan.source.blocks(reader) if block.values.numel())
    return torch.tensor([nvfp4_global_scale(max(largest, default=0.0))])


def _prune(block: Block, plan: LayerPlan, recipe: Recipe) -> Block:
    if recipe.method is None or recipe.calibrated or plan.pattern is None:
        return block
    # Seeded by place, so that a resumed run makes the same choices.
    place = hashlib.sha256(f"{recipe.seed}/{plan.layer.name}/{block.first}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(place[:7], "little"))
    # Not through the door of `prune`, which looks at every weight again: the plan was checked, and so was the block.
    method = pruning.METHODS[recipe.method]
    needs = (plan.statistics,) if method.calibrated else (0, generator)
    return Block(block.first, method.run(block.values, plan.pattern, *needs), block.scale)


def _quantize(block: Block, plan: LayerPlan, global_scale: Tensor | None) -> Block:
    if not plan.requantize:
        return block
    if global_scale is not None:
        return Block(block.first, *quantize_nvfp4(block.values, float(global_scale), first_row=block.first))
    return Block(block.first, *quantize_weight(block.values, plan.scheme, first_row=block.first))


def _store(block: Block, plan: LayerPlan, recipe: Recipe) -> Iterator[tuple[str, int, Tensor]]:
    scheme, pattern = plan.scheme, plan.pattern
    stored = None if pattern is None else scheme.pattern_stored(pattern)
    if stored is not None and _packs(plan, recipe) is not None:
        packed = packing.pack(block.values, stored, first_row=block.first)
        yield "weight_values", block.first, packed.values
        yield "weight_keep", block.first, packed.keep
    else:
        violation = None
        if stored is not None and recipe.method is None:
            violation = packing.find_violation(block.values, stored, first_row=block.first)
        if violation:
            raise violation
        # A twin holds what the packed form gives back.
        values = block.values if stored is None else packing.without_negative_zeros(block.values)
        yield "weight_packed" if scheme.pair else "weight", block.first, values
    if block.scale is not None:
        yield "weight_scale", block.first, block.scale
