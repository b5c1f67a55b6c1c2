"""Whole linears of a model on this GPU: what the plan runs, and every other route, against the fastest dense one in the same run.

    python benchmarks/linears.py OUT.csv COMMIT [--model Qwen2.5-7B] [--schemes int8 fp8 bf16] [--patterns 6:8] [--tokens 16 1024] [--vllm]

A route that is not correct is dropped. The last table sums the model's layers.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from records import records
from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan, Route, active_plan, use_plan
from slidesparse.gemm.choose import choice_of, fastest, route_at
from slidesparse.gemm.explain import elsewhere
from slidesparse.gemm.tune import Bench, LinearShape
from slidesparse.pattern import Pattern

MODELS = {
    "Qwen2.5-7B": {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "Qwen2.5-14B": {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (27648, 5120), "down": (5120, 13824)},
    "Llama-3.2-1B": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "Llama-3.2-3B": {"qkv": (5120, 3072), "o": (3072, 3072), "gate_up": (16384, 3072), "down": (3072, 8192)},
    "Qwen3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
}


def rows(name: str, layer: LinearShape, cell: Cell, planned: dict[str, Route | None]) -> Iterator[dict[str, object]]:
    """One row per route, and which of them the plan runs, by memory policy."""
    dense = fastest(cell.whole, ("dense",))
    # Untuned means dense; a route that was not measured here cannot be claimed.
    runs = {memory: route if (route := planned.get(memory)) in cell.whole else fastest(cell.whole, (fallback,)) for memory, fallback in
            (("fast", "dense"), ("lean", "packed"))}  # fmt: skip
    for route, timing in cell.whole.items():
        yield {
            "layer": name, "m": cell.m, "n": layer.n, "k": layer.k, "pattern": str(layer.pattern), "scheme": layer.scheme.name,
            "route": str(route), "plan": "+".join(memory for memory, run in runs.items() if run == route),
            "us_p50": f"{timing.p50:.2f}", "us_p20": f"{timing.p20:.2f}", "us_p80": f"{timing.p80:.2f}",
            "timer": "sustained" if timing.sustained else "in turn",
            "tflops": f"{2e-6 * cell.m * layer.n * layer.k / timing.p50:.1f}",
            "x_dense": f"{cell.whole[dense].p50 / timing.p50:.3f}" if dense else "", "correct": True,
        }  # fmt: skip


def measured(model: str, layer_name: str, layer: LinearShape, ms: list[int], plan: Plan | None, without: list[str]) -> Iterator[dict]:
    bench = Bench(layer)
    steps = {}
    if plan:
        absent = elsewhere(plan, layer.problem)
        steps = {memory: choice_of(plan, layer.problem, memory=memory, without=absent)[1] for memory in ("fast", "lean")}
    for m in ms:
        planned = {memory: route_at(found, m) for memory, found in steps.items()}
        cell = bench.cell(m, also=[route for route in planned.values() if route and route.kernel not in without], without=without)
        for row in rows(layer_name, layer, cell, planned):
            yield {"model": model} | row
        torch.cuda.empty_cache()


OWN = ("sm90", "triton")
KINDS = {
    "library": lambda route: route.layout == "dense" and route.kernel not in OWN,
    "own dense": lambda route: route.layout == "dense" and route.kernel in OWN,
    "tiled": lambda route: route.layout == "tiled",
    "slid": lambda route: route.layout == "slid",
    "packed": lambda route: route.layout == "packed",
}


def summary(table: list[dict[str, object]]) -> None:
    """Sums over the layers, as ratios against the fastest library dense and against the fastest dense of all."""
    grouped: dict[tuple, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in table:
        route, cell = Route.parse(str(row["route"])), grouped[row["scheme"], row["pattern"], row["m"]]
        for kind in (kind for kind, takes in KINDS.items() if takes(route)):
            cell[kind][row["layer"]] = min(float(row["us_p50"]), cell[kind].get(row["layer"], float("inf")))
        if "fast" in str(row["plan"]).split("+"):
            cell["plan"][row["layer"]] = float(row["us_p50"])
    print("scheme pattern M | library us | " + " x | ".join((*list(KINDS)[1:], "plan")) + " x | against the best dense: tiled x, slid x")
    for (scheme, pattern, m), cell in sorted(grouped.items()):
        layers = {layer for times in cell.values() for layer in times}
        total = {kind: sum(cell[kind].get(layer, float("nan")) for layer in layers) for kind in (*KINDS, "plan")}
        best = sum(min(cell[kind].get(layer, float("inf")) for kind in ("library", "own dense")) for layer in layers)
        ratios = [total["library"] / total[kind] for kind in (*list(KINDS)[1:], "plan")] + [best / total["tiled"], best / total["slid"]]
        print(f"{scheme:5} {pattern:5} {m:6} | {total['library']:9.1f} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("commit")
    parser.add_argument("--model", choices=MODELS, default="Qwen2.5-7B")
    parser.add_argument("--schemes", nargs="+", choices=["int8", "fp8", "bf16", "fp16"], default=["int8", "fp8", "bf16"])
    parser.add_argument("--patterns", nargs="+", default=["6:8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--plan", type=Path, help="instead of the plan in force")
    parser.add_argument("--vllm", action="store_true", help="vLLM's CUTLASS kernels take part")
    parser.add_argument("--without", nargs="+", default=[], help="kernels that are not timed")
    arguments = parser.parse_args()
    if arguments.plan:
        use_plan(arguments.plan)
    if arguments.vllm:
        from slidesparse.integrations.vllm.dense import offer_kernel

        offer_kernel()
    plan = active_plan().plan
    table: list[dict[str, object]] = []
    with records(arguments.out, arguments.commit) as record:
        for scheme, pattern in product(arguments.schemes, arguments.patterns):
            for name, (n, k) in MODELS[arguments.model].items():
                layer = LinearShape(n, k, Pattern.parse(pattern), SCHEMES[scheme])
                for row in measured(arguments.model, name, layer, arguments.tokens, plan, arguments.without):
                    record(row)
                    table.append(row)
                torch.cuda.empty_cache()
    summary(table)


if __name__ == "__main__":
    main()
