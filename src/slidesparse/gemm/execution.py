"""One layer's weights made ready to run: routes by number of tokens, and the resident tensors they read."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from sys import maxsize
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..ops.library import current_device, unwatched
from .activations import Activations, kind_of
from .active import active_plan
from .plan import MEMORY, Plan, key_of
from .problem import Problem, Weights
from .registry import Bound, Choice, choose, named, refusal
from .routes import FEW_TOKENS

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """What one kind of input needs.

    ``steps`` are pairs (most tokens, choice) in rising order; ``resident`` is by layout; equal layers share what is ``decided``.
    """

    problem: Problem
    device: torch.device
    steps: tuple[tuple[int, Choice], ...]
    resident: dict[str, Mapping[str, Tensor]]
    scale: Tensor | None
    decided: Decided

    def fits(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether it was made for such inputs."""
        wanted = None if bias is None else bias.dtype
        return x.dtype == self.problem.dtype and wanted == self.problem.bias and x.device == self.device

    def adds(self, bias: Tensor | None) -> bool:
        """Whether a `Bound` can add it."""
        if bias is None:
            return self.problem.bias is None
        fits = bias.dtype == self.problem.bias and bias.shape == (self.problem.n,) and bias.is_contiguous()
        return fits and bias.device == self.device

    def choice(self, m: int) -> Choice:
        """Who runs ``m`` tokens."""
        for most, choice in self.steps:
            if m <= most:
                return choice
        raise AssertionError("the last step takes any number of tokens")


class Execution:
    """Runs ``x [M, K]`` → ``y [M, N]`` on one layer's stored weights, which must have been checked before.

    Args:
        memory: one of `MEMORY`.
        backend: a backend that must run, ``NAME`` or ``NAME:VARIANT``; None lets the plan choose, and dense where nothing was measured.
        sums: the epilogue is the caller's (`sums`): routes are chosen by how fast they are without it.
        most: the most tokens of a call; what the plan would run for more, and the copies that it would read, are left out.
        plan: the plan that chooses; by default the one in force.

    Raises:
        ValueError: unknown memory policy.
    """

    def __init__(
        self, weights: Weights, *, memory: str = "fast", backend: str | None = None, sums: bool = False, most: int = maxsize,
        plan: Plan | None = None,
    ) -> None:  # fmt: skip
        if memory not in MEMORY:
            raise ValueError(f"unknown memory policy {memory!r}: choose one of {', '.join(MEMORY)}")
        self.weights, self.memory, self.backend, self.for_sums, self.most, self.plan = weights, memory, backend, sums, most, plan
        self._ready: Ready | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident copies, the stored tensors not counted."""
        if self._ready is None:
            return 0
        stored = {id(tensor) for tensor in self.weights.tensors().values()}
        tensors = [tensor for held in self._ready.resident.values() for tensor in held.values() if id(tensor) not in stored]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def steps(self) -> tuple[tuple[int, Choice], ...]:
        """Pairs (most tokens, who runs them) in rising order; empty before the first call."""
        return () if self._ready is None else self._ready.steps

    @property
    def device(self) -> torch.device:
        """Where it last ran; until then where its weights are."""
        return self.weights.packed.values.device if self._ready is None else self._ready.device

    def resident(self, layout: str) -> Mapping[str, Tensor] | None:
        """The resident copy of that layout; None if there is none."""
        return None if self._ready is None else self._ready.resident.get(layout)

    def route(self, m: int) -> str:
        """The route that ``m`` tokens take, as ``backend:variant``; empty before the first call."""
        return "" if self._ready is None else str(self._ready.choice(m))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [M, K]`` bfloat16, float16 or float32, ``bias [N]`` → ``[M, N]`` of x's dtype.

        Raises:
            ValueError: x is not of K columns.
            UnsupportedError: the backend asked for cannot run this, or a CUDA graph is captured before the layer has run once.
        """
        # It would narrow the fp32 sums that exactness rests on.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x, bias)
        ready, m = self._ready, x.shape[0]
        if ready is not None and self._may_launch(x):
            found = ready.decided.get((x.get_device(), x.dtype, x.shape, x.stride()))
            if found is not None and ready.adds(bias):
                layout, bound = found
                return bound.run(x, ready.resident[layout], ready.scale, bias)
        if ready is None or not ready.fits(x, bias):
            ready = self.prepare(x.dtype, x.device, None if bias is None else bias.dtype)
        _check_k(x, ready.problem)
        if isinstance(m, int) and m == 0:
            return x.new_empty((0, ready.problem.n))
        return self._run(ready, m, x, bias)

    def sums(self, x: Activations) -> tuple[Tensor, Tensor]:
        """``x [M, K]`` → bfloat16 ``[M, N]`` without token scales and bias, and those scales ``[M, 1]``.

        Weight scales have been applied if `Problem.scales_sums`.

        Raises:
            ValueError: x is not of K columns.
            UnsupportedError: the layer was not made for sums, or not prepared for such activations.
        """
        if not self.for_sums:
            raise UnsupportedError("a layer made for whole linears was asked for its sums")
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.sums(x)
        ready = self._ready
        # Whoever asks for sums is an op itself, on the device of x.
        found = None if ready is None else ready.decided.get(kind_of(x))
        if found is not None:
            layout, bound = found
            return bound.sums(x, ready.resident[layout], ready.scale)
        if ready is None or x.dtype != ready.problem.dtype or x.device != ready.device:
            raise UnsupportedError(f"prepare the layer for {x.dtype} on {x.device} before asking for its sums")
        _check_k(x, ready.problem)
        m = x.shape[0]
        if m == 0:
            kinds = ((ready.problem.n, torch.bfloat16), (1, torch.float32))
            return tuple(torch.empty(0, columns, dtype=dtype, device=x.device) for columns, dtype in kinds)
        choice = ready.choice(m)
        resident = ready.resident[choice.backend.layout]
        bound = self._decide(ready, choice, x)
        if bound is None:
            return choice.backend.sums(ready.problem, x, resident, ready.scale, choice.variant)
        return bound.sums(x, resident, ready.scale)

    def _run(self, ready: Ready, m: int, x: Tensor, bias: Tensor | None) -> Tensor:
        choice = ready.choice(m)
        resident = ready.resident[choice.backend.layout]
        bound = self._decide(ready, choice, x) if self._may_launch(x) and ready.adds(bias) else None
        if bound is not None:
            return bound.run(x, resident, ready.scale, bias)
        return choice.backend.run(ready.problem, x, resident, ready.scale, bias, choice.variant)

    def _may_launch(self, x: Tensor) -> bool:
        """Whether a `Bound` may run whole linears: nobody looks, and x is on the current device."""
        return not self.for_sums and unwatched(x) and x.get_device() == current_device()

    def _decide(self, ready: Ready, choice: Choice, x: Activations) -> Bound | None:
        """Decide, if the backend can, for this call and for later ones with such inputs."""
        bind = getattr(choice.backend, "bind", None)
        if bind is None:
            return None
        layout = choice.backend.layout
        bound = bind(ready.problem, x, ready.resident[layout], choice.variant, sums=self.for_sums)
        if bound is not None:
            if len(ready.decided) >= MOST_DECIDED:
                ready.decided.clear()
            ready.decided[kind_of(x)] = layout, bound
        return bound

    @torch.compiler.disable
    def prepare(self, dtype: torch.dtype, device: torch.device, bias: torch.dtype | None = None) -> Ready:
        """Resolve the plan for inputs of these types and derive the resident tensors that it needs, unless that was done before.

        Raises:
            UnsupportedError: as a call.
        """
        problem = self.weights.problem(dtype, device, bias)
        if self._ready is not None and (self._ready.problem, self._ready.device) == (problem, device):
            return self._ready
        refuse_capture()
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            steps = self.planned_steps(problem)
            resident: dict[str, Mapping[str, Tensor]] = {}
            weights = _moved(self.weights, device)
            # Outside inference mode: the copies outlive the call that happens to make them.
            with torch.inference_mode(False), torch.no_grad():
                for _, choice in steps:
                    if choice.backend.layout not in resident:
                        resident[choice.backend.layout] = choice.backend.prepare(problem, weights)
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # other streams and threads may use the copies from here on
        equal = (problem, device, self.for_sums, *((most, choice.backend, choice.variant) for most, choice in steps))
        self._ready = Ready(problem, device, steps, resident, weights.channel_scale, _DECIDED.setdefault(equal, Decided()))
        return self._ready

    def release(self) -> Weights | None:
        """Move packed weights that no route reads to host memory, so that a GPU holds at most two layouts; None if nothing moves."""
        packed = self.weights.packed
        if self._ready is None or "packed" in self._ready.resident or packed.values.device.type == "cpu":
            return None
        if torch.cuda.is_current_stream_capturing():
            return None  # later
        stored = replace(packed, values=packed.values.cpu(), keep=packed.keep.cpu())
        self.weights = replace(self.weights, packed=stored)
        return self.weights

    def planned_steps(self, problem: Problem) -> tuple[tuple[int, Choice], ...]:
        """Who would run the problem: pairs (most tokens, choice) in rising order; nothing is made ready.

        Raises:
            UnsupportedError: the backend asked for cannot run it.
        """
        if self.backend is not None:
            few, many = (named(self.backend, problem, m, sums=self.for_sums) for m in (FEW_TOKENS, FEW_TOKENS + 1))
            return _merged([(FEW_TOKENS, few), (maxsize, many)])
        plan = (self.plan or active_plan().plan) if problem.device == "cuda" else None
        table = {} if plan is None else plan.table(key_of(problem), sums=self.for_sums)
        if plan is None or not table:
            few, many = (choose(problem, m, memory=self.memory, sums=self.for_sums) for m in (FEW_TOKENS, FEW_TOKENS + 1))
            return _merged([(FEW_TOKENS, few), (maxsize, many)])
        edges = sorted({edge for m in table for edge in (m - 1, m) if edge})
        edges = edges[: bisect_left(edges, self.most) + 1]
        without = cannot_run(plan, problem)
        choices = [self._planned(plan, problem, edge, without) for edge in edges]
        return _merged(list(zip([*edges[:-1], maxsize], choices, strict=True)))

    def _planned(self, plan: Plan, problem: Problem, m: int, without: frozenset[str]) -> Choice:
        """The plan's route; where nothing that it timed can run, what an untuned layer would run."""
        route = plan.route(key_of(problem), m, self.memory, without, sums=self.for_sums)
        if route is None:
            return choose(problem, m, memory=self.memory, sums=self.for_sums)
        return named(route, problem, m, sums=self.for_sums)


MOST_DECIDED = 1024
"""Inputs, for each kind of layer, of which is kept what was decided for them."""


class Decided(dict[tuple, tuple[str, Bound]]):
    """Layout and `Bound` by device, type, shape and strides of inputs: what equal layers share, as long as there are any."""


_DECIDED: WeakValueDictionary[tuple, Decided] = WeakValueDictionary()


def _check_k(x: Activations, problem: Problem) -> None:
    if x.shape[1] != problem.k:
        raise ValueError(f"activations have {x.shape[1]} columns, the layer takes {problem.k}")


def refuse_capture() -> None:
    """Nothing may be checked or made ready while a CUDA graph is captured.

    Raises:
        UnsupportedError: one is.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError("run the layer once before capturing a CUDA graph: its resident weights are made then")


def cannot_run(plan: Plan, problem: Problem) -> frozenset[str]:
    """Routes of the plan that cannot run this very problem here."""
    reasons = {route: refusal(route, problem) for route in plan.routes(key_of(problem))}
    for route, reason in reasons.items():
        if reason is not None:
            _report(route, reason)
    return frozenset(route for route, reason in reasons.items() if reason is not None)


@lru_cache(maxsize=256)
def _report(route: str, why: str) -> None:
    """Say once why a measured route cannot run here."""
    _LOG.info("%s, which the plan has timed, cannot run here: %s", route, why)


def _merged(steps: list[tuple[int, Choice]]) -> tuple[tuple[int, Choice], ...]:
    """One step instead of neighbours with the same choice."""
    merged: list[tuple[int, Choice]] = []
    for most, choice in steps:
        if merged and (merged[-1][1].backend, merged[-1][1].variant) == (choice.backend, choice.variant):
            merged.pop()
        merged.append((most, choice))
    return tuple(merged)


def _moved(weights: Weights, device: torch.device) -> Weights:
    packed = weights.packed
    packed = replace(packed, values=packed.values.to(device), keep=packed.keep.to(device))
    scale, factor = (None if tensor is None else tensor.to(device) for tensor in (weights.scale, weights.global_scale))
    return replace(weights, packed=packed, scale=scale, global_scale=factor)
