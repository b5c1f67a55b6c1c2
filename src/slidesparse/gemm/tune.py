"""Measure whole linears on this GPU: every route of every kernel, checked and timed side by side, into a plan."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, count
from pathlib import Path

import torch
from torch import Tensor

from .. import measure, ops, reference
from ..compat.torch import scaled_mm
from ..errors import CheckpointError, UnsupportedError, first_line
from ..format import Scheme
from ..measure import Timing
from ..ops.launch import can_bypass_dispatcher
from ..packing import pack
from ..pattern import Pattern
from ..pruning import prune
from ..quantization import quantize_weight
from ..tolerance import Deviation, deviation
from .kernels import kernels, refusal
from .kernels.base import Pipeline
from .layouts import LAYOUTS, Copy
from .machine import Machine, this_machine
from .plan import Cell, Key, Plan, key_of, problem_of
from .plans import forget_plans, user_plan_path
from .problem import Problem, Weights
from .route import Route
from .runner import run
from .versions import kernel_versions

_LOG = logging.getLogger(__name__)
BUCKETS = tuple(1 << power for power in range(17))
"""Numbers of tokens for 6:8."""
FEW_BUCKETS = (16, 64, 256, 1024, 4096, 16384)
"""Numbers of tokens for other patterns."""
_CHECKED_ROWS = 32
_MOST_COPIES = 32
_BLOCK_ROWS = 4096
_BRIEF_ROUNDS, _BRIEF_HELD = 5, 20e3
_BRIEF_STEP = 3
"""Of a kernel's variants, the likely fastest first, brief cells time the first and the fourth: of sm90's the first that splits."""
_SHIPPED = (9, 0)
"""Compute capability of the cards whose plans come with the package."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LinearShape:
    """A linear to measure."""

    n: int
    k: int
    pattern: Pattern
    scheme: Scheme

    @property
    def problem(self) -> Problem:
        """The problem with the scheme's usual activations, no bias; without a GPU that of the cards with shipped plans, to show plans."""
        key = self.n, self.k, str(self.pattern), self.scheme.name
        return problem_of(key, ops.capability() if torch.cuda.is_available() else _SHIPPED)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of tokens worth measuring."""
        return BUCKETS if str(self.pattern) == "6:8" else FEW_BUCKETS


def tune(
    layers: Iterable[LinearShape],
    path: Path | None = None,
    *,
    ms: Sequence[int] | None = None,
    again: bool = False,
    brief: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Measure what a plan lacks, on the current CUDA device, writing it after every cell.

    Args:
        path: the plan; by default the user's own. One that was measured with other software or is damaged is renamed to ``.old``, or
            ``.old2`` and so on.
        ms: numbers of tokens; by default `LinearShape.buckets`.
        again: measure cells that are there, too.
        brief: for advice, in a fraction of the time: routes that can be the fastest whole linears. Such cells decide nothing that runs,
            and take no other cell's place.

    Raises:
        CheckpointError: a ``path`` was given, is there and is no plan.
        ValueError: the plan there was measured on another machine or with other software.
        OSError: the plan cannot be written.
        KeyboardInterrupt: what was measured until then is kept.
    """
    path, plan = (user_plan_path(), _own()) if path is None else (path, _opened(path))
    tasks = [(layer, m) for layer in dict.fromkeys(layers) for m in (ms or layer.buckets)]
    tasks = [(layer, m) for layer, m in tasks if again or _lacks(plan, layer, m, brief)]
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
        there = plan.cells.get(key_of(layer.problem), {}).get(m)
        _store(plan, path, key_of(layer.problem), bench.cell(m, brief=brief and (there is None or there.brief)))
    if progress:
        progress(len(tasks), len(tasks), "")
    forget_plans()
    return plan if brief else plan.without_brief()


def _lacks(plan: Plan, layer: LinearShape, m: int, brief: bool) -> bool:
    """Whether a cell is missing, or was measured without a kernel that there is now, in this version."""
    cell = plan.cells.get(key_of(layer.problem), {}).get(m)
    if cell is None or (cell.brief and not brief):
        return True
    versions, known, problem = kernel_versions(), kernels(), layer.problem
    if any(versions.get(name, version) != version for name, version in cell.versions.items()):
        return True
    tried = cell.tried  # a kernel that was refused then may not be now
    return any(kernel.worth_timing and kernel.refuses(problem) is None and name not in tried for name, kernel in known.items())


def _store(plan: Plan, path: Path, key: Key | None = None, cell: Cell | None = None) -> None:
    """Put a new cell into the plan and its file; whatever another process wrote there meanwhile stays, and is in the plan, too.

    A brief cell does not replace a whole one.
    """
    with _alone(path):
        if path.exists():
            plan.cells = _opened(path, plan.machine).cells
        if key is not None and cell is not None:
            there = plan.cells.get(key, {}).get(cell.m)
            if there is None or there.brief or not cell.brief:
                plan.add(key, cell)
        plan.save(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process reads and writes a plan of this folder within, where the file system has locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # which unlocks it


def _own() -> Plan:
    path = user_plan_path()
    with _alone(path):
        try:
            return _opened(path)
        except (CheckpointError, ValueError) as error:
            names = (f"{path.name}.old{number}" for number in chain(("",), count(2)))
            old = next(place for place in map(path.with_name, names) if not place.exists())
            path.replace(old)
            _LOG.warning("%s; it is now %s", error, old)
            return Plan(this_machine())


def _opened(path: Path, here: Machine | None = None) -> Plan:
    here = here or this_machine()
    if not path.exists():
        return Plan(here)
    plan = Plan.load(path, brief=True)
    differs = here.differences(plan.machine)
    if differs:
        told = "; ".join(f"{name} is {mine!r} here, {theirs!r} there" for name, (mine, theirs) in differs.items())
        raise ValueError(f"{path} was measured on another machine ({told}): give another file, or delete this one")
    return plan


class Bench:
    """Random weights of one layer in every layout, on the current CUDA device or on the CPU, and the timing of all routes on them."""

    def __init__(self, layer: LinearShape, device: str = "cuda") -> None:
        self.layer, self.device = layer, device
        self.problem = layer.problem if device == "cuda" else replace(layer.problem, capability=(0, 0))
        self.weights = random_weights(layer, device)
        self.dense = ops.restore(self.weights.packed)
        self._copies: dict[str, list[Copy]] = {}

    @property
    def key(self) -> Key:
        """What a plan calls the layer."""
        return key_of(self.problem)

    def cell(
        self, m: int, *, rounds: int | None = None, also: Sequence[Route] = (), only: Collection[Route] = (), brief: bool = False
    ) -> Cell:
        """Check and time ``m`` tokens: what the kernels' searches find worth timing and ``also`` these routes, or ``only`` some."""
        count, inputs = self._count(m), self.inputs(m)
        expected = cache(lambda draw: self._expected(inputs[draw]))
        calls: dict[Route, list[Callable[[], Tensor]]] = {}
        dropped: dict[str, str] = {}
        errors: dict[Route, float] = {}
        for route in dict.fromkeys([*(only or self._worth(inputs[0], count, dropped, brief)), *also]):
            found = [self.call(route, x, copy) for x, copy in zip(inputs, self.copies(route.layout, count), strict=False)]
            checked = self._checked(found, m, expected, roundings=kernels()[route.kernel].roundings(route.variant))
            if isinstance(checked, str):
                dropped[str(route)] = checked
                _LOG.warning("%s, M = %d: %s dropped: %s", self.key, m, route, checked)
            else:
                calls[route], errors[route] = found, checked.largest
        rounds = rounds or (_BRIEF_ROUNDS if brief else _rounds(m, self.problem))
        return Cell(m, self.timed(calls, dropped, rounds, brief=brief), dropped, kernel_versions(), errors, brief)

    def inputs(self, m: int) -> list[Tensor]:
        """Random activations ``[M, K]``, as many as keep the L2 cache cold."""
        return [torch.randn(m, self.problem.k, device=self.device, dtype=self.problem.dtype) for _ in range(self._count(m))]

    def _worth(self, x: Tensor, count: int, dropped: dict[str, str], brief: bool) -> list[Route]:
        """The routes worth timing; kernels that cannot run are dropped. In ``brief`` few, and none that restores weights in every call."""
        found = []
        for name, kernel in kernels().items():
            reason = kernel.refuses(self.problem)
            if reason is not None or not kernel.worth_timing:
                dropped |= {} if reason is None else {name: reason}
                continue
            for layout in kernel.layouts:
                if brief and layout == "packed":
                    continue
                try:
                    variants = kernel.search(self.problem, x, self.copies(layout, count)[0])
                except (UnsupportedError, torch.OutOfMemoryError) as error:
                    dropped[f"{layout}:{name}"] = first_line(error)
                    continue
                if not variants:
                    dropped[f"{layout}:{name}"] = "none of its variants gave right results"
                found += [Route(layout, name, variant) for variant in (variants[::_BRIEF_STEP] if brief else variants)]
        return found or [Route("dense", "exact"), Route("packed", "exact")]

    def call(self, route: Route, x: Tensor, copy: Copy) -> Callable[[], Tensor]:
        """The route on these tensors, its steps decided at the first call."""
        kernel, problem, scale = kernels()[route.kernel], self.problem, self.weights.channel_scale
        steps: list[Pipeline] = []

        def timed() -> Tensor:
            if not steps:
                direct = can_bypass_dispatcher(x) and problem.scheme.dynamic
                steps.append(kernel.bind(problem, route.layout, route.variant, x, direct=direct))
            return run(steps[0], x, copy, scale, None)

        return timed

    def timed(
        self, calls: Mapping[Route, Sequence[Callable[[], object]]], dropped: dict[str, str], rounds: int, *, brief: bool = False
    ) -> dict[Route, Timing]:
        """Times by route; where memory does not suffice, none, and the routes are ``dropped``."""
        timer = measure.timed if self.device == "cuda" else measure.timed_by_clock
        if brief and self.device == "cuda":
            timer = partial(measure.timed, held=_BRIEF_HELD)
        try:
            return timer(calls, rounds=rounds) if calls else {}
        except torch.OutOfMemoryError as error:
            dropped |= dict.fromkeys(map(str, calls), first_line(error))
            return {}

    def products(self, routes: Iterable[Route], m: int) -> dict[Route, list[Callable[[], Tensor]]]:
        """Calls of the product alone, on activations that are quantised already; scales are in it where the product applies them.

        Kernels that read weights early do so while the product before still runs.
        """
        inputs, scale = self.inputs(m), self.weights.channel_scale
        calls: dict[Route, list[Callable[[], Tensor]]] = {}
        for route in routes:
            direct = can_bypass_dispatcher(inputs[0]) and self.problem.scheme.dynamic
            steps = kernels()[route.kernel].bind(self.problem, route.layout, route.variant, inputs[0], direct=direct)
            for x, copy in zip(inputs, self.copies(route.layout, len(inputs)), strict=True):
                q, x_scale = (x, None) if steps.quantise is None else steps.quantise(x)
                calls.setdefault(route, []).append(partial(steps.multiply, q, x_scale, copy, scale, None))
        return calls

    def _count(self, m: int) -> int:
        """Sets of buffers that keep the L2 cache cold; two on a CPU."""
        if self.device != "cuda":
            return 2
        weight = self.dense.numel() * self.dense.element_size()
        return min(_MOST_COPIES, measure.slots(weight + m * (self.layer.k + self.layer.n) * 2, least=2))

    def copies(self, layout: str, count: int) -> list[Copy]:
        """So many copies of the weights in a layout."""
        if layout not in self._copies:
            self._copies[layout] = [LAYOUTS[layout].prepare(self.problem, self.weights)]
        held = self._copies[layout]
        while len(held) < count:
            held.append(tuple(tensor.clone() for tensor in held[0]))
        return held[:count]

    def _expected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The oracle in float64 for the first and the last rows, and the same with float32 sums rounded once to the output's type."""
        rows, scheme, w_scale = _ends(x), self.layer.scheme, self.weights.channel_scale
        if w_scale is None:
            y = self._products(rows)
            return y, y.to(self.problem.dtype)
        q, x_scale = reference.quantize(rows, scheme)
        y = self._products(q) * w_scale.double().view(1, -1) * x_scale.double()
        if scheme.name == "fp8" and refusal(Route("dense", "rowwise"), self.problem) is None:
            # The library's own row-wise product is what fp8 users get.
            plain = scaled_mm(q, self.dense.t(), x_scale, w_scale.view(1, -1), out_dtype=self.problem.dtype, use_fast_accum=True)
            return y, plain
        return y, y.to(self.problem.dtype)

    def _products(self, q: Tensor) -> Tensor:
        return torch.cat([q.double() @ part.double().t() for part in self.dense.split(_BLOCK_ROWS)], dim=1)

    def _checked(
        self, calls: Sequence[Callable[[], Tensor]], m: int, expected: Callable[[int], tuple[Tensor, Tensor]], roundings: int = 1
    ) -> Deviation | str:
        """How far outputs lie from the oracle, or why they are wrong.

        A route is wrong only if two draws fail: a single draw may hold one large error by chance.
        """
        reason = "there was nothing to check"
        for draw, call in enumerate(calls[:2]):
            try:
                out = call()
            except (UnsupportedError, torch.OutOfMemoryError) as error:
                return first_line(error)
            if tuple(out.shape) != (m, self.layer.n):
                return f"returned {list(out.shape)}"
            measured = deviation(_ends(out), *expected(draw), roundings=roundings)
            if measured.within:
                return measured
            reason = str(measured)
        return reason


def random_weights(layer: LinearShape, device: str = "cuda") -> Weights:
    """Weights that obey the pattern, quantised and packed on the current CUDA device, or another."""
    values: list[Tensor] = []
    keeps: list[Tensor] = []
    scales: list[Tensor] = []
    for start in range(0, layer.n, _BLOCK_ROWS):
        block = torch.randn(min(_BLOCK_ROWS, layer.n - start), layer.k, device=device) * 0.02
        quantised, scale = quantize_weight(prune(block, layer.pattern), layer.scheme)
        packed = pack(quantised, layer.pattern)
        values.append(packed.values)
        keeps.append(packed.keep)
        scales += [] if scale is None else [scale]
    whole = replace(packed, values=torch.cat(values), keep=torch.cat(keeps))
    return Weights(whole, layer.scheme, torch.cat(scales) if scales else None)


def _ends(x: Tensor) -> Tensor:
    return x if x.shape[0] <= 2 * _CHECKED_ROWS else torch.cat([x[:_CHECKED_ROWS], x[-_CHECKED_ROWS:]])


def _rounds(m: int, problem: Problem) -> int:
    """More rounds where one takes little time."""
    return 21 if m * problem.n * problem.k < 1 << 40 else 9
