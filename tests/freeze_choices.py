"""What the shipped plans make run today, as data: `test_frozen_choices` replays it, and a change of the choice is judged by it.

    python tests/freeze_choices.py [--check]

Writes ``tests/data/choices-GPU.json`` and shows what changes, or with ``--check`` only shows it. No GPU, Triton or
vLLM is needed: whatever a plan has timed is taken to run, but for vLLM's kernels where the process is said to be without them.

Every file holds, for the plan of that GPU,

- ``cells``: by layer and ``whole`` linears or ``unscaled`` ones (scales and bias are left to the consumer, as only vLLM's compiler asks),
  with vLLM's kernels, and ``without`` them where that differs, one row for every measured number of tokens: ``[M, best dense route, µs,
  route that runs in fast memory, µs, in lean memory, µs]``, and the one in fast memory for M - 1 tokens if that is another one;
- ``inspect``: the lines that ``inspect --plan`` prints, runs of blanks as one, with and without ``--vllm``;
- ``adapter``: why vLLM runs a layer on its own kernels, or else the routes it runs, each up to so many tokens.

Routes are written short, see `short`: ``d:`` dense, ``r:`` restored in every call, ``s:`` cuSPARSELt with its algorithm, ``k=`` split_k and
``m=`` its mode.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import unified_diff
from math import exp, fsum, log
from pathlib import Path
from sys import maxsize
from types import SimpleNamespace
from typing import Any
from unittest import mock

from slidesparse.cli import screen, tuning
from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan, execution, handover, key_of, routes
from slidesparse.gemm.plan import Key
from slidesparse.gemm.tuning import Layer, merged_layers
from slidesparse.pattern import Pattern

ROOT = Path(__file__).resolve().parent.parent
PLANS = sorted((ROOT / "src" / "slidesparse" / "gemm" / "tuned").glob("*.json"))
DATA = Path(__file__).resolve().parent / "data"

MODELS = {
    "Qwen2.5-7B": {"hidden": 3584, "kv": 512, "intermediate": 18944},
    "Llama-3.2-1B": {"hidden": 2048, "kv": 512, "intermediate": 8192},
    "Llama-3.2-3B": {"hidden": 3072, "kv": 1024, "intermediate": 8192},
}
PATTERNS, KINDS = ("6:8", "2:4"), ("int8", "fp8", "bf16")

# What vLLM is started with: its compiler, without which it fuses nothing, and the most tokens in a step.
SETTINGS = {
    "compiled, 8192 tokens": (True, handover.STEP),
    "compiled, 2048 tokens": (True, 2048),
    "compiled, 16384 tokens": (True, 16384),
    "eager, 8192 tokens": (False, handover.STEP),
}

ABBREVIATED = {
    "cusparselt:alg=": "s:", "cusparselt:": "s:", "split_k=": "k=", "mode=": "m=", "dense:": "d:", "restore:": "r:",
}  # fmt: skip
ROUTE = re.compile(r"(?<![^\s,:])(" + "|".join(ABBREVIATED) + ")")
VLLMS = "vLLM's"

Row = list[Any]
Frozen = dict[str, Any]


def frozen(path: Path) -> Frozen:
    """What runs by the plan in that file."""
    plan = Plan.load(path)
    return {
        "plan": path.name,
        "measured": plan.date,
        "cells": dict(_cells(plan)),
        "inspect": dict(_inspected(plan)),
        "adapter": dict(_adapter(plan)),
    }


def data_file(path: Path) -> Path:
    """Where the choices of a plan are kept."""
    return DATA / f"choices-{path.name}"


def as_json(found: Frozen) -> str:
    """One line a row, so that version control shows what changed."""
    sections = []
    for name in ("cells", "inspect", "adapter"):
        groups = (f" {_text(title)}: {_lines(rows)}" for title, rows in found[name].items())
        sections.append(f"{_text(name)}: {{\n" + ",\n".join(groups) + "\n}")
    head = ", ".join(f"{_text(name)}: {_text(found[name])}" for name in ("plan", "measured"))
    return f"{{{head},\n" + ",\n".join(sections) + "}\n"


def _lines(rows: list | dict) -> str:
    if isinstance(rows, dict):
        return "{\n" + ",\n".join(f"  {_text(name)}: {_text(value)}" for name, value in rows.items()) + "}"
    return "[\n" + ",\n".join(f" {_text(row)}" for row in rows) + "]"


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":") if isinstance(value, list) else None)


def short(route: str | None) -> str | None:
    """A route, or those in a line of text, in the notation of the data: different ones stay different."""
    return None if route is None else ROUTE.sub(lambda found: ABBREVIATED[found[0]], route)


def _cells(plan: Plan) -> Iterator[tuple[str, list[Row]]]:
    for key in plan.cells:
        whole, unscaled = ([_row(plan, key, m, (), sums) for m in plan.table(key, sums=sums)] for sums in (False, True))
        engines = [name for name in plan.routes(key) if name.endswith(handover.RIVAL.removeprefix("dense"))]
        without = [_row(plan, key, m, engines, False) for m in plan.table(key)]
        found = {"whole": whole, "unscaled": unscaled, "without": [row for row in without if row not in whole]}
        yield from ((f"{title(*key)} {name}", rows) for name, rows in found.items() if rows)


def _row(plan: Plan, key: Key, m: int, without: Collection[str], unscaled: bool) -> Row:
    cell = plan.cells[key][m]
    dense, times = cell.dense(without, sums=unscaled), cell.times(unscaled)
    row = [m, *((None, None) if dense is None else (short(dense[0]), dense[1].p50))]
    for memory in ("fast", "lean"):
        runs = plan.route(key, m, memory, without, sums=unscaled)
        row += [short(runs), None if runs is None else times[runs].p50]
    fewer = short(plan.route(key, m - 1, "fast", without, sums=unscaled)) if m > 1 else row[3]
    return row if fewer == row[3] else [*row, fewer]


def title(n: int, k: int, pattern: str, scheme: str) -> str:
    """A layer's name in the data."""
    return f"{n}×{k} {pattern} {scheme}"


@contextmanager
def vllm_kernels(there: bool) -> Iterator[None]:
    """As in a process that has vLLM's kernels, or has not, whatever is installed here."""
    vllms = handover.RIVAL.partition(":")[2]
    table = {name: route for name, route in routes._ROUTES.items() if name != vllms}
    if there:
        table[vllms] = routes.Route(lambda problem: None, lambda *arguments: None, lambda *arguments: None)
    with mock.patch.object(routes, "_ROUTES", table):
        yield


def model(name: str, pattern: str, scheme: str) -> dict[str, Layer]:
    """The linear layers of one block of a model, as its checkpoint holds them."""
    hidden, kv, wide = (MODELS[name][part] for part in ("hidden", "kv", "intermediate"))
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    return {f"model.layers.0.{part}": Layer(n, k, Pattern.parse(pattern), SCHEMES[scheme]) for part, (n, k) in shapes.items()}


def _models() -> Iterator[tuple[str, dict[str, Layer]]]:
    for name in MODELS:
        for pattern in PATTERNS:
            for scheme in KINDS:
                yield f"{name} {pattern} {scheme}", model(name, pattern, scheme)


def _inspected(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    for name, layers in _models():
        with vllm_kernels(False):
            yield name, _printed(plan, tuning.distinct(layers, merged=True))
        down = {part: layer for part, layer in layers.items() if layer.scheme.dynamic and handover.follows_swiglu(part, "silu")}
        with vllm_kernels(True):
            yield f"{name} --vllm", _printed(plan, tuning.served(layers, 1), vllm=True, swiglu=frozenset(tuning.served(down, 1)))


def _printed(plan: Plan, layers: list[Layer], **how: Any) -> list[str]:
    wide = screen.Console(highlight=False, soft_wrap=True, width=400, color_system=None)
    with mock.patch.object(screen, "out", wide), wide.capture() as shown:
        tuning.print_plan(plan, layers, **how)
    return [short(" ".join(line.split())) for line in shown.get().splitlines()]


def _adapter(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    for setting, (compiled, most) in SETTINGS.items():
        for name, layers in _models():
            parts = {part.rpartition(".")[2]: layer for part, layer in merged_layers(layers).items()}
            yield f"{name}, {setting}", {part: _decided(plan, part, layer, compiled, most) for part, layer in parts.items()}


def _decided(plan: Plan, name: str, layer: Layer, compiled: bool, most: int) -> dict[str, Any]:
    """As `SlideSparseLinearMethod.process_weights_after_loading` decides, on one rank, with no backend asked for."""
    problem = layer.problem
    unscaled = compiled and layer.scheme.dynamic
    behind = unscaled and handover.follows_swiglu(name, "silu")
    why, chooses = handover.decide(plan, problem, sums=unscaled, without=frozenset(), most=most, swiglu=behind)
    return {"ours": _steps(layer, chooses, unscaled, most)} if why is None else {VLLMS: why}


def _steps(layer: Layer, plan: Plan, unscaled: bool, most: int) -> list[Row]:
    """`Execution.planned_steps` where all that was timed can run: most tokens, none in the last, and the route."""

    def named(route: str, *arguments: object, **how: object) -> SimpleNamespace:
        backend, _, variant = route.partition(":")
        return SimpleNamespace(backend=backend, variant=variant)

    untuned = {"cannot_run": lambda *arguments: frozenset(), "named": named, "choose": lambda *arguments, **how: named("untuned:")}
    with mock.patch.multiple(execution, **untuned):
        steps = execution.Execution(None, sums=unscaled, most=most, plan=plan).planned_steps(layer.problem)
    return [[None if most == maxsize else most, short(f"{choice.backend}:{choice.variant}")] for most, choice in steps]


@dataclass(frozen=True)
class Change:
    """One cell that runs something else, or in another time: routes before and after, microseconds of both and of the best dense route."""

    cell: str
    before: str | None
    after: str | None
    before_us: float | None
    after_us: float | None
    before_dense: float | None
    after_dense: float | None

    def __str__(self) -> str:
        if self.before is None and self.after is None:
            return self.cell
        times = (self.before_us, self.before_dense, self.after_us, self.after_dense)
        old, old_dense, new, new_dense = ("-" if us is None else f"{us:.2f}" for us in times)
        return f"{self.cell:62} {self.before or '-':20} {old:>9} {old_dense:>9}   {self.after or '-':20} {new:>9} {new_dense:>9}"


def changes(before: Frozen, after: Frozen, plan: Plan) -> list[Change]:
    """The cells of two states of the data that differ; times of what the adapter runs are the plan's."""
    found = []
    old, new = (_flat(state["cells"]) for state in (before, after))
    for cell in dict.fromkeys([*old, *new]):
        one, other = old.get(cell, (None,) * 3), new.get(cell, (None,) * 3)
        if one != other:
            found.append(Change(cell, one[0], other[0], one[1], other[1], one[2], other[2]))
    for name in dict.fromkeys([*before["adapter"], *after["adapter"]]):
        parts = [state["adapter"].get(name, {}) for state in (before, after)]
        for part in dict.fromkeys([*parts[0], *parts[1]]):
            one, other = (of.get(part) for of in parts)
            if one != other:
                found += _adapter_changes(name, part, one, other, plan)
    return found


def _flat(cells: dict[str, list[Row]]) -> dict[str, tuple[str | None, float | None, float | None]]:
    """Route, its time and dense's by cell and memory; what is left out as equal is filled in."""
    found = {}
    for name, rows in cells.items():
        layer, _, kind = name.rpartition(" ")
        if kind == "without":
            continue
        found |= _flat_rows(name, rows)
        if kind == "whole":
            differ = {row[0]: row for row in cells.get(f"{layer} without", [])}
            found |= _flat_rows(f"{layer} without", [differ.get(row[0], row) for row in rows])
    return found


def _flat_rows(name: str, rows: list[Row]) -> dict[str, tuple[str | None, float | None, float | None]]:
    found = {}
    for m, _, dense_us, fast, fast_us, lean, lean_us, *fewer in rows:
        found[f"{name} M={m}"] = fast, fast_us, dense_us
        found[f"{name} lean M={m}"] = lean, lean_us, dense_us
        found[f"{name} M={m - 1}, between"] = fewer[0] if fewer else fast, None, None
    return found


def _adapter_changes(name: str, part: str, before: dict | None, after: dict | None, plan: Plan) -> Iterator[Change]:
    """Whose the layer is, and where both are known what runs the measured numbers of tokens."""
    told = [None if one is None else one.get(VLLMS) or "ours" for one in (before, after)]
    if told[0] != told[1]:
        yield Change(f"{name}, {part}: {told[0]} → {told[1]}", None, None, None, None, None, None)
    kind, compiled = name.partition(",")[0], SETTINGS[name.partition(", ")[2]][0] if name.partition(", ")[2] in SETTINGS else True
    layer = {p.rpartition(".")[2]: layer for p, layer in merged_layers(dict(_models())[kind]).items()}[part]
    unscaled = compiled and layer.scheme.dynamic
    for m, cell in plan.table(key_of(layer.problem), sums=unscaled).items():
        runs = [None if one is None else _runs(one, m) for one in (before, after)]
        if runs[0] != runs[1]:
            times = {short(route): timing.p50 for route, timing in cell.times(unscaled).items()} | {VLLMS: _vllms(cell, unscaled)}
            dense = cell.dense(sums=unscaled)
            us = None if dense is None else dense[1].p50
            yield Change(f"{name}, {part} M={m}", *runs, *(times.get(run) for run in runs), us, us)


def _runs(decided: dict, m: int) -> str:
    return next((route for most, route in decided.get("ours", []) if most is None or m <= most), VLLMS)


def _vllms(cell: Cell, unscaled: bool) -> float | None:
    """Microseconds of vLLM's own product, or of the best dense route where it was not timed."""
    found = [times[handover.RIVAL].p50 for times in (cell.times(unscaled), cell.timings) if handover.RIVAL in times]
    dense = cell.dense(sums=unscaled)
    return min(found) if found else None if dense is None else dense[1].p50


def report(before: Frozen, after: Frozen, plan: Plan) -> list[str]:
    """Every change as a line of text; none where the states are equal."""
    if before == after:
        return []
    found = changes(before, after, plan)
    head = f"{'cell':62} {'before':20} {'µs':>9} {'dense µs':>9}   {'after':20} {'µs':>9} {'dense µs':>9}"
    lines = [f"{after['plan']}: {len(found)} cells differ", head, *map(str, found)]
    ratios = [log(one.after_us / one.before_us) for one in found if one.before_us and one.after_us and one.before != one.after]
    if ratios:
        lines.append(f"{len(ratios)} of them run another route, in {exp(fsum(ratios) / len(ratios)):.4f} of the time (geometric mean)")
    for name in dict.fromkeys([*before["inspect"], *after["inspect"]]):
        old, new = (state["inspect"].get(name, []) for state in (before, after))
        lines += unified_diff(old, new, f"inspect --plan, before: {name}", "after", n=0, lineterm="")
    heads = [{name: state.get(name) for name in ("plan", "measured")} for state in (before, after)]
    return lines if heads[0] == heads[1] else [*lines, f"{heads[0]} → {heads[1]}"]


def main() -> None:
    """Write the data of both plans, or only show what would change."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    check, changed = parser.parse_args().check, False
    for path in PLANS:
        file, found = data_file(path), frozen(path)
        if file.exists():
            lines = report(json.loads(file.read_text(encoding="utf-8")), found, Plan.load(path))
        else:
            lines = [f"{path.name}: there is no data yet"]
        changed = changed or bool(lines)
        print("\n".join(lines or [f"{path.name}: nothing differs"]))
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(as_json(found), encoding="utf-8")
    sys.exit(1 if check and changed else 0)


if __name__ == "__main__":
    main()
