"""What the shipped plans make run today, as data: `test_frozen_choices` replays it, and a change of the choice is judged by it.

    python tests/freeze_choices.py [--check] [--csv FILE]

Writes ``tests/data/choices-GPU.json`` and shows what changes, or with ``--check`` only shows it; ``--csv`` also writes the cells that
change into a table. No GPU, Triton or vLLM is needed: whatever a plan has timed is taken to run, but for vLLM's kernels where the process
is said to be without them.

Every file holds, for the plan of that GPU,

- ``keeps``: by layer and form the layouts that stay and their share of the dense weights' bytes. A form is ``with`` vLLM's kernels, or
  ``without`` them where that differs;
- ``cells``: one row for every measured number of tokens: ``[M, best dense route, µs, route that runs, µs, in lean memory, µs]``;
- ``adapter``: why vLLM runs a layer on its own kernels, or else the layouts that stay and the routes, each up to so many tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from sys import maxsize
from typing import Any, NamedTuple

from plans import problem_of
from slidesparse.format import SCHEMES
from slidesparse.gemm import Plan, Route
from slidesparse.gemm.choose import Times, choice_of, geometric_mean, route_at
from slidesparse.gemm.layouts import LAYOUTS
from slidesparse.gemm.plan import Key
from slidesparse.gemm.tune import LinearShape
from slidesparse.integrations.engine.policy import decide
from slidesparse.integrations.engine.shapes import follows_swiglu, merged_layers
from slidesparse.integrations.vllm_facts import KERNEL, STEP, facts
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
    "compiled, 8192 tokens": (True, STEP),
    "compiled, 2048 tokens": (True, 2048),
    "compiled, 16384 tokens": (True, 16384),
    "eager, 8192 tokens": (False, STEP),
}

SECTIONS = ("keeps", "cells", "adapter")
Frozen = dict[str, Any]


def frozen(path: Path) -> Frozen:
    """What runs by the plan in that file."""
    plan = Plan.load(path)
    found: Frozen = {"plan": path.name, "measured": plan.date} | {section: {} for section in SECTIONS}
    for key in plan.cells:
        forms = {form: _chosen(plan, key, form) for form in ("with", "without")}
        for form, (keeps, rows) in forms.items():
            if rows and not (form == "without" and rows == forms["with"][1]):
                name = f"{key[0]}×{key[1]} {key[2]} {key[3]} {form}"
                found["keeps"][name], found["cells"][name] = keeps, rows
    for setting, (compiled, most) in SETTINGS.items():
        for name, layers in _models():
            decisions = {part.rpartition(".")[2]: _decided(plan, part, layer, compiled, most) for part, layer in layers.items()}
            found["adapter"][f"{name}, {setting}"] = decisions
    return found


def data_file(path: Path) -> Path:
    """Where the choices of a plan are kept."""
    return DATA / f"choices-{path.name}"


def as_json(found: Frozen) -> str:
    """One line a row, so that version control shows what changed."""
    sections = []
    for name in SECTIONS:
        groups = (f" {_text(title)}: {_lines(rows)}" for title, rows in found[name].items())
        sections.append(f"{_text(name)}: {{\n" + ",\n".join(groups) + "\n}")
    head = ", ".join(f"{_text(name)}: {_text(found[name])}" for name in ("plan", "measured"))
    return f"{{{head},\n" + ",\n".join(sections) + "}\n"


def _lines(rows: list | dict) -> str:
    if isinstance(rows, dict):
        return "{\n" + ",\n".join(f"  {_text(name)}: {_text(value)}" for name, value in rows.items()) + "}"
    return "[\n" + ",\n".join(f" {_text(row)}" for row in rows) + "]" if isinstance(rows[0], list) else _text(rows)


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _chosen(plan: Plan, key: Key, form: str) -> tuple[list, list[list]]:
    """What stays, and the rows of ``cells``."""
    problem = problem_of(key)
    without = [route for route in plan.routes(key) if form == "without" and route.kernel == KERNEL]
    layouts, fast = choice_of(plan, problem, without=without)
    _, lean = choice_of(plan, problem, without=without, memory="lean")
    nbytes = sum(LAYOUTS[name].nbytes(problem) for name in layouts) / LAYOUTS["dense"].nbytes(problem)
    cells = plan.times(key, without=without)
    rows = [
        [m, *_timed(_best_dense(times), times), *(part for runs in (fast, lean) for part in _runs(runs, m, times))]
        for m, times in cells.items()
    ]
    return [*layouts, round(nbytes, 3)], rows


def _best_dense(times: Times) -> Route | None:
    return min((route for route in times if route.layout == "dense"), key=lambda route: times[route].p50, default=None)


def _runs(steps: Collection[tuple[int, Route | None]], m: int, times: Times) -> tuple[str | None, float | None]:
    return _timed(route_at(steps, m), times)


def _timed(route: Route | None, times: Times) -> tuple[str | None, float | None]:
    return (None, None) if route is None else (str(route), times[route].p50)


def _models() -> Iterator[tuple[str, dict[str, LinearShape]]]:
    """The linear layers of one block of every model, as vLLM merges them."""
    for name, sizes in MODELS.items():
        hidden, kv, wide = (sizes[part] for part in ("hidden", "kv", "intermediate"))
        shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden), "gate": (wide, hidden)}
        shapes |= {"up": (wide, hidden), "down": (hidden, wide)}
        for pattern in PATTERNS:
            for scheme in KINDS:
                layers = {f"m.{part}_proj": LinearShape(*of, Pattern.parse(pattern), SCHEMES[scheme]) for part, of in shapes.items()}
                yield f"{name} {pattern} {scheme}", merged_layers(layers)


def _decided(plan: Plan, name: str, layer: LinearShape, compiled: bool, most: int) -> str | list:
    """As the adapter's `dense.decided` decides, on one rank, with no route asked for."""
    known = facts(layer.problem, most=most, swiglu=compiled and layer.scheme.dynamic and follows_swiglu(name, "silu"))
    found = decide(layer.problem, plan, known)
    steps = [[None if most == maxsize else most, str(route)] for most, route in found.steps]
    return [*found.layouts, steps] if found.why is None else found.why


class Change(NamedTuple):
    """One cell that runs something else, or in another time, and the best dense time."""

    gpu: str
    layer: str
    form: str
    M: int
    memory: str
    before: str | None
    before_us: float | None
    after: str | None
    after_us: float | None
    best_dense_us: float | None


def changes(before: Frozen, after: Frozen) -> list[Change]:
    """The cells of two states of the data that differ."""
    found, old, new = [], *map(_flat, (before["cells"], after["cells"]))
    for where in dict.fromkeys([*old, *new]):
        (one, one_us, dense), (other, other_us, new_dense) = old.get(where, (None,) * 3), new.get(where, (None,) * 3)
        if (one, one_us) != (other, other_us):
            found.append(
                Change(after["plan"].partition(".")[0], *where, one, one_us, other, other_us, dense if new_dense is None else new_dense)
            )
    return found


def _flat(cells: dict[str, list[list]]) -> dict[tuple[str, str, int, str], tuple]:
    """Route, its time and dense's by layer, form, number of tokens and memory; what is left out as equal is filled in."""
    found = {}
    for name, rows in cells.items():
        layer, _, form = name.rpartition(" ")
        also = form == "with" and f"{layer} without" not in cells
        for m, _, dense_us, *runs in rows:
            for memory, told in (("fast", runs[:2]), ("lean", runs[2:4])):
                for kind in (form, "without") if also else (form,):
                    found[layer, kind, m, memory] = (*told, dense_us)
    return found


def report(before: Frozen, after: Frozen) -> list[str]:
    """Every change as a line of text; none where the states are equal."""
    if before == after:
        return []
    found = changes(before, after)
    lines = [f"{after['plan']}: {len(found)} cells differ", "\t".join(Change._fields)]
    lines += ["\t".join("-" if value is None else str(value) for value in one) for one in found]
    ratios = [one.after_us / one.before_us for one in found if one.before_us and one.after_us]
    if ratios:
        lines.append(f"{len(ratios)} of them run in {geometric_mean(ratios):.4f} of the time (geometric mean)")
    for section in ("keeps", "adapter"):
        for name in dict.fromkeys([*before[section], *after[section]]):
            one, other = (state[section].get(name) for state in (before, after))
            both = [one, other] if isinstance(one, dict) and isinstance(other, dict) else [{"": one}, {"": other}]
            lines += [
                f"{section} {name}, {part}: {both[0].get(part)} → {told}" for part, told in both[1].items() if both[0].get(part) != told
            ]
    heads = [{name: state.get(name) for name in ("plan", "measured")} for state in (before, after)]
    return lines if heads[0] == heads[1] else [*lines, f"{heads[0]} → {heads[1]}"]


def write_csv(path: Path, found: Collection[Change]) -> None:
    """A table of changes."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Change._fields, *found])


def main() -> None:
    """Write the data of both plans, or only show what would change."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    parser.add_argument("--csv", type=Path, help="also write the cells that change into this table")
    arguments, changed, cells = parser.parse_args(), False, []
    for path in PLANS:
        file, found = data_file(path), frozen(path)
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            lines = report(before, found)
            cells += changes(before, found)
        else:
            lines = [f"{path.name}: there is no data yet"]
        changed = changed or bool(lines)
        print("\n".join(lines or [f"{path.name}: nothing differs"]))
        if not arguments.check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(as_json(found), encoding="utf-8")
    if arguments.csv:
        write_csv(arguments.csv, cells)
    sys.exit(1 if arguments.check and changed else 0)


if __name__ == "__main__":
    main()
