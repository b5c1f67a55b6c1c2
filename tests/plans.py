"""Plans made by hand: times of routes without a card."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan, Problem, Route
from slidesparse.gemm.machine import Machine
from slidesparse.gemm.plan import Key
from slidesparse.measure import Timing
from slidesparse.pattern import Pattern

HERE = Machine("NVIDIA H200", "580", "13.0", "2.11.0", "3.6.0", "0.8.0")


def problem_of(key: Key, **changes: object) -> Problem:
    """A layer of a plan on an H200, with activations of the type that its scheme is used with, no bias."""
    n, k, pattern, name = key
    scheme = SCHEMES[name]
    dtype = torch.bfloat16 if scheme.dynamic else scheme.dtype
    return Problem(**{"n": n, "k": k, "pattern": Pattern.parse(pattern), "scheme": scheme, "capability": (9, 0), "dtype": dtype} | changes)


def at(us: float, spread: float = 0.0) -> Timing:
    """A time and the distance of its percentiles."""
    return Timing(us, us - spread, us + spread)


def times(**us: float) -> dict[Route, Timing]:
    """Times by route, ``dense_triton=10.0`` for ``dense:triton`` and ``slid_2`` for ``slid:cusparselt:alg=2``."""
    found = {}
    for name, value in us.items():
        layout, _, kernel = name.partition("_")
        route = Route(layout, "cusparselt", f"alg={kernel or 1}") if layout == "slid" else Route(layout, kernel or "triton")
        found[route] = at(value)
    return found


def plan_of(key: Key, cells: Mapping[int, dict[Route, Timing]]) -> Plan:
    """A plan of one layer: times by number of tokens."""
    plan = Plan(HERE)
    for m in sorted(cells):
        plan.add(key, Cell(m, cells[m]))
    return plan
