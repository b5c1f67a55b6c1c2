"""The backends, what they accept, and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from ..errors import UnsupportedError
from .backends import dense, reference, restore
from .problem import Problem, Weights

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accepted:
    """The backend can run the problem."""


@dataclass(frozen=True)
class Rejected:
    """The backend cannot run the problem, and why."""

    reason: str


Verdict = Accepted | Rejected


class Backend(Protocol):
    """One way to run a whole linear.

    ``layout`` names the resident tensors it reads: backends of one layout share one copy. ``refuses`` gives the reason why a problem
    with ``m`` tokens cannot run, None if it can; ``prepare`` derives the resident tensors; ``run`` computes ``y [M, N]`` from
    ``x [M, K]``, quantising it itself where the scheme asks for it. ``resident_copy`` is False where ``prepare`` copies nothing.
    """

    name: str
    layout: str
    resident_copy: bool

    def refuses(self, problem: Problem, m: int) -> str | None: ...

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]: ...

    def run(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and why: every backend that was asked before it said no for the reason given."""

    backend: Backend
    refused: tuple[tuple[str, str], ...] = ()


# In order of preference; a measured plan may only choose among those that accept.
_BACKENDS: list[Backend] = [dense.Dense(), restore.Restore(), reference.Reference()]


def register(backend: Backend) -> None:
    """Add a backend in front of those there are; one of the same name is replaced."""
    _BACKENDS[:] = [backend, *(other for other in _BACKENDS if other.name != backend.name)]


def backend_names() -> tuple[str, ...]:
    """Names of the backends, in order of preference."""
    return tuple(backend.name for backend in _BACKENDS)


def verdicts(problem: Problem, m: int) -> dict[str, Verdict]:
    """What every backend says to the problem with ``m`` tokens."""
    return {backend.name: _verdict(backend, problem, m) for backend in _BACKENDS}


def choose(problem: Problem, m: int, *, memory: str = "fast", backend: str | None = None) -> Choice:
    """The backend for ``m`` tokens: the one named, or the first that accepts; ``lean`` memory takes only those without a copy.

    Raises:
        UnsupportedError: the backend named does not exist or cannot run this; the message says why.
    """
    if backend is not None:
        return Choice(_explicit(backend, problem, m))
    refused = []
    for candidate in _BACKENDS:
        if memory == "lean" and candidate.resident_copy:
            continue
        match _verdict(candidate, problem, m):
            case Accepted():
                if refused:
                    _report_fallback(candidate.name, tuple(refused))
                return Choice(candidate, tuple(refused))
            case Rejected(reason):
                refused.append((candidate.name, reason))
    raise UnsupportedError(f"no backend runs {problem}: " + "; ".join(f"{name}: {reason}" for name, reason in refused))


def _verdict(backend: Backend, problem: Problem, m: int) -> Verdict:
    reason = backend.refuses(problem, m)
    return Accepted() if reason is None else Rejected(reason)


def _explicit(name: str, problem: Problem, m: int) -> Backend:
    found = next((backend for backend in _BACKENDS if backend.name == name), None)
    if found is None:
        raise UnsupportedError(f"unknown backend {name!r}: choose one of {', '.join(backend_names())}")
    match _verdict(found, problem, m):
        case Rejected(reason):
            raise UnsupportedError(f"backend {name} cannot run {problem.n} × {problem.k} {problem.scheme.name} with {m} tokens: {reason}")
    return found


@lru_cache(maxsize=64)
def _report_fallback(name: str, refused: tuple[tuple[str, str], ...]) -> None:
    """Say it once per combination."""
    _LOG.warning("backend %s is used because %s", name, "; ".join(f"{other} cannot run: {reason}" for other, reason in refused))
