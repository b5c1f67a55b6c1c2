"""The table of kernels: which problems each refuses, which route an asked name means, and which runs where nothing was measured."""

from __future__ import annotations

import logging
from functools import lru_cache

from ...errors import UnsupportedError
from ..layouts import LAYOUTS, Layout
from ..problem import Problem
from ..route import Route
from .base import Kernel, Pipeline
from .cusparselt import CuSparseLt
from .dense import DENSE_KERNELS, FEW_TOKENS
from .exact64 import Exact64
from .sm90 import Sm90

__all__ = ["FEW_TOKENS", "Kernel", "Pipeline", "chosen", "kernels", "refusal", "register", "unmeasured"]

_LOG = logging.getLogger(__name__)

_KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (*DENSE_KERNELS, Sm90(), CuSparseLt(), Exact64())}
_OWN = tuple(_KERNELS)
"""The package's own kernels, the preferred ones of a layout first; others run only where a plan or the caller chose them."""


def register(kernel: Kernel, *layouts: Layout) -> None:
    """Let a kernel take part, with ``layouts`` that only this kernel reads: `tune` measures it, and plans and callers may choose it.

    The kernel may trust what `Problem` says, and must keep the tolerance policy. A kernel or layout of the same name is replaced.
    """
    LAYOUTS.update({layout.name: layout for layout in layouts})
    _KERNELS[kernel.name] = kernel


def kernels() -> dict[str, Kernel]:
    """The kernels by name."""
    return dict(_KERNELS)


def refusal(route: Route, problem: Problem) -> str | None:
    """Why the route cannot run the problem; None if it can."""
    kernel = _KERNELS.get(route.kernel)
    if kernel is None:
        return f"there is no kernel {route.kernel!r}: {', '.join(_KERNELS)}"
    if route.layout not in kernel.layouts:
        return f"kernel {kernel.name} reads weights in layout {' or '.join(kernel.layouts)}, not {route.layout!r}"
    return kernel.refuses(problem, route.variant)


def chosen(text: str, problem: Problem, m: int) -> Route:
    """The route asked for, ``LAYOUT``, ``LAYOUT:KERNEL`` or ``LAYOUT:KERNEL:VARIANT``, completed for ``m`` tokens.

    Raises:
        UnsupportedError: it does not exist or cannot run this; the message says why.
    """
    layout, _, rest = text.partition(":")
    if layout not in LAYOUTS:
        raise UnsupportedError(f"unknown layout {layout!r} in route {text!r}: choose one of {', '.join(LAYOUTS)}")
    names = [name for name in dict.fromkeys((*_readers(layout, m), *_KERNELS)) if layout in _KERNELS[name].layouts]
    try:
        asked = [Route.parse(text)] if rest else [Route(layout, name) for name in names]
    except ValueError as error:
        raise UnsupportedError(str(error)) from error
    reasons = {}
    for route in asked:
        reason = refusal(route, problem)
        if reason is None:
            return route if route.variant else route._replace(variant=_KERNELS[route.kernel].variants(problem, m)[0])
        reasons[route.kernel] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UnsupportedError(f"route {text} cannot run {problem.n} × {problem.k} {problem.scheme.name}: {told}")


def unmeasured(problem: Problem, m: int, layout: str) -> Route:
    """The route of a layout that runs ``m`` tokens where nothing was measured; the packed layout's if the layout has none.

    Raises:
        UnsupportedError: no kernel runs the problem; the message says why.
    """
    refused: dict[str, str] = {}
    for where in dict.fromkeys((layout, "packed")):
        for name in _readers(where, m):
            reason = refusal(Route(where, name), problem)
            if reason is None:
                if where != layout:
                    _report_fallback(name, tuple(sorted(refused.items())))  # their order depends on the number of tokens
                return Route(where, name, _KERNELS[name].variants(problem, m)[0])
            refused[name] = reason
    raise UnsupportedError(f"no kernel runs {problem}: " + "; ".join(f"{name}: {reason}" for name, reason in refused.items()))


def _readers(layout: str, m: int) -> list[str]:
    """The package's own kernels that read a layout, the likely fastest first."""
    names = [name for name in _OWN if layout in _KERNELS[name].layouts]
    return sorted(names, key=lambda name: name != "tensorwise") if m <= FEW_TOKENS else names


@lru_cache(maxsize=64)
def _report_fallback(name: str, refused: tuple[tuple[str, str], ...]) -> None:
    """Say it once per combination."""
    _LOG.warning("kernel %s is used because %s", name, "; ".join(f"{other} cannot run: {reason}" for other, reason in refused))
