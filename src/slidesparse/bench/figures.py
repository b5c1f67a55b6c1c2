"""What pictures show, as data: panels of lines, made from rows and from the accuracy study. `plots` draws them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean

from ..format import SCHEMES
from ..pattern import Pattern
from . import accuracy
from .accuracy import Loss
from .kernel import CONTROL
from .models import MODELS, Shape, slid_bytes
from .rows import OK, Row, newest
from .speedups import Curve, curves

SHOWN = ("2:4", "4:6", "6:8", "8:10", "14:16", CONTROL)
"""At most six lines a panel."""
DENSE = "dense"
_BITS = {"int8": 1, "fp8": 1, "bf16": 2, "fp16": 2}
_PREFILL = 4096


@dataclass(frozen=True)
class Line:
    """Points of one pattern, or of dense weights; ``bound`` is a height that it cannot pass; ``labels`` name single points."""

    name: str
    points: list[tuple[float, float]]
    bound: float | None = None
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``roofs`` are what the card can: pairs of a name and a line."""

    title: str
    x: str
    y: str
    lines: list[Line]
    log_x: bool = True
    log_y: bool = False
    level: float | None = None
    roofs: list[Line] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """Panels side by side, under a title; the name is that of the files."""

    name: str
    title: str
    panels: list[Panel]


def figures(rows: Sequence[Row], study: Sequence[Loss] | None = None) -> Iterator[Figure]:
    """Every figure that the rows can fill, card by card; a study of accuracy adds what a pattern costs."""
    for card in dict.fromkeys(row.card for row in rows):
        own = newest([row for row in rows if row.card == card])
        name, shapes = _model(own)
        found = [curve for curve in curves(own, shapes) if curve.pattern in SHOWN]
        slug = "-".join("".join(char if char.isalnum() else " " for char in card.lower()).split())
        short = card.removeprefix("NVIDIA ")
        yield from _speedups(found, short, name, slug)
        yield from _roofline(own, found, shapes, short, name, slug)
        for phase, x in (("decode", "requests in a batch"), ("prefill", "tokens in a step")):
            yield from _engines(own, phase, x, short, slug)
        yield from _trade(own, found, accuracy.study() if study is None else study, short, name, slug)


def _model(rows: Sequence[Row]) -> tuple[str, list[Shape]]:
    """The model whose layers have the most summed points, or all shapes together."""
    every = [shape for shape in dict.fromkeys((row.n, row.k) for row in rows if row.bench == "kernel" and row.status == OK) if shape[0]]
    kinds = {name: list(model.linears.values()) for name, model in MODELS.items()} | {"all shapes": every}
    size = {name: sum(len(curve.speedups()) for curve in curves(rows, shapes)) for name, shapes in kinds.items() if shapes}
    best = max(size, key=lambda name: size[name], default="all shapes")
    return best, kinds[best]


def _schemes(found: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(curve.scheme for curve in found if curve.speedups()))


def _ordered(found: Sequence[Curve], scheme: str) -> list[Curve]:
    return sorted((curve for curve in found if curve.scheme == scheme), key=lambda curve: SHOWN.index(curve.pattern))


def _speedups(found: Sequence[Curve], card: str, name: str, slug: str) -> Iterator[Figure]:
    panels = []
    for scheme in _schemes(found):
        lines = [
            Line(curve.pattern, [*curve.speedups().items()], curve.bound) for curve in _ordered(found, scheme) if curve.speedups()
        ]  # fmt: skip
        panels.append(Panel(scheme, "tokens in a step (M)", "times as fast as the best dense", lines, level=1.0))
    if panels:
        yield Figure(f"speedup-{slug}", f"{name}, whole linear layers on {card}; dotted: bound of the pattern", panels)


def _roofline(rows: Sequence[Row], found: Sequence[Curve], shapes: Sequence[Shape], card: str, name: str, slug: str) -> Iterator[Figure]:
    rate = max((row.gigabytes * 1e9 / row.us for row in rows if row.what == "roof" and row.us and row.gigabytes), default=None)
    panels = []
    for scheme in _schemes(found):
        own = _ordered(found, scheme)
        dense = {m: us for curve in own for m, us in curve.dense.items()}
        lines = [Line(DENSE, [_point(m, us, shapes, scheme, None) for m, us in sorted(dense.items())])]
        lines += [
            Line(curve.pattern, [_point(m, us, shapes, scheme, curve.pattern) for m, us in curve.sparse.items()])
            for curve in own
            if curve.pattern != CONTROL and curve.sparse
        ]
        across = [x for line in lines for x, _ in line.points]
        peak = max(y for line in lines[:1] for _, y in line.points)
        edge = min(across) if rate is None else peak * 1e6 / rate
        left, right = min(*across, edge) / 1.5, max(*across, edge) * 1.5
        roofs = [Line("fastest dense measured", [(left, peak), (right, peak)])]
        if rate is not None:
            roofs.append(Line("memory, measured", [(left, left * rate / 1e6), (edge, edge * rate / 1e6)]))
        panels.append(
            Panel(scheme, "operations a byte, dense counted", "effective tera-operations a second", lines[:6], log_y=True, roofs=roofs)
        )
    if panels:
        yield Figure(f"roofline-{slug}", f"{name}, whole linear layers on {card}: 2·M·N·K operations over measured time", panels)


def _point(m: int, us: float, shapes: Sequence[Shape], scheme: str, pattern: str | None) -> tuple[float, float]:
    """Operations of the dense product, over bytes that are moved at least, and over time in units of 10^12 a second."""
    item = _BITS[scheme]
    operations = sum(2.0 * m * n * k for n, k in shapes)
    weights = sum(item * n * k if pattern is None else slid_bytes(n, k, Pattern.parse(pattern), item) for n, k in shapes)
    moved = weights + sum(2.0 * m * (n + k) for n, k in shapes)
    return operations / moved, operations / us / 1e6


def _engines(rows: Sequence[Row], phase: str, x: str, card: str, slug: str) -> Iterator[Figure]:
    own = [row for row in rows if row.bench == "serve" and row.what == phase and row.status == OK and row.us]
    if not own:
        return
    most = Counter((row.model, _engine(row)) for row in own).most_common(1)[0][0]
    own, (model, engine) = [row for row in own if (row.model, _engine(row)) == most], most
    panels = []
    for scheme in dict.fromkeys(row.scheme for row in own):
        found = [row for row in own if row.scheme == scheme]
        base = {row.m: row.m / row.us * 1e6 for row in found if _dense(row) and row.us}
        lines = [Line(DENSE, [(m, 1.0) for m in sorted(base)], labels=[_short(base[m]) for m in sorted(base)])]
        for pattern in SHOWN[:5]:
            tried = [row for row in found if row.pattern == pattern and not _dense(row) and row.ratio]
            routes = [row.route for row in tried]
            # Of several settings the one with the most points, or else the plain one, whose name is the shortest.
            route = min(routes, key=lambda name: (-routes.count(name), len(name)), default="")
            lines.append(Line(pattern, sorted((row.m, row.ratio) for row in tried if row.route == route and row.ratio)))
        lines = [line for line in lines if line.points]
        panels.append(Panel(scheme, x, "tokens a second, of dense's (numbers)", lines))
    yield Figure(f"{phase}-{slug}", f"{model} run by {engine} on {card}: {phase}, packed against dense", panels)


def _dense(row: Row) -> bool:
    return row.route == row.rival


def _engine(row: Row) -> str:
    """Of a row of `serve`, whose dense one may name settings behind a comma."""
    return row.rival.partition(",")[0]


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate < 1000 else f"{rate / 1000:.{1 if rate < 10_000 else 0}f}k"


def _trade(rows: Sequence[Row], found: Sequence[Curve], study: Sequence[Loss], card: str, name: str, slug: str) -> Iterator[Figure]:
    """What a pattern costs against what it gains: speed here, bytes anywhere."""
    gains, what = _gains(rows, found, name)
    if not gains or not study:
        return
    costs: dict[tuple[str, str], dict[str, float]] = {}
    for loss in study:
        of = costs.setdefault((loss.scheme, loss.model), {})
        of[loss.pattern] = 100 * (loss.perplexity / loss.dense_perplexity - 1)
    timed = {key: [p for p in SHOWN if p in cost and p in gains.get(key[0], {})] for key, cost in costs.items()}
    speed, size = [], []
    # Those with a speed come first, so that a line has one colour in both panels.
    order = {key: list(gains).index(key[0]) if timed[key] else len(gains) for key in costs}
    for key, cost in sorted(costs.items(), key=lambda each: order[each[0]]):
        known, name_of = [pattern for pattern in SHOWN if pattern in cost], ", ".join(key)
        speed.append(Line(name_of, [(gains[key[0]][p], cost[p]) for p in timed[key]], labels=timed[key]))
        size.append(Line(name_of, [(_bytes(p, key[0]), cost[p]) for p in known], labels=known))
    speed = [line for line in speed if line.points]
    if not speed:
        return
    height = "WikiText-2 perplexity above dense of the scheme, %"
    panels = [
        Panel("against speed", f"times as fast as dense, {what}", height, speed[:6], False, True, 1.0),
        Panel("against bytes", "bytes of packed weights, of dense ones of the scheme", height, size[:6], False, True),
    ]
    models = " and ".join(dict.fromkeys(model for _, model in costs))
    title = f"what a pattern costs and gains: accuracy of {models}, speed of {_served(rows) or name} on {card}"
    yield Figure(f"trade-{slug}", title, panels)


def _gains(rows: Sequence[Row], found: Sequence[Curve], name: str) -> tuple[dict[str, dict[str, float]], str]:
    """Speed-ups by scheme and pattern: prefill in an engine where it was measured, else whole linears."""
    served = [row for row in rows if row.what == "prefill" and not _dense(row) and row.speedup and row.m >= _PREFILL]
    if served:
        grouped: dict[str, dict[str, list[float]]] = {}
        model, engine = _served(rows), Counter(map(_engine, served)).most_common(1)[0][0]
        for row in served:
            if (row.model, _engine(row)) == (model, engine) and row.pattern in SHOWN and row.speedup:
                grouped.setdefault(row.scheme, {}).setdefault(row.pattern, []).append(row.speedup)
        means = {scheme: {pattern: geometric_mean(values) for pattern, values in of.items()} for scheme, of in grouped.items()}
        return means, f"prefill of {_PREFILL} tokens and more in {engine}"
    gains: dict[str, dict[str, float]] = {}
    for curve in found:
        many = [gain for m, gain in curve.speedups().items() if m >= _PREFILL]
        if many and curve.pattern != CONTROL and not math.isnan(sum(many)):
            gains.setdefault(curve.scheme, {})[curve.pattern] = geometric_mean(many)
    return gains, f"whole linears, {_PREFILL} tokens and more"


def _served(rows: Sequence[Row]) -> str:
    models = [row.model for row in rows if row.what == "prefill"]
    return max(dict.fromkeys(models), key=models.count, default="")


def _bytes(pattern: str, scheme: str) -> float:
    """Share of dense weights: kept values and a bit for each weight."""
    return Pattern.parse(pattern).density + 1 / (8 * SCHEMES[scheme].dtype.itemsize)
