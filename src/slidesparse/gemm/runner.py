"""One layer's weights made ready to run: the layouts that stay, the routes by number of tokens, and the call."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from sys import maxsize
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..ops.launch import can_bypass_dispatcher, current_device
from ..ops.prologue import Activations, Gated, Normed, signature
from ..quantization import scaled_nvfp4
from . import gradient
from .choose import Intervals, Steps, choice_of, merged, route_at
from .kernels import FEW_TOKENS, Kernel, Pipeline, chosen, kernels, refusal, unmeasured
from .layouts import LAYOUTS, Copy
from .machine import this_machine
from .plan import Plan, key_of
from .plans import Active, active_plan
from .predict import predicted_steps
from .problem import Problem, Weights
from .route import Route

_LOG = logging.getLogger(__name__)

MEMORY = ("fast", "lean")
"""``fast`` keeps the layouts that run best, see `choose`; ``lean`` keeps the packed weights only and restores them in every call."""

MOST_CALLS = 4096
"""Kinds of inputs, of all layers together, of which the steps of a call are kept: as many as cuSPARSELt's plans, which they hold."""


class Calls(dict[tuple[Any, ...], Pipeline]):
    """Steps of calls by kind of input, the newest `MOST_CALLS` of all instances.

    ``warm`` are numbers of tokens whose steps ran once: forgotten where steps are. ``by`` are the kernels that run them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.warm: set[int] = set()
        self.by: tuple[Kernel, ...] = ()

    def keep(self, kind: tuple[Any, ...], call: Pipeline) -> None:
        """Add steps; the oldest go where there are too many."""
        self[kind] = call
        _KEPT.append((self, kind))
        while len(_KEPT) > MOST_CALLS:
            calls, oldest = _KEPT.popleft()
            calls.pop(oldest, None)
            calls.warm.clear()


_KEPT: deque[tuple[Calls, tuple[Any, ...]]] = deque()


@dataclass(frozen=True)
class Ready:
    """What one kind of input needs: routes by number of tokens, copies by layout, and what calls are made of.

    ``calls`` holds the steps of calls by kind of input; equal layers share it. ``direct`` says whether calls may launch kernels past
    the dispatcher, wherever no mode, compiler or tracer must see them.
    """

    problem: Problem
    device: torch.device
    routes: Steps
    scale: Tensor | None
    copies: dict[str, Copy]
    direct: bool
    calls: Calls


class Runner:
    """Runs ``x [M, K]`` → ``y [M, N]`` on one layer's stored weights, which must have been checked before.

    Args:
        memory: one of `MEMORY`.
        route: what must run, ``LAYOUT``, ``LAYOUT:KERNEL`` or ``LAYOUT:KERNEL:VARIANT``. None lets the plan choose; where nothing was
            measured, the first dense kernel that takes the problem runs.
        tokens: the numbers of tokens that choose the layouts; by default all that were measured.
        plan: the plan that chooses; by default the one in force.
        unread: the device to which packed weights move that no route reads. "meta" discards them: no further copy can be made then.

    Raises:
        ValueError: unknown memory policy.
    """

    def __init__(
        self, weights: Weights, *, memory: str = "fast", route: str | None = None, tokens: Collection[int] | None = None,
        plan: Plan | None = None, unread: str = "cpu",
    ) -> None:  # fmt: skip
        if memory not in MEMORY:
            raise ValueError(f"unknown memory policy {memory!r}: choose one of {', '.join(MEMORY)}")
        self.weights, self.memory, self.asked, self.plan = weights, memory, route, plan
        self.tokens, self._unread = tokens, unread
        self._stored = _with_versions(weights)
        self.ready: Ready | None = None
        """What the last kind of input needs; None before the first call."""
        self._kinds: dict[tuple[Any, ...], Ready] = {}
        self._copies: dict[tuple[str, torch.dtype], Copy] = {}
        self._lock = Lock()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [M, K]`` bfloat16, float16 or float32, ``bias [N]`` → ``[M, N]`` of x's dtype.

        Raises:
            ValueError: x is not of K columns, or bias not of N elements on its device.
            UnsupportedError: the route asked for cannot run this, or a CUDA graph is captured before the layer has run once.
        """
        # It would narrow the fp32 sums that exactness rests on.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x, bias)
        # `gradient.wanted`, without a call in every call.
        if (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled():
            return gradient.Differentiable.apply(x, bias, self, self.input_gradient)  # type: ignore[no-untyped-call]  # torch's
        ready, kind = self.ready, None if bias is None else bias.dtype
        if ready is None or x.dtype != ready.problem.dtype or kind != ready.problem.bias or x.device != ready.device:
            ready = self.prepare(x.dtype, x.device, kind)
        direct = ready.direct and can_bypass_dispatcher(x) and x.get_device() == current_device()
        direct = (bias is None or _in_place(bias, ready)) and direct
        call = ready.calls.get((direct, x.get_device(), x.dtype, x.shape, x.stride()))
        if call is None:
            return _first(ready, x, bias, direct)
        return run(call, x, ready.copies[call.layout], ready.scale, bias)

    def behind(self, x: Gated | Normed, bias: Tensor | None = None) -> Tensor:
        """As a call with the activations that x stands for; a layer that quantises them computes them in the same pass.

        Only ops ask for this, on the device of x: no dispatch mode has to see their kernels.
        """
        if not self.weights.scheme.dynamic:
            return self(x.computed(), bias)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.behind(x, bias)
        ready, kind = self.ready, None if bias is None else bias.dtype
        if ready is None or x.dtype != ready.problem.dtype or kind != ready.problem.bias or x.device != ready.device:
            ready = self.prepare(x.dtype, x.device, kind)
        direct = (bias is None or _in_place(bias, ready)) and ready.direct
        call = ready.calls.get((direct, *signature(x)))
        if call is None:
            return _first(ready, x, bias, direct)
        return run(call, x, ready.copies[call.layout], ready.scale, bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient ``[M, N]`` of an output → that of the activations ``[M, K]``, of the same type, see `gradient`.

        Weights are restored for the call and not kept, from a copy that is dense or else from the packed weights. Where these lie on the
        host, they are moved, which cannot happen while a CUDA graph is captured.

        Raises:
            UnsupportedError: the stored tensors were written into, so the weights that ran are gone.
        """
        if any(tensor._version != version for tensor, version in self._stored):
            raise UnsupportedError(gradient.WEIGHTS_CHANGED)
        kinds = [ready for (dtype, device, _), ready in self._kinds.items() if (dtype, device) == (grad.dtype, grad.device)]
        ready = kinds[0] if kinds else self.prepare(grad.dtype, grad.device)
        problem, layouts = ready.problem, tuple(ready.copies)
        if "dense" not in layouts and not self.weights.packed.values.is_meta:
            if self.weights.packed.values.device != grad.device:
                refuse_capture()
            weights, layout = self.weights.to(grad.device), "packed"
            copy = LAYOUTS[layout].prepare(problem, weights)
        else:
            layout = "dense" if "dense" in layouts else layouts[0]
            copy = ready.copies[layout]
        dense = LAYOUTS[layout].dense(problem, copy)
        return gradient.input_gradient(grad, scaled_nvfp4(dense, *copy[-2:]) if problem.scheme.pair else dense, ready.scale)

    @property
    def routes(self) -> Steps:
        """Pairs (most tokens, route) in rising order; empty before the first call."""
        return () if self.ready is None else self.ready.routes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident copies, the stored tensors not counted."""
        stored = (self.weights.packed.values, self.weights.packed.keep, self.weights.scale, self.weights.global_scale)
        tensors = [one for copy in self._copies.values() for one in copy if not any(one is other for other in stored)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def prepare(self, dtype: torch.dtype, device: torch.device, bias: torch.dtype | None = None) -> Ready:
        """Choose routes for inputs of these types and make the copies that they read, unless that was done before.

        On a GPU packed weights that no route reads move to host memory, see `weights`.

        Raises:
            UnsupportedError: as a call.
        """
        ready = self._kinds.get((dtype, device, bias))
        if ready is None:
            refuse_capture()
            with self._lock:  # threads whose first calls meet share copies
                ready = self._kinds.get((dtype, device, bias)) or self._made_ready(dtype, device, bias)
        self.ready = ready
        return ready

    def _made_ready(self, dtype: torch.dtype, device: torch.device, bias: torch.dtype | None) -> Ready:
        if {other for _, other, _ in self._kinds} != {device}:  # a try that failed may have left copies, too
            self.let_go()
        problem = self.weights.problem(dtype, device, bias)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            routes = self._routes(problem)
            layouts, held = dict.fromkeys(route.layout for _, route in routes), problem.compute_dtype
            self._make([layout for layout in layouts if (layout, held) not in self._copies], problem, device)
            # Kernels that are launched directly read it as it lies.
            scale = None if self.weights.channel_scale is None else self.weights.channel_scale.to(device).contiguous()
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # other streams and threads may use the copies from here on
        copies = {layout: self._copies[layout, held] for layout in layouts}
        calls = _calls(problem, device, routes)
        ready = Ready(problem, device, routes, scale, copies, problem.cuda and problem.scheme.dynamic, calls)
        if (device.type == "cuda" or self._unread == "meta") and all(layout != "packed" for layout, _ in self._copies):
            packed = self.weights.packed
            with torch.inference_mode(False):  # they outlive the call, as the copies do
                moved = replace(packed, values=packed.values.to(self._unread), keep=packed.keep.to(self._unread))
            self.weights = replace(self.weights, packed=moved)
            self._stored = _with_versions(self.weights)
        self._kinds[dtype, device, bias] = ready
        return ready

    def let_go(self) -> None:
        """Give up what was made ready. Kernels on any stream may still read the copies, so the devices are waited for before.

        To record every stream with every tensor would cost host time in each call; copies are given up when weights change or move.
        """
        for device in {device for _, device, _ in self._kinds if device.type == "cuda"}:
            torch.cuda.synchronize(device)
        self.ready = None
        self._kinds.clear()
        self._copies.clear()

    def _make(self, layouts: Collection[str], problem: Problem, device: torch.device) -> None:
        """Make copies of the weights in these layouts."""
        if not layouts:
            return
        if self.weights.packed.values.is_meta:
            raise UnsupportedError(f"the layer gave its packed weights up when it was made ready, and {problem} needs another copy of them")
        weights = self.weights.to(device)
        # Outside inference mode: the copies outlive the call that happens to make them.
        with torch.inference_mode(False), torch.no_grad():
            for layout in layouts:
                self._copies[layout, problem.compute_dtype] = LAYOUTS[layout].prepare(problem, weights)

    def _routes(self, problem: Problem) -> Steps:
        """The route asked for; or else the plan's; or where it has none, the predicted ones, or what runs unmeasured."""
        if self.asked is not None:
            return merged([(FEW_TOKENS, chosen(self.asked, problem, FEW_TOKENS)), (maxsize, chosen(self.asked, problem, FEW_TOKENS + 1))])
        active = active_plan() if self.plan is None and problem.cuda else Active(self.plan, (), alone=True)
        plan = active.plan if problem.cuda else None
        layouts: tuple[str, ...] = ("packed",) if self.memory == "lean" else ("dense",)
        steps: Intervals = ()
        if plan is not None:
            layouts, steps = choice_of(plan, problem, memory=self.memory, tokens=self.tokens, without=cannot_run(plan, problem))
        if not steps and problem.cuda and self.memory == "fast" and not active.alone:
            steps = predicted_steps(problem, this_machine().gpu, self.tokens)
        found: list[tuple[int, Route]] = []
        for most, route in steps or ((maxsize, None),):
            ends = dict.fromkeys((min(most, FEW_TOKENS), most)) if route is None else (most,)
            found += [(end, route or unmeasured(problem, end, layouts[0])) for end in ends]
        return merged(found)


def run(call: Pipeline, x: Activations, copy: Copy, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The steps of a call one after the other."""
    q: Any
    q, x_scale = (x, None) if call.quantise is None else call.quantise(x)
    y = call.multiply(q, x_scale, copy, scale, bias)
    return y if call.epilogue is None else call.epilogue(y, x_scale, None if call.scaled else scale, bias)


def _in_place(bias: Tensor, ready: Ready) -> bool:
    """Whether kernels that are launched directly may read a bias as it lies.

    Raises:
        ValueError: it is not the layer's.
    """
    if bias.shape != (ready.problem.n,) or bias.device != ready.device:
        needed, there = f"[{ready.problem.n}] on {ready.device}", f"{list(bias.shape)} on {bias.device}"
        raise ValueError(f"the layer takes a bias {needed}, not {there}")
    return bias.is_contiguous()


def _with_versions(weights: Weights) -> list[tuple[Tensor, int]]:
    """The stored tensors, and how often each was written into, those of inference mode left out, which do not count that."""
    stored = (weights.packed.values, weights.packed.keep, weights.scale, weights.global_scale)
    return [(tensor, tensor._version) for tensor in stored if tensor is not None and not tensor.is_inference()]


def _first(ready: Ready, x: Activations, bias: Tensor | None, direct: bool) -> Tensor:
    """A call with a new kind of input: its steps are decided, and kept for later ones."""
    problem, (m, k) = ready.problem, x.shape
    if k != problem.k:
        raise ValueError(f"activations have {k} columns, the layer takes {problem.k}")
    if not m:
        return torch.empty((0, problem.n), dtype=x.dtype, device=x.device)
    route = route_at(ready.routes, m)
    if route is None:
        raise UnsupportedError(f"no route runs {m} tokens of {problem}")
    call = kernels()[route.kernel].bind(problem, route.layout, route.variant, x, direct=direct)
    ready.calls.keep((direct, *signature(x)), call)
    return run(call, x, ready.copies[route.layout], ready.scale, bias)


def _calls(problem: Problem, device: torch.device, routes: Steps) -> Calls:
    """What equal layers share, as long as no other kernel is registered under the same name."""
    by = tuple(kernels()[route.kernel] for _, route in routes)
    found = _shared(problem, device, routes, tuple(map(id, by)))
    found.by = by  # so that no other kernel gets one of these numbers
    return found


@lru_cache(maxsize=256)
def _shared(problem: Problem, device: torch.device, routes: Steps, by: tuple[int, ...]) -> Calls:
    return Calls()


def refuse_capture() -> None:
    """Nothing may be checked or made ready while a CUDA graph is captured.

    Raises:
        UnsupportedError: one is.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError("run the layer once before capturing a CUDA graph: its resident weights are made then")


def cannot_run(plan: Plan, problem: Problem) -> frozenset[Route]:
    """Routes of the plan that cannot run this very problem here."""
    reasons = {route: refusal(route, problem) for route in plan.routes(key_of(problem))}
    for route, reason in reasons.items():
        if reason is not None:
            _report(route, reason)
    return frozenset(route for route, reason in reasons.items() if reason is not None)


@lru_cache(maxsize=256)
def _report(route: Route, why: str) -> None:
    """Say once why a measured route cannot run here."""
    _LOG.info("%s, which the plan has timed, cannot run here: %s", route, why)
