"""Put packed layers into a model that is already in memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..errors import PatternError, SlideSparseError, WeightError
from ..format import Scheme, scheme_named
from ..packing import detect
from ..pattern import KNOWN, Pattern
from ..select import DEFAULT_IGNORE, matches
from .describe import write_config
from .linear import SlideSparseLinear
from .source import DenseSource, NotConvertible, read_linear

_LOG = logging.getLogger(__name__)
_REPORT = "_slidesparse_report"


@dataclass
class PackingReport:
    """Which linear layers run packed, with pattern and scheme, and which stay dense, and why."""

    packed: dict[str, tuple[Pattern, Scheme]] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = Counter(f"{scheme.name} {pattern}" for pattern, scheme in self.packed.values())
        packed = ", ".join(f"{count} × {kind}" for kind, count in kinds.items()) or "none"
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.dense.items())
        return f"packed layers: {packed}; dense: {len(self.dense)}{reasons}"


@dataclass(frozen=True)
class _Step:
    name: str
    source: DenseSource
    pattern: Pattern
    scheme: Scheme


def pack_model(
    model: nn.Module,
    *,
    pattern: Pattern | str | None = None,
    scheme: Scheme | str | None = None,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    candidates: Iterable[Pattern] = KNOWN,
    strict: bool = False,
    memory: str = "fast",
) -> nn.Module:
    """Swap the linear layers of ``model`` whose weights obey a pattern for packed ones, in place, and return the model.

    Takes nn.Linear with 16-bit weights, and those of compressed-tensors models in W8A8 (int8 or fp8, per channel, dynamic per token)
    or NVFP4, as long as they have not been decompressed by a first forward pass. Nothing is ever pruned: without ``pattern`` a layer
    gets the first of ``candidates`` that its weights obey (tightest first) and stays dense if there is none. What was done stands in
    `packing_report`. A transformers model packed in one scheme may be saved with ``save_pretrained``: its configuration
    then describes the packed form.

    Args:
        pattern: the pattern every layer not ignored must obey.
        scheme: store 16- or 32-bit weights this way (8-bit ones are quantised per channel); None keeps their type. float32 weights
            have no stored form: without a scheme they stay dense, or are an error when ``pattern`` is given.
        ignore: names, globs or ``re:`` expressions of layers to leave alone.
        strict: whether every other layer must obey one of ``candidates``.
        memory: see `SlideSparseLinear`.

    Raises:
        PatternError: a layer does not obey the pattern, or with ``strict`` any: names layer, row, group and values.
        WeightError: weights with NaN or Inf, broken scales, or float32 weights with ``pattern`` and no ``scheme``; names the layer.
        ValueError: an unknown pattern or scheme, or ``model`` is itself a linear layer.

    Where an error is raised, no layer was swapped.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("a lone linear layer cannot be swapped in place: use SlideSparseLinear.from_dense")
    wanted = None if pattern is None else Pattern.parse(pattern)
    target = scheme_named(scheme) if isinstance(scheme, str) else scheme
    report = PackingReport()
    sought, asked = (tuple(candidates) if wanted is None else (wanted,)), wanted is not None
    steps = _survey(model, sought, target, ignore, report, asked=asked, strict=strict or asked)
    layers: dict[int, SlideSparseLinear] = {}
    for step in steps:
        if id(step.source.module) not in layers:
            layers[id(step.source.module)] = _convert(step, memory)
    for step in steps:
        parent, _, child = step.name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[id(step.source.module)])
        report.packed[step.name] = (step.pattern, step.scheme)
    setattr(model, _REPORT, report)
    if report.packed:
        write_config(model)
    _LOG.info("%s", report)
    if not report.packed:
        _LOG.warning("no layer was packed: %s", report)
    return model


def packing_report(model: nn.Module) -> PackingReport:
    """What `pack_model` did to the model.

    Raises:
        ValueError: it was not called on it.
    """
    report = getattr(model, _REPORT, None)
    if report is None:
        raise ValueError("pack_model was not called on this model")
    return report


def _survey(
    model: nn.Module,
    sought: tuple[Pattern, ...],
    target: Scheme | None,
    ignore: Sequence[str],
    report: PackingReport,
    *,
    asked: bool,
    strict: bool,
) -> list[_Step]:
    """Which layers are packed, and how; the others go into the report with the reason, or are errors where a pattern was ``asked`` for."""
    uses = Counter(id(parameter) for module in set(model.modules()) for parameter in module._parameters.values() if parameter is not None)
    steps = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear):
            continue
        if matches(name, list(ignore)):
            report.dense[name] = "ignored"
            continue
        try:
            source = read_linear(module, target, tied=uses[id(module._parameters.get("weight"))] > 1)
            steps.append(_Step(name, source, _pattern_for(name, source, sought, strict), source.scheme))
        except NotConvertible as reason:
            if asked and reason.fault:
                raise WeightError(f"layer {name}: {reason}") from reason
            report.dense[name] = str(reason)
    return steps


def _pattern_for(name: str, source: DenseSource, sought: tuple[Pattern, ...], strict: bool) -> Pattern:
    if not sought:
        raise NotConvertible("no pattern to look for")
    try:
        return source.pattern_as_named(detect([(0, source.weight)], map(source.pattern_stored, sought)))
    except PatternError as nearest:
        if strict:
            raise nearest.reworded(f"layer {name}: {nearest}") from nearest
        raise NotConvertible(f"obeys none of {', '.join(map(str, sought))}") from nearest


def _convert(step: _Step, memory: str) -> SlideSparseLinear:
    source = step.source
    try:
        layer = SlideSparseLinear.from_dense(
            source.weight,
            source.module.bias,
            pattern=step.pattern,
            scheme=step.scheme,
            scale=source.scale,
            global_scale=source.global_scale,
            memory=memory,
        )
    except SlideSparseError as error:
        raise WeightError(f"layer {step.name}: {error}") from error
    layer.name = step.name
    return layer.train(source.module.training)
