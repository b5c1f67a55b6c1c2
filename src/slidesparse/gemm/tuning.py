"""Measure whole linears on this GPU: every route of every backend, checked and timed side by side, into a plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import measure, ops, reference
from ..errors import CheckpointError, UnsupportedError
from ..format import MERGED, Scheme
from ..measure import Timing
from ..pack import Shard, pack
from ..pattern import Pattern
from ..prune import prune
from ..quant import quantize_weight
from ..testing import deviation
from .active import forget_plans, user_plan_path
from .machine import this_machine
from .plan import SUMS_OF, Cell, Key, Plan, backend_of, key_of
from .problem import Problem, Weights
from .registry import Backend, backends, has_own_layout
from .routes import is_known, route_named, route_refuses, run_sums, searched

_LOG = logging.getLogger(__name__)
BUCKETS = tuple(1 << power for power in range(17))
"""Numbers of tokens for 6:8."""
FEW_BUCKETS = (16, 256, 1024, 4096, 16384)
"""Numbers of tokens for other patterns."""
_CHECKED_ROWS = 32
_MOST_COPIES = 32
_BLOCK_ROWS = 4096
_SUMS_TIMED = 2

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Layer:
    """A shape to measure."""

    n: int
    k: int
    pattern: Pattern
    scheme: Scheme

    @property
    def problem(self) -> Problem:
        """With activations of the type that the scheme is used with, no bias."""
        dtype = torch.bfloat16 if self.scheme.dynamic else self.scheme.dtype
        return Problem(self.n, self.k, self.pattern, self.scheme, "cuda", dtype)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of tokens worth measuring."""
        return BUCKETS if str(self.pattern) == "6:8" else FEW_BUCKETS


_ROW_PARALLEL = ("o_proj", "out_proj", "wo", "down_proj", "fc2", "w2", "c_proj", "dense", "dense_4h_to_h")


def merged_layers(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """A model's layers by name as serving engines hold them: q, k and v as one, gate and up as one, the others as they are."""
    found = dict(layers)
    for name, first in layers.items():
        head, _, tail = name.rpartition(".")
        for merged, parts in MERGED.items():
            whole = {f"{head}.{part}": layers.get(f"{head}.{part}") for part in parts}
            if tail == parts[0] and all(part is not None and replace(part, n=first.n) == first for part in whole.values()):
                found[f"{head}.{merged}"] = replace(first, n=sum(part.n for part in whole.values() if part is not None))
                for part in whole:
                    del found[part]
    return found


def rank_layers(layers: Mapping[str, Layer], ranks: int) -> list[Layer]:
    """The distinct layers that ``ranks`` tensor-parallel ranks hold: part of the rows, or of the columns where outputs are summed.

    Columns that begin inside a group are widened to its start, see `slidesparse.pack.Shard`. Layers that cannot be divided are left out.
    Which layers are split by columns is told by their names; layers that every rank holds whole, and key and value heads fewer than ranks,
    which are repeated, are not known here: give their shapes by hand.
    """
    found: dict[Layer, None] = {}
    for name, layer in layers.items():
        if name.rpartition(".")[2] not in _ROW_PARALLEL:
            if layer.n % ranks == 0:
                found[replace(layer, n=layer.n // ranks)] = None
        elif layer.k % ranks == 0:
            for rank in range(ranks):
                shard = Shard.even(layer.pattern, layer.k, rank, ranks)
                found[replace(layer, k=shard.columns + sum(shard.margins))] = None
    return list(found)


def tune(
    layers: Iterable[Layer],
    path: Path | None = None,
    *,
    ms: Sequence[int] | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Measure what a plan lacks, on the current CUDA device, writing it after every cell.

    Args:
        path: the plan; by default the user's own, which makes way (``.old``) if it was measured with other software or is damaged.
        ms: numbers of tokens; by default `Layer.buckets`.
        again: measure cells that are there, too.

    Raises:
        CheckpointError: a ``path`` was given, is there and is no plan.
        ValueError: the plan there was measured on another machine or with other software.
        OSError: the plan cannot be written.
        KeyboardInterrupt: what was measured until then is kept.
    """
    path, plan = (user_plan_path(), _own()) if path is None else (path, _opened(path))
    tasks = [(layer, m) for layer in dict.fromkeys(layers) for m in (ms or layer.buckets)]
    tasks = [(layer, m) for layer, m in tasks if again or _lacks(plan, layer, m)]
    if tasks:
        _store(plan, path)  # a place that cannot be written shows now
    bench: Bench | None = None
    for done, (layer, m) in enumerate(tasks):
        if progress:
            progress(done, len(tasks), f"{layer.n}×{layer.k} {layer.pattern} {layer.scheme.name} M={m}")
        if bench is None or bench.layer != layer:
            del bench
            torch.cuda.empty_cache()
            bench = Bench(layer)
        plan.add(key_of(layer.problem), bench.cell(m))
        _store(plan, path)
    if progress:
        progress(len(tasks), len(tasks), "")
    forget_plans()
    return plan


def _lacks(plan: Plan, layer: Layer, m: int) -> bool:
    """Whether a cell is missing, or was measured without a dense route or another backend that there is now, or without their sums."""
    cell = plan.cells.get(key_of(layer.problem), {}).get(m)
    if cell is None:
        return True
    seen = cell.timings.keys() | cell.dropped.keys()
    new = [name for name in searched(layer.problem, m) if f"dense:{name}" not in seen and "dense" not in seen]
    new += [one.name for one in backends() if has_own_layout(one) and one.name not in map(backend_of, seen)]
    if layer.scheme.dynamic:
        summed = cell.sums.keys() | {name.removeprefix(SUMS_OF) for name in cell.dropped if name.startswith(SUMS_OF)}
        dense = [name for name in cell.timings if backend_of(name) == "dense" and is_known(name)]
        new += [name for name in dense if name not in summed and route_named(name.partition(":")[2]).sums is not None]
    return bool(new)


def _store(plan: Plan, path: Path) -> None:
    """Write the plan; cells that another process measured meanwhile, on a card of the same name, stay."""
    if path.exists():
        there = Plan.load(path)
        if there.machine == plan.machine:
            there.merge(plan)
            plan.cells = there.cells
    plan.save(path)


def _own() -> Plan:
    path = user_plan_path()
    try:
        return _opened(path)
    except (CheckpointError, ValueError) as error:
        old = path.with_name(path.name + ".old")
        path.replace(old)
        _LOG.warning("%s; it is now %s", error, old)
        return Plan(this_machine())


def _opened(path: Path) -> Plan:
    here = this_machine()
    if not path.exists():
        return Plan(here)
    plan = Plan.load(path)
    differs = here.differences(plan.machine)
    if differs:
        told = "; ".join(f"{name} is {mine!r} here, {theirs!r} there" for name, (mine, theirs) in differs.items())
        raise ValueError(f"{path} was measured on another machine ({told}): give another file, or delete this one")
    return plan


class Bench:
    """Random weights of one layer in every layout, and the timing of all routes on them."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.problem = layer, layer.problem
        self.weights = random_weights(layer)
        self.dense = ops.restore(self.weights.packed)
        self._resident: dict[str, list[Mapping[str, Tensor]]] = {}

    @property
    def key(self) -> Key:
        """What a plan calls the layer."""
        return key_of(self.problem)

    def cell(self, m: int, *, rounds: int | None = None, also: Sequence[str] = ()) -> Cell:
        """Check and time ``m`` tokens: the routes that the backends find worth it, and those named in ``also``."""
        copies = self._copies(m)
        inputs = [_tokens(m, self.problem) for _ in range(copies)]
        expected, same_dtype = self._expected(inputs[0])
        variants, dropped = {}, {}
        for backend in backends():
            reason = backend.refuses(self.problem)
            if reason is not None:
                dropped[backend.name] = reason
                continue
            resident = self._layout(backend, copies)
            try:
                found = backend.search(self.problem, inputs[0], resident[0], self.weights.channel_scale)
            except (UnsupportedError, torch.OutOfMemoryError) as error:
                dropped[backend.name] = str(error).splitlines()[0]
                continue
            if not found and has_own_layout(backend):
                dropped[backend.name] = "none of its algorithms gave right results"
            asked = [route.partition(":")[2] for route in also if backend_of(route) == backend.name]
            for variant in dict.fromkeys([*found, *asked]):
                name = f"{backend.name}:{variant}"
                calls = [self._call(backend, variant, x, held) for x, held in zip(inputs, resident, strict=False)]
                reason = self._fault(calls[0], m, expected, same_dtype, roundings=backend.roundings(variant))
                if reason is None:
                    variants[name] = calls
                else:
                    dropped[name] = reason
                    _LOG.warning("%s, M = %d: %s dropped: %s", self.key, m, name, reason)
        timings = self._timed(variants, dropped, rounds or _rounds(m, self.problem))
        sums = self._sums(timings, inputs, dropped) if self.layer.scheme.dynamic else {}
        timed = self._timed(sums, dropped, rounds or _rounds(m, self.problem), SUMS_OF)
        return Cell(m, timings, dropped, timed)

    def _timed(
        self, variants: Mapping[str, Sequence[Callable[[], object]]], dropped: dict[str, str], rounds: int, prefix: str = ""
    ) -> dict[str, Timing]:
        try:
            return measure.interleaved(variants, rounds=rounds) if variants else {}
        except torch.OutOfMemoryError as error:
            dropped |= dict.fromkeys((prefix + name for name in variants), str(error).splitlines()[0])
            return {}

    def _sums(
        self, timings: Mapping[str, Timing], inputs: Sequence[Tensor], dropped: dict[str, str]
    ) -> dict[str, list[Callable[[], tuple[Tensor, Tensor]]]]:
        """Calls that leave scales and bias to the caller, and are right: all dense routes, and of others the two fastest whole linears."""
        rows = _ends(inputs[0])
        expected, scale = self._products(reference.quantize(rows, self.layer.scheme)[0]), self.weights.channel_scale
        if self.problem.scales_sums:
            expected *= scale.view(1, -1)
        same_dtype = expected.to(torch.bfloat16)
        if route_refuses("rowwise", self.problem) is None:
            # The library's least exact product: others may not be blamed for fast accumulation.
            same_dtype = run_sums("rowwise", self.problem, rows, self.dense, scale)[0]
        quickest_first, calls = sorted(timings, key=lambda name: timings[name].p50), {}
        for backend in backends():
            own = [name.partition(":")[2] for name in quickest_first if backend_of(name) == backend.name]
            variants = [variant for variant in own if backend.gives_sums(variant)]
            for variant in variants if backend.layout == "dense" else variants[:_SUMS_TIMED]:
                held, name = self._layout(backend, len(inputs)), f"{backend.name}:{variant}"
                found = [
                    partial(backend.sums, self.problem, x, resident, scale, variant) for x, resident in zip(inputs, held, strict=False)
                ]
                reason = self._fault(lambda call=found[0]: call()[0], len(inputs[0]), expected, same_dtype)
                if reason is None:
                    calls[name] = found
                else:
                    dropped[SUMS_OF + name] = reason
        return calls

    def _call(self, backend: Backend, variant: str, x: Tensor, resident: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        scale = self.weights.channel_scale
        return lambda: backend.run(self.problem, x, resident, scale, None, variant)

    def _copies(self, m: int) -> int:
        """Sets of buffers that keep the L2 cache cold."""
        weight = self.dense.numel() * self.dense.element_size()
        return min(_MOST_COPIES, measure.slots(weight + m * (self.layer.k + self.layer.n) * 2, least=2))

    def _layout(self, backend: Backend, copies: int) -> list[Mapping[str, Tensor]]:
        if backend.layout not in self._resident:
            self._resident[backend.layout] = [backend.prepare(self.problem, self.weights)]
        held = self._resident[backend.layout]
        while len(held) < copies:
            held.append({name: tensor.clone() for name, tensor in held[0].items()})
        return held[:copies]

    def _expected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The oracle in float64 for the first and the last rows, and the same with float32 sums rounded once to the output's type."""
        rows, scheme, w_scale = _ends(x), self.layer.scheme, self.weights.channel_scale
        q, x_scale = reference.quantize(rows, scheme) if scheme.dynamic else (rows, None)
        y = self._products(q)
        if x_scale is not None:
            y = y * w_scale.double().view(1, -1) * x_scale.double()
        if scheme.name == "fp8" and route_refuses("rowwise", self.problem) is None:
            # The library's own row-wise product is what fp8 users get.
            plain = torch._scaled_mm(q, self.dense.t(), x_scale, w_scale.view(1, -1), out_dtype=self.problem.dtype, use_fast_accum=True)
            return y, plain
        return y, y.to(self.problem.dtype)

    def _products(self, q: Tensor) -> Tensor:
        """Exact sums in float64."""
        return torch.cat([q.double() @ part.double().t() for part in self.dense.split(_BLOCK_ROWS)], dim=1)

    def _fault(self, call: Callable[[], Tensor], m: int, expected: Tensor, same_dtype: Tensor, roundings: int = 1) -> str | None:
        try:
            out = call()
        except (UnsupportedError, torch.OutOfMemoryError) as error:
            return str(error).splitlines()[0]
        if tuple(out.shape) != (m, self.layer.n):
            return f"returned {list(out.shape)}"
        measured = deviation(_ends(out), expected, same_dtype, roundings=roundings)
        return None if measured.within else str(measured)


def random_weights(layer: Layer) -> Weights:
    """Weights that obey the pattern, quantised and packed on the current CUDA device."""
    values, scales, keeps = [], [], []
    for start in range(0, layer.n, _BLOCK_ROWS):
        block = torch.randn(min(_BLOCK_ROWS, layer.n - start), layer.k, device="cuda") * 0.02
        quantised, scale = quantize_weight(prune(block, layer.pattern), layer.scheme)
        packed = pack(quantised, layer.pattern)
        values.append(packed.values)
        keeps.append(packed.keep)
        scales.append(scale)
    whole = replace(packed, values=torch.cat(values), keep=torch.cat(keeps))
    return Weights(whole, layer.scheme, torch.cat(scales) if layer.scheme.dynamic else None)


def _tokens(m: int, problem: Problem) -> Tensor:
    return torch.randn(m, problem.k, device="cuda", dtype=problem.dtype)


def _ends(x: Tensor) -> Tensor:
    return x if x.shape[0] <= 2 * _CHECKED_ROWS else torch.cat([x[:_CHECKED_ROWS], x[-_CHECKED_ROWS:]])


def _rounds(m: int, problem: Problem) -> int:
    """More rounds where one takes little time."""
    return 21 if m * problem.n * problem.k < 1 << 40 else 9
