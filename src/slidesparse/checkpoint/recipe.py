"""What a conversion does, and what that means for each layer; every contradiction is found here, before the long job starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError, WeightError
from ..format import BLOCK, FP32, FP64, SCHEMES, Scheme, scheme_named
from ..pattern import Pattern
from ..pruning import METHODS, Statistics
from ..select import DEFAULT_IGNORE, NOT_LINEAR, matches
from .calibration import Calibration, sha256_of
from .layers import Layer
from .norms import read_norms
from .overrides import check_overrides, override_of
from .source import Checkpoint

AUTO = "auto"
"""The best method there is: ``admm``, the better of ADMM and SparseGPT in each layer, with reconstruction of the blocks."""

RECONSTRUCTION_STEPS = 300

RECONSTRUCTION = 2
"""Another number with every change of what reconstruction trains to: a job goes on from blocks that its own kind has solved."""


@dataclass(frozen=True)
class Recipe:
    """One streaming pass over a checkpoint: prune, then quantise, then store.

    Attributes:
        pattern: what the layers obey afterwards; without ``method`` they must obey it already (None: as marked, else detected).
        method: how to prune: a name in `slidesparse.pruning.METHODS`, ``auto`` for ``admm`` with reconstruction of the blocks, or None.
        scheme: ``int8``, ``fp8``, ``bf16``, ``fp16``, ``nvfp4``; None keeps the layers' own.
        form: ``packed``, or ``dense`` for the portable twin.
        ignore: layers to leave alone besides `select.DEFAULT_IGNORE`.
        only: when given, the only layers to convert; naming a layer exactly overrides the default ignore, and the choice of those who
            quantised the checkpoint and left the layer in 16 bits.
        obey: False lets layers that obey no pattern through (dense form only).
        seed: of random pruning, of the choice of calibration samples, and of the order in which reconstruction sees them.
        overrides: other patterns of single layers, by name, glob or ``re:`` expression; see `override_of` for which entry counts. An entry
            may name q, k and v, or gate and up, as serving engines do (``*.qkv_proj``, ``*.gate_up_proj``): these have one pattern.
        calibration: the text that calibrated methods run the model on.
        statistics: the file of norms that a calibrated pruning of this model left (`norms.NORMS`): ``wanda`` prunes from them, to any
            pattern, as a plain streaming pass that does not run the model.
        reconstruction_steps: steps of training by which every pruned block is fitted to the dense model's output at its depth, for
            ``sparsegpt`` and ``admm``; None takes `RECONSTRUCTION_STEPS` for ``auto`` on a GPU, and none otherwise.
    """

    pattern: Pattern | None = None
    method: str | None = None
    scheme: str | None = None
    form: str = "packed"
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    obey: bool = True
    seed: int = 0
    overrides: Mapping[str, Pattern] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    reconstruction_steps: int | None = None
    statistics: str | Path | None = None

    def __post_init__(self) -> None:
        if self.form not in ("packed", "dense"):
            raise ValueError(f"unknown form {self.form!r}: choose packed or dense")
        if self.method is not None and self.method not in (AUTO, *METHODS):
            raise ValueError(f"unknown pruning method {self.method!r}: choose one of {', '.join((AUTO, *METHODS))}")
        if self.reconstruction_steps is not None and self.reconstruction_steps < 0:
            raise ValueError(f"reconstruction_steps must not be negative, got {self.reconstruction_steps}")
        if self.reconstruction_steps and not self.corrects:
            raise ValueError(f"reconstruction goes with the methods auto, admm and sparsegpt, not with {self.method}")
        if self.statistics is not None and self.method != "wanda":
            raise ValueError(f"saved statistics are norms, from which the method wanda prunes: they do not go with {self.method}")
        if self.calibration.source is not None and not self.calibrated:
            raise ValueError(f"{self.method or 'packing'} does not run the model: leave out the calibration text {self.calibration.source}")
        if self.method is not None and self.pattern is None:
            raise ValueError("pruning needs a pattern")
        if self.form == "packed" and not self.obey:
            raise ValueError("a packed checkpoint must obey a pattern")
        if self.overrides and not self.obey:
            raise ValueError("overrides say what layers must obey: they do not go with obey=False")
        if self.scheme is not None:
            scheme_named(self.scheme)
        matches("", (*self.ignore, *self.only, *self.overrides))

    @property
    def calibrated(self) -> bool:
        """Whether pruning runs the model on calibration text."""
        return self.informed and self.statistics is None

    @property
    def informed(self) -> bool:
        """Whether pruning knows the layers' inputs: from a run of the model, or from saved statistics."""
        return self.method is not None and (self.method == AUTO or METHODS[self.method].calibrated)

    @property
    def corrects(self) -> bool:
        """Whether pruning changes the weights that stay."""
        return self.method is not None and (self.method == AUTO or METHODS[self.method].corrects)

    def to_dict(self) -> dict[str, Any]:
        """A JSON form that tells two jobs apart."""
        # Pairs, since the order of overrides counts.
        overrides = [[entry, str(pattern)] for entry, pattern in self.overrides.items()]
        calibration = self.calibration.fingerprint() if self.calibrated else None
        statistics = None if self.statistics is None else sha256_of(Path(self.statistics))
        written = {"pattern": str(self.pattern), "overrides": overrides, "calibration": calibration, "statistics": statistics}
        return asdict(replace(self, overrides={})) | written


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer; ``pattern`` None makes no claim.

    ``solved`` is the layer as a calibrated method pruned and rounded it, in files of its own; ``statistics`` are those the recipe has.
    """

    layer: Layer
    scheme: Scheme
    pattern: Pattern | None
    solved: Layer | None = None
    statistics: Statistics | None = None

    @property
    def source(self) -> Layer:
        """Where the conversion reads the layer's rows."""
        return self.solved or self.layer

    @property
    def requantize(self) -> bool:
        """Whether weights are quantised or cast on the way."""
        return self.scheme is not self.source.read_scheme


def plan_layers(
    checkpoint: Checkpoint, recipe: Recipe, fixed: Mapping[str, str] | None = None, heads: Collection[str] = ()
) -> list[LayerPlan]:
    """The layers to convert, in tensor order; a pattern is set where the recipe or the checkpoint's marker names one.

    ``fixed`` are layers that the class of model does not treat as linear layers of their own, each with what it is: they stay as they are.
    ``heads`` are converted where they are named only.

    Raises:
        UnsupportedError: the recipe cannot be applied to this checkpoint; the message names the layer and the way out.
        CheckpointError: the recipe's statistics cannot be read.
    """
    fixed = fixed or {}
    norms = {} if recipe.statistics is None else read_norms(recipe.statistics)
    if checkpoint.packed and (recipe.ignore or recipe.only):
        raise UnsupportedError(f"{checkpoint.path} is packed: its layers can only be converted all together, without --ignore and --only")
    for entry in (*recipe.ignore, *recipe.only):
        if not any(matches(name, (entry,)) for name in checkpoint.layers):
            raise UnsupportedError(f"{entry!r} matches no layer of {checkpoint.path}: slidesparse inspect --layers lists them")
    plans, left = [], []
    for layer in checkpoint.layers.values():
        stays = layer.name in fixed and layer.pattern is None
        if stays and layer.name in recipe.only:
            raise UnsupportedError(f"layer {layer.name} {fixed[layer.name]}: leave it out of --only")
        if stays or not _selected(layer, recipe, heads):
            if recipe.form not in layer.may_stay:
                raise UnsupportedError(f"{checkpoint.path}: {_cannot_stay(layer, recipe, stays)}")
            left.append(layer.scheme)
            continue
        scheme = _target(layer, recipe)
        pattern = override_of(layer.name, recipe.overrides) or recipe.pattern or layer.pattern or checkpoint.marked_pattern(layer.name)
        check_pattern(layer, scheme, pattern)
        if recipe.informed and not layer.plain:
            raise UnsupportedError(
                f"layer {layer.name} holds {layer.holds}: {recipe.method} needs 16- or 32-bit weights, --method magnitude does not"
            )
        statistics = None if recipe.statistics is None else _statistics(layer, norms, recipe)
        plans.append(LayerPlan(layer, scheme, pattern, statistics=statistics))
    if not plans:
        raise UnsupportedError(f"{checkpoint.path}: no layer to convert: {_why_none(checkpoint, recipe, fixed)}")
    check_overrides({plan.layer.name: plan.pattern for plan in plans}, recipe.overrides, checkpoint.path)
    _check_schemes(checkpoint, recipe, plans, left)
    if checkpoint.packed and recipe.form == "packed" and not any(p.requantize or p.pattern != p.layer.pattern for p in plans):
        raise UnsupportedError(f"{checkpoint.path} is packed already")
    return plans


def _selected(layer: Layer, recipe: Recipe, heads: Collection[str]) -> bool:
    if layer.pattern is not None:
        return True  # packed layers go together
    if matches(layer.name, recipe.ignore):
        return False
    if layer.name in recipe.only and not matches(layer.name, NOT_LINEAR):
        return True
    if recipe.only and not matches(layer.name, recipe.only):
        return False
    return layer.by_default and layer.name not in heads and not matches(layer.name, DEFAULT_IGNORE)


def _cannot_stay(layer: Layer, recipe: Recipe, fixed: bool) -> str:
    """Why a layer that is not to be converted cannot be copied as it is, and the way out."""
    told = f"layer {layer.name} holds {layer.holds} and cannot be left out of a {recipe.form} checkpoint"
    if matches(layer.name, recipe.ignore):
        return f"{told}: take it out of --ignore"
    if fixed or matches(layer.name, NOT_LINEAR):
        kept = "dense" in layer.may_stay and recipe.form != "dense"
        return f"{told}; nor can it be converted, being no plain linear layer" + (": --format dense keeps it" if kept else "")
    return f"{told}: name it in --only, beside the others" + ("" if recipe.only else " (--only '*')")


def _why_none(checkpoint: Checkpoint, recipe: Recipe, fixed: Mapping[str, str]) -> str:
    """Why there is nothing to convert."""
    if not checkpoint.layers:
        return "it has no linear weights that can be read (16- to 64-bit, or quantised in a known way)"
    given = " and ".join(option for option, value in (("--only", recipe.only), ("--ignore", recipe.ignore)) if value)
    count = len(checkpoint.layers)
    kinds = "embeddings, norms, heads, experts, or layers that a quantised checkpoint keeps in 16 bits"
    if given:
        return f"{given} leave none of {count}"
    others = [name for name in checkpoint.layers if not matches(name, NOT_LINEAR)]
    stay, free = ([name for name in others if (name in fixed) is fixes] for fixes in (True, False))
    why = f"layer {stay[0]} {fixed[stay[0]]}, and {len(stay)} stay for such reasons" if stay else f"its matrices are {kinds}"
    return why + (f": name a layer in --only to convert it, such as {free[0]}" if free else "")


def _check_schemes(checkpoint: Checkpoint, recipe: Recipe, plans: list[LayerPlan], left: list[Scheme]) -> None:
    """A packed checkpoint holds layers of one type, and a dense one quantised layers of one type."""
    if recipe.form == "packed":
        schemes = {plan.scheme for plan in plans}
    else:
        schemes = {scheme for scheme in (*(plan.scheme for plan in plans), *left) if scheme.dynamic or scheme.pair}
    if len(schemes) > 1:
        names = sorted(scheme.name for scheme in schemes)
        few = min(schemes & {plan.scheme for plan in plans}, key=lambda scheme: sum(plan.scheme is scheme for plan in plans))
        some = [plan.layer.name for plan in plans if plan.scheme is few]
        told = f"{', '.join(some[:3])}{' …' if len(some) > 3 else ''}"
        raise UnsupportedError(
            f"{checkpoint.path}: layers of different types ({', '.join(names)}) cannot share one {recipe.form} checkpoint: "
            f"leave those of one type as they are with --ignore ({few.name}: {told})"
        )


def _target(layer: Layer, recipe: Recipe) -> Scheme:
    refusal = layer.refusal(recipe.scheme, recipe.method)
    if refusal:
        raise UnsupportedError(f"layer {layer.name} {refusal}")
    scheme = SCHEMES[recipe.scheme] if recipe.scheme else layer.scheme
    cast = "cast it first (slidesparse quantize --scheme bf16)"
    if layer.scheme is FP64 and (recipe.method or scheme is FP64):
        raise UnsupportedError(f"layer {layer.name} is float64, which is neither pruned nor packed: {cast}")
    if scheme is FP32 and recipe.form == "packed":
        at_once = "quantise and pack in one go (slidesparse convert --scheme int8)"
        raise UnsupportedError(f"layer {layer.name} is float32, which is not packed: {cast}, or {at_once}")
    if scheme.pair and layer.k % BLOCK:
        raise UnsupportedError(f"layer {layer.name}: nvfp4 needs K to be a multiple of {BLOCK}, got {layer.k}: leave it out with --ignore")
    return scheme


def _statistics(layer: Layer, norms: Mapping[str, Tensor], recipe: Recipe) -> Statistics:
    if layer.name not in norms:
        raise UnsupportedError(
            f"{recipe.statistics} holds no norms of the inputs of layer {layer.name}: leave it out with --ignore, or calibrate anew"
        )
    found = Statistics(None, norms[layer.name])
    try:
        found.check(layer.k, hessian=False)
    except WeightError as error:
        raise UnsupportedError(f"{recipe.statistics} is of another model: layer {layer.name}: {error}") from error
    return found


def check_pattern(layer: Layer, scheme: Scheme, pattern: Pattern | None) -> None:
    """A pattern must fit how the scheme stores weights.

    Raises:
        UnsupportedError: pairs are stored and single weights pruned, or K is no whole number of pairs.
    """
    if pattern is None:
        return
    if scheme.pair and pattern.unit != 2:
        pairs = f"{pattern.kept}:{pattern.group}x2"
        raise UnsupportedError(f"layer {layer.name}: nvfp4 stores pairs of weights, pattern {pattern} prunes single ones: use {pairs}")
    if layer.k % pattern.unit:
        raise UnsupportedError(f"layer {layer.name}: K = {layer.k} is not a whole number of pairs (pattern {pattern})")
