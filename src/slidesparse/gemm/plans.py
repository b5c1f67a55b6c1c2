"""Which plan holds: the one the program chose, else the shipped one for this card with the user's own measurements over it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import torch

from ..env import cache_folder
from ..errors import CheckpointError
from ..ops.library import capability
from .kernels import kernels
from .machine import this_machine
from .plan import Key, Plan, problem_of
from .versions import kernel_versions

_LOG = logging.getLogger(__name__)
_SHIPPED_NEEDS = ("gpu",)
_chosen: list[Plan] = []


@dataclass(frozen=True)
class Active:
    """The plan in force, and one line about every source: what was taken from where, what was left out and why.

    ``alone`` plans were chosen by the program: nothing else decides.
    """

    plan: Plan | None
    sources: tuple[str, ...]
    alone: bool = False


def use_plan(plan: Plan | Path | str | None) -> None:
    """Let this plan alone decide in this process, wherever it was measured; None returns to the user's and the shipped one.

    Layers that have run keep their routes: choose before the first call.

    Raises:
        CheckpointError: the file is no plan.
    """
    _chosen[:] = [] if plan is None else [plan if isinstance(plan, Plan) else Plan.load(Path(plan))]


def user_plan_path() -> Path:
    """The user's own plan for the current CUDA device."""
    return cache_folder() / f"plan-{_slug(torch.cuda.get_device_name())}.json"


def active_plan() -> Active:
    """The plan in force on the current CUDA device; without one there is none."""
    if _chosen:
        return Active(_chosen[0], ("chosen by the program",), alone=True)
    if not torch.cuda.is_available():
        return Active(None, ("no CUDA device",))
    return _gather(torch.cuda.current_device(), frozenset(kernels()))


def shipped_plan(card: str) -> Plan:
    """The plan that comes with the package for a card of this name, its kernels of other versions than these included.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return Plan.load(_shipped(card))


def forget_plans() -> None:
    """Read the plans again at the next question: one was written."""
    _gather.cache_clear()


@cache
def _gather(device: int, registered: frozenset[str]) -> Active:
    here, sources, plan = this_machine(), [], None
    places: dict[str, Callable[[], Path]] = {"shipped plan": lambda: _shipped(here.gpu), "your plan": user_plan_path}
    for what, place in places.items():
        try:
            path = place()
            found = Plan.load(path) if path.is_file() else None
        except (CheckpointError, OSError, RuntimeError) as error:  # a cache folder may be unreadable, or there is no home
            _LOG.warning("%s: %s", what, error)
            sources.append(f"{what}: {error}")
            continue
        if found is None:
            sources.append(f"{what}: none for {here.gpu}")
            continue
        differs = here.differences(found.machine)
        needed = _SHIPPED_NEEDS if what == "shipped plan" else tuple(differs)
        stale = [f"{name} is {mine!r} here, {theirs!r} there" for name, (mine, theirs) in differs.items() if name in needed]
        if stale:
            _LOG.warning("%s %s is not used: %s; run `slidesparse tune`", what, path, "; ".join(stale))
            sources.append(f"{what}: not used, {'; '.join(stale)}")
            continue
        changed = found.keep(kernel_versions(), algorithms="cusparselt" not in differs)
        if changed:
            names = ", ".join(sorted(changed))
            _LOG.warning("%s %s: times of %s are not used, their code has changed; run `slidesparse tune`", what, path, names)
        other = ", ".join([*differs, *(f"kernel {name}" for name in sorted(changed))])
        sources.append(f"{what}: measured {found.date}" + (f", unverified here ({other} differ)" if other else ""))
        if plan is None:
            plan = found
        elif lacking := plan.merge(found, _able):
            names = ", ".join(sorted(lacking))
            _LOG.warning("%s %s: what was not timed with %s is not used; run `slidesparse tune`, for vLLM with --vllm", what, path, names)
            sources[-1] += f", where {names} took part"
    return Active(plan, tuple(sources))


def _able(key: Key) -> set[str]:
    """The kernels that run a layer here."""
    problem = problem_of(key, capability())
    return {name for name, kernel in kernels().items() if kernel.refuses(problem) is None}


def _shipped(gpu: str) -> Path:
    folder = resources.files("slidesparse.gemm") / "tuned"
    return Path(str(folder)) / f"{_slug(gpu)}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
