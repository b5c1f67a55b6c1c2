"""The backends, what they accept, and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from ..errors import UnsupportedError
from .activations import Activations
from .backends import cusparselt, dense, reference, restore
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
    """One way to run a whole linear, in one or several variants.

    ``layout`` names the resident tensors it reads: backends of one layout share one copy; ``packed`` are the stored tensors
    themselves. ``refuses`` gives the reason why a problem, or a variant of it, cannot run, None if it can; ``variants`` names the ways
    to run ``m`` tokens, the likely fastest first; ``search`` those worth timing for the tokens at hand. ``prepare`` derives the
    resident tensors; ``run`` computes ``y [M, N]`` from ``x [M, K]``, quantising it itself where the scheme asks for it. Where
    ``gives_sums`` says so of a variant, ``sums`` leaves the epilogue to the caller (8-bit schemes): it quantises ``x`` and returns the
    product in bfloat16 ``[M, N]``, to which neither token scales nor bias have been applied, and weight scales only if
    `Problem.scales_sums`, with the token scales ``[M, 1]``. ``roundings``
    is how often ``run`` rounds to 16 bits, which the tolerance policy wants to know.
    """

    name: str
    layout: str

    def refuses(self, problem: Problem, variant: str | None = None) -> str | None: ...

    def variants(self, problem: Problem, m: int) -> tuple[str, ...]: ...

    def search(self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None) -> tuple[str, ...]: ...

    def prepare(self, problem: Problem, weights: Weights) -> Mapping[str, Tensor]: ...

    def run(
        self, problem: Problem, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None, variant: str
    ) -> Tensor: ...

    def roundings(self, variant: str) -> int: ...

    def gives_sums(self, variant: str) -> bool: ...

    def sums(
        self, problem: Problem, x: Activations, resident: Mapping[str, Tensor], scale: Tensor | None, variant: str
    ) -> tuple[Tensor, Tensor]: ...


class Bound(Protocol):
    """`Backend.run` and `Backend.sums` with what they decide and check in every call done once: little host time is left.

    A backend may have ``bind(problem, x, resident, variant, *, sums) -> Bound | None``: for inputs of the shape, strides and type of
    ``x``, on the current device; None where it cannot, or not before one such call was made. Kernels may be launched that no dispatch
    mode sees.
    """

    def run(self, x: Tensor, resident: Mapping[str, Tensor], scale: Tensor | None, bias: Tensor | None) -> Tensor: ...

    def sums(self, x: Activations, resident: Mapping[str, Tensor], scale: Tensor | None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Choice:
    """The backend that runs, in which variant, and why no other: what those that were asked before it said."""

    backend: Backend
    variant: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.backend.name}:{self.variant}"


# In order of preference where nothing was measured; only a plan chooses another.
_BACKENDS: list[Backend] = [dense.Dense(), restore.Restore(), cusparselt.CuSparseLt(), reference.Reference()]


def register(backend: Backend) -> None:
    """Add a backend in front of those there are; one of the same name is replaced."""
    _BACKENDS[:] = [backend, *(other for other in _BACKENDS if other.name != backend.name)]


def backend_names() -> tuple[str, ...]:
    """Names of the backends, in order of preference."""
    return tuple(backend.name for backend in _BACKENDS)


def backends() -> tuple[Backend, ...]:
    """The backends, in order of preference."""
    return tuple(_BACKENDS)


def verdicts(problem: Problem) -> dict[str, Verdict]:
    """What every backend says to the problem."""
    return {backend.name: _verdict(backend, problem) for backend in _BACKENDS}


def choose(problem: Problem, m: int, *, memory: str = "fast", sums: bool = False) -> Choice:
    """The first backend that accepts, in its likely fastest variant for ``m`` tokens; ``lean`` takes only those without a copy.

    With ``sums`` a variant that gives them.

    Raises:
        UnsupportedError: none accepts; the message says why.
    """
    refused = []
    for candidate in _BACKENDS:
        if memory == "lean" and candidate.layout != "packed":
            continue
        match _verdict(candidate, problem):
            case Accepted():
                if refused:
                    _report_fallback(candidate.name, tuple(refused))
                return Choice(candidate, _first(candidate, problem, m, sums), tuple(refused))
            case Rejected(reason):
                refused.append((candidate.name, reason))
    raise UnsupportedError(f"no backend runs {problem}: " + "; ".join(f"{name}: {reason}" for name, reason in refused))


def has_own_layout(backend: Backend) -> bool:
    """Whether it reads a copy that no dense route reads."""
    return backend.layout not in ("dense", "packed")


def refusal(name: str, problem: Problem, *, sums: bool = False) -> str | None:
    """Why the backend, ``NAME`` or ``NAME:VARIANT``, cannot run the problem, or give its sums; None if it can."""
    head, _, variant = name.partition(":")
    found = _found(head)
    if found is None:
        return f"unknown backend {head!r}: choose one of {', '.join(backend_names())}"
    reason = found.refuses(problem, variant or None)
    if reason is None and sums and variant and not found.gives_sums(variant):
        return "it cannot leave scales and bias to the caller"
    return reason


def named(name: str, problem: Problem, m: int, *, sums: bool = False) -> Choice:
    """The backend asked for, ``NAME`` or ``NAME:VARIANT``; with ``sums`` it must give them.

    Raises:
        UnsupportedError: it does not exist or cannot run this; the message says why.
    """
    reason = refusal(name, problem, sums=sums)
    if reason is not None:
        raise UnsupportedError(f"backend {name} cannot run {problem.n} × {problem.k} {problem.scheme.name}: {reason}")
    head, _, variant = name.partition(":")
    found = _found(head)
    return Choice(found, variant or _first(found, problem, m, sums))


def _first(backend: Backend, problem: Problem, m: int, sums: bool) -> str:
    for variant in backend.variants(problem, m):
        if not sums or backend.gives_sums(variant):
            return variant
    raise UnsupportedError(f"backend {backend.name} cannot leave scales and bias to the caller for outputs of {problem.dtype}")


def _found(name: str) -> Backend | None:
    return next((backend for backend in _BACKENDS if backend.name == name), None)


def _verdict(backend: Backend, problem: Problem) -> Verdict:
    reason = backend.refuses(problem)
    return Accepted() if reason is None else Rejected(reason)


@lru_cache(maxsize=64)
def _report_fallback(name: str, refused: tuple[tuple[str, str], ...]) -> None:
    """Say it once per combination."""
    _LOG.warning("backend %s is used because %s", name, "; ".join(f"{other} cannot run: {reason}" for other, reason in refused))
