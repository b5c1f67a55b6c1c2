"""What a plan says of a model's merged layers, summed: the tables of docs/performance.md.

    python benchmarks/plan_table.py src/slidesparse/gemm/tuned/nvidia-h200.json [--model Qwen2.5-7B]

Ratios are to the fastest dense route of the precision in the same plan. `product` leaves scales and bias to the consumer, as a compiler
does, and is held against the quickest dense of both kinds. Needs no GPU.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from slidesparse.bench.models import MODELS
from slidesparse.format import SCHEMES
from slidesparse.gemm import Plan, Route
from slidesparse.gemm.choose import choice_of, fastest, route_at
from slidesparse.gemm.plan import Key
from slidesparse.gemm.tune import LinearShape
from slidesparse.measure import Timing
from slidesparse.pattern import Pattern

VLLMS = frozenset({Route("dense", "cutlass"), Route("packed", "cutlass")})
LIBRARY = [Route("dense", name) for name in ("cublaslt", "rowwise", "tensorwise", "native")]
NAMES = ("dense us", "plan", "lean", "sparse", "product", "plan, no vLLM", "sparse, library")


def parts(plan: Plan, key: Key, m: int) -> dict[str, float]:
    """Microseconds of one layer, NaN where something was not measured."""
    cell, nothing = plan.cells[key][m], float("nan")
    n, k, pattern, scheme = key
    problem = LinearShape(n, k, Pattern.parse(pattern), SCHEMES[scheme]).problem

    def of(route: Route | None) -> float:
        return cell.whole[route].p50 if route in cell.whole else nothing

    def quickest(times: Mapping[Route, Timing], routes: Iterable[Route]) -> float:
        return min((times[route].p50 for route in routes if route in times), default=nothing)

    def runs(memory: str = "fast", without: Collection[Route] = ()) -> Route | None:
        return route_at(choice_of(plan, problem, memory=memory, without=without)[1], m)

    sparse, dense = ([route for route in cell.whole | cell.unscaled if route.layout == layout] for layout in ("slid", "dense"))
    alone = {route: timing for route, timing in cell.whole.items() if route not in VLLMS}
    return {
        "dense": of(fastest(cell.whole, ("dense",))), "fast": of(runs()), "lean": of(runs("lean")), "sparse": quickest(cell.whole, sparse),
        "product": quickest(cell.unscaled, sparse), "either": min(quickest(cell.whole, dense), quickest(cell.unscaled, dense)),
        "dense alone": of(fastest(alone, ("dense",))), "fast alone": of(runs(without=VLLMS)),
        "library": quickest(cell.whole, LIBRARY), "runs sparse": runs().layout == "slid",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--model", choices=MODELS, default="Qwen2.5-7B")
    arguments = parser.parse_args()
    plan, shapes = Plan.load(arguments.plan), list(MODELS[arguments.model].linears.values())
    print(*("scheme", "pattern", "M"), *NAMES, sep="\t")
    for scheme, pattern in sorted({(key[3], key[2]) for key in plan.cells}):
        keys = [(n, k, pattern, scheme) for n, k in shapes]
        for m in sorted(set.intersection(*(set(plan.cells.get(key, {})) for key in keys))):
            total: dict[str, float] = defaultdict(float)
            for key in keys:
                for name, value in parts(plan, key, m).items():
                    total[name] += value
            ratios = [("dense", "fast"), ("dense", "lean"), ("dense", "sparse"), ("either", "product"), ("dense alone", "fast alone"),
                      ("library", "sparse")]  # fmt: skip
            values = [f"{total[one] / total[other]:.2f}" for one, other in ratios]
            print(scheme, pattern, m, f"{total['dense']:.0f}", f"{values[0]} ({total['runs sparse']:.0f})", *values[1:], sep="\t")


if __name__ == "__main__":
    main()
