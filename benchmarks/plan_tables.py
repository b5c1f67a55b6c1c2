"""What the shipped plans say of models' merged layers, summed: tables of the documents, which `document_tables` writes.

Ratios are to the fastest dense route of the precision in the same plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

from accuracy.tables import markdown
from slidesparse.bench.models import MODELS
from slidesparse.format import SCHEMES
from slidesparse.gemm import Plan, Route
from slidesparse.gemm.choose import DENSE, choice_of, fastest, route_at
from slidesparse.gemm.plan import Key
from slidesparse.gemm.plans import shipped_plan
from slidesparse.gemm.tune import LinearShape
from slidesparse.measure import Timing
from slidesparse.pattern import Pattern

VLLMS = frozenset({Route("dense", "cutlass"), Route("packed", "cutlass")})
LIBRARY = [Route("dense", name) for name in ("cublaslt", "rowwise", "tensorwise", "native")]
MODEL = "Qwen2.5-7B"
SCHEME_NAMES = ("int8", "fp8", "bf16")
TOKENS = (1, 16, 256, 1024, 4096, 16384, 32768)
FEW_TOKENS = (16, 256, 1024, 4096, 16384)
SM90 = (("6:8", "fp8"), ("2:4", "fp8"), ("6:8", "int8"), ("2:4", "int8"), ("2:4", "bf16"))
SM90_TOKENS = (1, 16, 64, 128, 256, 512, 1024, 4096, 8192, 16384)
RATIOS = (
    ("dense", "lean"), ("dense", "sparse"), ("dense alone", "fast alone"), ("library", "sparse"),
)  # fmt: skip


def parts(plan: Plan, key: Key, m: int) -> dict[str, float]:
    """Microseconds of one layer, NaN where something was not measured."""
    cell, nothing = plan.cells[key][m], float("nan")
    n, k, pattern, scheme = key
    problem = LinearShape(n, k, Pattern.parse(pattern), SCHEMES[scheme]).problem

    def of(route: Route | None) -> float:
        return cell.times[route].p50 if route in cell.times else nothing

    def quickest(times: Mapping[Route, Timing], routes: Iterable[Route]) -> float:
        return min((times[route].p50 for route in routes if route in times), default=nothing)

    def runs(memory: str = "fast", without: Collection[Route] = ()) -> Route | None:
        return route_at(choice_of(plan, problem, memory=memory, without=without)[1], m)

    sparse = [route for route in cell.times if route.layout not in DENSE]
    alone = {route: timing for route, timing in cell.times.items() if route not in VLLMS}
    return {
        "dense": of(fastest(cell.times, ("dense",))), "fast": of(runs()), "lean": of(runs("lean")), "sparse": quickest(cell.times, sparse),
        "dense alone": of(fastest(alone, ("dense",))), "fast alone": of(runs(without=VLLMS)),
        "library": quickest(cell.times, LIBRARY), "runs sparse": runs().layout not in DENSE,
    }  # fmt: skip


def summed(plan: Plan, model: str, pattern: str, scheme: str, m: int) -> dict[str, float] | None:
    """`parts` of all layers of a model; None where one was not measured."""
    keys = [(n, k, pattern, scheme) for n, k in MODELS[model].linears.values()]
    if any(m not in plan.cells.get(key, {}) for key in keys):
        return None
    total: dict[str, float] = defaultdict(float)
    for key in keys:
        for name, value in parts(plan, key, m).items():
            total[name] += value
    return total


def ratio(total: Mapping[str, float], over: str, under: str) -> str:
    """Two digits; empty where something was not measured."""
    value = total[over] / total[under]
    return "" if value != value else f"{value:.2f}×"


def six_of_eight(card: str) -> str:
    """6:8 of one model in every scheme, with the rivals that a reader may ask about."""
    plan, lines = shipped_plan(card), []
    for scheme in SCHEME_NAMES:
        shown = scheme
        for m in TOKENS:
            total = summed(plan, MODEL, "6:8", scheme, m)
            if total is not None:
                chosen = f"{ratio(total, 'dense', 'fast')} ({total['runs sparse']:.0f})"
                lines.append([shown, str(m), f"{total['dense']:.0f}", chosen, *(ratio(total, *pair) for pair in RATIOS)])
                shown = ""
    heads = ["6:8", "M", "best dense, µs", "chosen plan", "`lean`", "sparse", "chosen plan without vLLM ¹", "sparse against the library ²"]
    return markdown(heads, lines)


def sm90(card: str) -> str:
    """The kernel for compute capability 9.0 against the fastest other dense product, in brackets against its own dense one, too."""
    plan, lines = shipped_plan(card), []
    keys = {(pattern, scheme): [(n, k, pattern, scheme) for n, k in MODELS[MODEL].linears.values()] for pattern, scheme in SM90}

    def quickest(pattern: str, scheme: str, m: int, taken: Callable[[Route], bool]) -> float:
        """Microseconds of all layers."""
        tables = [plan.cells[key][m].times for key in keys[pattern, scheme]]
        return sum(min(timing.p50 for route, timing in times.items() if taken(route)) for times in tables)

    for m in SM90_TOKENS:
        shown = [str(m)]
        for pattern, scheme in SM90:
            rival = quickest(pattern, scheme, m, lambda route: route.layout == "dense" and route.kernel != "sm90")
            every = quickest(pattern, scheme, m, lambda route: route.layout == "dense")
            own = quickest(pattern, scheme, m, lambda route: route.layout == "dense" and route.kernel == "sm90")
            sparse = quickest(pattern, scheme, m, lambda route: route.layout == "tiled")
            shown.append(f"{rival / sparse:.2f} ({every / sparse:.2f})")
            if pattern == "6:8":
                shown.append(f"{rival / own:.2f}")
        lines.append(shown)
    heads = [head for pattern, scheme in SM90 for head in (f"{scheme} {pattern}", *([f"{scheme} dense"] if pattern == "6:8" else []))]
    return markdown(["M", *heads], lines)


def others(card: str) -> str:
    """Other patterns of the same model, and other models: the chosen plan."""
    plan, lines = shipped_plan(card), []
    kinds = [(MODEL, pattern) for pattern in ("2:4", "4:6", "8:10")]
    kinds += [(model, pattern) for model in MODELS if model != MODEL for pattern in ("6:8", "2:4")]
    for model, pattern in kinds:
        for scheme in SCHEME_NAMES:
            found = [summed(plan, model, pattern, scheme, m) for m in FEW_TOKENS]
            cells = ["" if total is None else ratio(total, "dense", "fast") for total in found]
            if any(cells):
                lines.append([f"{'' if model == MODEL else f'{model}, '}{pattern} {scheme}", *cells])
    return markdown(["chosen plan", *(f"M = {m}" for m in FEW_TOKENS)], lines)
