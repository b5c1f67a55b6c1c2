"""Proof that a checkpoint is what it says: patterns, losslessness and the sliding identity, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import packing, reference
from ..errors import CheckpointError, SlideSparseError, WeightError
from ..format import Packed
from ..packing.codes import count_negative_zeros
from ..pattern import Pattern
from ..quantization import quantize_nvfp4, quantize_weight
from ..select import matches
from .configs import FindReader, contradictions
from .formats.compressed_tensors import METHOD
from .layers import Block, Layer
from .recipe import check_pattern
from .source import Checkpoint
from .tensorfile import TensorInfo, TensorReader

_COLUMNS = 2  # random vectors per block


@dataclass
class LayerVerdict:
    """One layer's result: ``reason`` is empty when everything holds."""

    name: str
    pattern: str
    rows: int
    reason: str = ""
    negative_zeros: int = 0
    masked_away: int = 0

    @property
    def ok(self) -> bool:
        """Whether the layer passed."""
        return not self.reason


@dataclass
class VerifyReport:
    """All layers' verdicts.

    ``other_tensors`` names tensors outside them that differ from the checkpoint compared against, ``contradictions`` says where config.json
    and the files disagree about which layers are quantised.
    """

    path: Path
    layers: list[LayerVerdict] = field(default_factory=list)
    other_tensors: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything passed."""
        return not self.other_tensors and not self.contradictions and all(layer.ok for layer in self.layers)


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    pattern: Pattern | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    find_reader: FindReader | None = None,
) -> VerifyReport:
    """Check every layer of a packed checkpoint or dense twin, on fresh random integers; ``pattern`` asks for one, whatever is claimed.

    Each block of rows: keep-bits are counted; restore → pack gives the stored bytes back; ``W·x == slide(W)·lift(x)`` exactly, the
    weights' bit patterns taken as integers. With ``against``: that checkpoint's weights under this one's mask, quantised the same
    way, are bitwise these, its other tensors too; ``masked_away`` counts its non-zeros that the mask removed, which must be none
    when it is masked itself. Which layers a compressed-tensors configuration says are quantised is held against the files;
    ``find_reader`` brings along how other libraries read it, as `slidesparse.verify` does.

    Raises:
        CheckpointError: the checkpoint cannot be opened, or makes no claim that could be verified.
        UnsupportedError: a pattern that a layer cannot have.
    """
    checkpoint = Checkpoint.open(path)
    other = Checkpoint.open(against) if against is not None else None
    claims = _claims(checkpoint, pattern)
    total = sum(layer.nbytes for layer, _ in claims)
    tensors, quantised = checkpoint.tensors, (checkpoint.config.get("quantization_config") or {}).get("quant_method") == METHOD
    others = find_reader(checkpoint.config, checkpoint.names) if find_reader and quantised else None
    report, done = VerifyReport(checkpoint.path, contradictions=contradictions(checkpoint.config, tensors, others)), 0
    with TensorReader() as reader:
        for layer, claimed in claims:
            report.layers.append(_verify_layer(reader, layer, claimed, other))
            done += layer.nbytes
            if progress:
                progress(done, total, layer.name)
        if other is not None:
            report.other_tensors = _different_tensors(reader, checkpoint, other, {layer.name for layer, _ in claims})
    return report


def _claims(checkpoint: Checkpoint, pattern: Pattern | None) -> list[tuple[Layer, Pattern]]:
    """The layers that say they obey a pattern, or those that are asked to, with it."""
    layers = [layer for layer in checkpoint.layers.values() if layer.pattern or not checkpoint.packed]
    layers = [layer for layer in layers if layer.pattern or (layer.by_default and not matches(layer.name, checkpoint.marked_ignore))]
    found = ((layer, pattern or layer.pattern or checkpoint.marked_pattern(layer.name)) for layer in layers)
    claims = [(layer, claimed) for layer, claimed in found if claimed is not None]
    if not claims:
        raise CheckpointError(f"{checkpoint.path} claims no pattern: nothing to verify; give --pattern to check one")
    for layer, claimed in claims:
        check_pattern(layer, layer.scheme, claimed)
    return claims


def _verify_layer(reader: TensorReader, layer: Layer, pattern: Pattern, other: Checkpoint | None) -> LayerVerdict:
    verdict = LayerVerdict(layer.name, str(pattern), layer.n)
    stored = layer.scheme.pattern_stored(pattern)
    try:
        twin = None if other is None else _twin(other, layer)
        theirs = iter(()) if twin is None else twin.blocks(reader)
        for block in layer.blocks(reader):
            verdict.negative_zeros += count_negative_zeros(block.values)
            packed = _repack(block, stored, layer)
            check_identity(block.values, packed, first_row=block.first)
            if twin is not None:
                verdict.masked_away += _compare(reader, layer, block, twin, next(theirs))
        if other is not None and verdict.masked_away and (other.marker or other.packed):
            raise WeightError(f"the mask removes {verdict.masked_away} non-zero weights of {other.path}, which is masked already")
    except SlideSparseError as error:
        verdict.reason = str(error)
    return verdict


def _repack(block: Block, pattern: Pattern, layer: Layer) -> Packed:
    packed = packing.pack(block.values, pattern, first_row=block.first)
    if block.packed is not None:
        own = layer.stored_pattern
        canonical = packed if pattern == own else packing.pack(block.values, own, first_row=block.first)
        for what in ("keep", "values"):
            row = _first_difference(getattr(canonical, what), getattr(block.packed, what))
            if row is not None:
                raise WeightError(f"weight_{what}: row {block.first + row} is not the canonical packing of the weights it restores to")
    return packed


def check_identity(dense: Tensor, packed: Packed, *, first_row: int = 0) -> None:
    """restore(pack(W)) is bitwise W, and ``W·x == slide(W)·lift(x)`` on fresh random integers.

    The weights' bit patterns are taken as integers, so that the products are exact in float64 whatever the weights' type.

    Raises:
        WeightError: a row differs.
    """
    clean = packing.without_negative_zeros(dense)
    row = _first_difference(clean, packing.restore(packed))
    if row is not None:
        raise WeightError(f"restore(pack(W)) differs from W in row {first_row + row}")
    x = torch.randint(-127, 128, (_COLUMNS, dense.shape[1]), dtype=torch.int32)
    direct = packing.integer_view(clean).double() @ x.double().t()
    slid = packing.integer_view(packing.slide(packed)).double() @ reference.lift(x, packed.pattern).double().t()
    if not torch.equal(direct, slid):
        row = int((direct != slid).any(-1).nonzero()[0])
        raise WeightError(f"W·x and slide(W)·lift(x) differ in row {first_row + row}")


def _twin(other: Checkpoint, layer: Layer) -> Layer:
    twin = other.layers.get(layer.name)
    if twin is None:
        raise CheckpointError(f"{other.path} has no layer {layer.name}")
    if (twin.n, twin.k) != (layer.n, layer.k):
        raise CheckpointError(f"{other.path}: layer {layer.name} is [{twin.n}, {twin.k}], here [{layer.n}, {layer.k}]")
    return twin


def _compare(reader: TensorReader, layer: Layer, block: Block, twin: Layer, theirs: Block) -> int:
    """Compare one block with the other checkpoint's; returns how many non-zeros of it are zero here.

    Their weights are taken where ours are not zero and quantised as ours were; a weight too small for its scale counts as zero.
    """
    convert = not (twin.read_scheme.dynamic or twin.read_scheme.pair) and twin.scheme is not layer.scheme
    mine = packing.without_negative_zeros(block.values)
    nonzero = _elements_nonzero(mine) if convert and layer.scheme.pair else _nonzero(mine)
    everything, scale = theirs.values, theirs.scale
    values = torch.where(nonzero, everything.float(), torch.zeros(())).to(everything.dtype)  # float32 holds every stored type
    if convert:
        values, scale = _quantize_like(reader, layer, values)
        everything, _ = _quantize_like(reader, layer, theirs.values)
    for what, a, b in (("weight", mine, packing.without_negative_zeros(values)), ("weight_scale", block.scale, scale)):
        row = None if a is None else 0 if b is None else _first_difference(a, b.to(a.dtype))
        if row is not None:
            raise WeightError(f"{what}: row {block.first + row} differs from {twin.main.path}")
    return int((_nonzero(everything) & ~_nonzero(mine)).sum())


def _nonzero(values: Tensor) -> Tensor:
    return values.float() != 0


def _elements_nonzero(pairs: Tensor) -> Tensor:
    """Which of the two 4-bit weights in each byte are not zero: ``[N, K/2]`` → ``[N, K]``."""
    return torch.stack((pairs & 7 != 0, pairs >> 4 & 7 != 0), dim=-1).flatten(1)


def _quantize_like(reader: TensorReader, layer: Layer, values: Tensor) -> tuple[Tensor, Tensor | None]:
    if layer.scheme.pair:
        return quantize_nvfp4(values, float(reader.read(layer.tensors["weight_global_scale"])))
    return quantize_weight(values, layer.scheme)


def _different_tensors(reader: TensorReader, checkpoint: Checkpoint, other: Checkpoint, layers: set[str]) -> list[str]:
    """Tensors that are no layer's and are missing on one side or not bitwise equal; layers stored otherwise are compared as weights."""
    as_stored = {name for name, layer in checkpoint.layers.items() if layer.restored} | layers
    restored = {name for name, twin in other.layers.items() if twin.restored and f"{name}.weight" in checkpoint.tensors} - as_stored
    mine, theirs = _rest(checkpoint, layers), _rest(other, layers | restored)
    mine = {name: info for name, info in mine.items() if name.rpartition(".")[0] not in restored}
    different = sorted(mine.keys() ^ theirs.keys())
    different += sorted(name for name in restored if not _restores(reader, checkpoint, name, other.layers[name]))
    for name in mine.keys() & theirs.keys():
        a, b = mine[name], theirs[name]
        if (a.dtype_name, a.shape) != (b.dtype_name, b.shape):
            different.append(name)
            continue
        step = 8 << 20
        for offset in range(0, a.nbytes, step):
            size = min(step, a.nbytes - offset)
            if not torch.equal(reader.read_bytes(a, offset, size), reader.read_bytes(b, offset, size)):
                different.append(name)
                break
    return different


def _rest(checkpoint: Checkpoint, layers: set[str]) -> dict[str, TensorInfo]:
    """The tensors that belong to none of these layers."""
    own = {info.name for name in layers & checkpoint.layers.keys() for info in checkpoint.layers[name].tensors.values()}
    return {name: info for name, info in checkpoint.tensors.items() if name not in own}


def _restores(reader: TensorReader, checkpoint: Checkpoint, name: str, twin: Layer) -> bool:
    """Whether the tensors with the weights and scales of a layer are bitwise what its stored form restores to."""
    weight, scale = checkpoint.tensors[f"{name}.weight"], checkpoint.tensors.get(f"{name}.weight_scale")
    if weight.shape not in ((twin.n, twin.k), (twin.k,)):
        return False
    for block in twin.blocks(reader):
        rows = block.first, block.first + len(block.values)
        mine = reader.read(weight).view(1, -1) if twin.vector else reader.read_rows(weight, *rows)
        if mine.dtype != block.values.dtype or _first_difference(mine, block.values) is not None:
            return False
        if scale is None or block.scale is None:
            if scale is not None or block.scale is not None:
                return False
        elif not torch.equal(reader.read_rows(scale, *rows), block.scale):
            return False
    return True


def _first_difference(a: Tensor, b: Tensor) -> int | None:
    """The first row that is not bitwise equal, None if all are."""
    if a.shape != b.shape:
        return 0
    different = (packing.integer_view(a) != packing.integer_view(b)).flatten(1).any(-1)
    return int(different.nonzero()[0]) if bool(different.any()) else None
