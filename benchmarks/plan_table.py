"""What a plan says of a model's merged layers, summed: the tables of docs/performance.md.

    python benchmarks/plan_table.py src/slidesparse/gemm/tuned/nvidia-h200.json [--model Qwen2.5-7B]

Ratios are to the fastest dense route of the precision in the same plan. `product` leaves scales and bias to the consumer, as a compiler
does, and is held against the quickest dense of both kinds. Needs no GPU.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from linears import MODELS
from slidesparse.gemm.plan import Key, Plan, backend_of
from slidesparse.measure import Timing

VLLMS = frozenset({"dense:cutlass", "restore:cutlass"})
LIBRARY = ("dense:cublaslt", "dense:rowwise", "dense:tensorwise", "dense:native")
NAMES = ("dense us", "plan", "lean", "sparse", "product", "plan, no vLLM", "sparse, library")


def parts(plan: Plan, key: Key, m: int) -> dict[str, float]:
    """Microseconds of one layer, NaN where something was not measured."""
    cell, nothing = plan.cells[key][m], float("nan")

    def of(route: str | None) -> float:
        return cell.timings[route].p50 if route in cell.timings else nothing

    def quickest(times: Mapping[str, Timing], names: Iterable[str]) -> float:
        return min((times[name].p50 for name in names if name in times), default=nothing)

    sparse, dense = ([name for name in cell.timings | cell.sums if backend_of(name) == kind] for kind in ("cusparselt", "dense"))
    runs = plan.route(key, m, "fast")
    return {
        "dense": of(cell.best("dense")), "fast": of(runs), "lean": of(plan.route(key, m, "lean")), "sparse": quickest(cell.timings, sparse),
        "product": quickest(cell.sums, sparse), "either": min(quickest(cell.timings, dense), quickest(cell.sums, dense)),
        "dense alone": of(cell.best("dense", VLLMS)), "fast alone": of(plan.route(key, m, "fast", VLLMS)),
        "library": quickest(cell.timings, LIBRARY), "runs sparse": backend_of(runs) == "cusparselt",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--model", choices=MODELS, default="Qwen2.5-7B")
    arguments = parser.parse_args()
    plan, shapes = Plan.load(arguments.plan), list(MODELS[arguments.model].values())
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
