"""A serving benchmark's picture and, printed, its tables: throughput over that of vLLM alone, losing cells included.

python benchmarks/plot_serving.py benchmarks/results/archive/h100_serving.csv docs/results/serving-h100.png

Where the rows have ``gpu_ms``, what the steps' kernels take is compared, too: below in the picture, in brackets in the tables.
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from collections import defaultdict
from decimal import ROUND_HALF_UP, Decimal
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

TITLES = {"prefill": "prefill: tokens in the step", "decode": "decode: requests in the batch"}
NOTHING = ", nothing ours"
COLOURS = [f"C{number}" for number in range(10) if number != 7]  # that one is grey


class Line(NamedTuple):
    """One packed model in one phase: vLLM's time over its own by number of tokens, of steps and of their kernels."""

    model: str
    what: str
    gb: str
    steps: dict[int, Decimal]
    kernels: dict[int, Decimal]


def read(table: Path) -> tuple[dict[str, list[Line]], str]:
    """The lines of each phase, and a title."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # Each run asks every point once.
    alone = {(run_of(row), row["phase"], row["tokens"]): row for row in rows if row["served"] == "dense"}
    lines: dict[str, dict[tuple, Line]] = defaultdict(dict)
    for row in rows:
        if row["served"] == "dense":
            continue
        theirs = alone[run_of(row), row["phase"], row["tokens"]]
        how = row["how"].removeprefix("as the plan has it").removeprefix(", ")
        what = f"{row['pattern']} {row['scheme']}" + (f", {how}" if how else "") + (NOTHING if bitwise(row) else "")
        line = Line(row["model"], what, f"{row['model_gb']} against {theirs['model_gb']}", {}, {})
        line = lines[row["phase"]].setdefault((*run_of(row), how), line)
        line.steps[int(row["tokens"])] = Decimal(theirs["ms"]) / Decimal(row["ms"])
        if row.get("gpu_ms"):
            line.kernels[int(row["tokens"])] = Decimal(theirs["gpu_ms"]) / Decimal(row["gpu_ms"])
    return {phase: list(found.values()) for phase, found in lines.items()}, f"{rows[0]['gpu']}, vLLM's latency benchmark, {rows[0]['date']}"


def run_of(row: dict[str, str]) -> tuple[str, ...]:
    """What tells a run of the benchmark from another one."""
    return row["commit"], row["model"], row["scheme"], row["pattern"], row["how"].partition("CUDA graphs")[2]


def bitwise(row: dict[str, str]) -> bool:
    """Whether both models gave the same log-probabilities, as they do where every layer is vLLM's own."""
    return row["logprob_diff"] != "" and float(row["logprob_diff"]) == 0


def table_of(lines: list[Line]) -> str:
    """In Markdown."""
    columns = sorted({tokens for line in lines for tokens in line.steps})
    rows = [["", *map(str, columns), "GB of weights"], ["---", *["---:"] * (len(columns) + 1)]]
    for line in lines:
        rows.append([f"{line.model}, {line.what}", *(cell(line, tokens) for tokens in columns), line.gb])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(line: Line, tokens: int) -> str:
    both = [str(of[tokens].quantize(Decimal("0.01"), ROUND_HALF_UP)) for of in (line.steps, line.kernels) if tokens in of]
    return f"{both[0]} ({both[1]})" if len(both) == 2 else "".join(both)


def picture(lines: dict[str, list[Line]], title: str, place: Path) -> None:
    """Steps above, their kernels below."""
    whole = any(line.kernels for found in lines.values() for line in found)
    figure, grid = plt.subplots(1 + whole, 2, figsize=(11, 9 if whole else 5), sharey="row", squeeze=False, layout="constrained")
    colours: dict[str, str] = {}
    markers: dict[str, str] = {}
    for (across, phase), (down, of) in product(enumerate(TITLES), enumerate(("steps", "kernels")[: 1 + whole])):
        axis = grid[down, across]
        axis.axhline(1, color="black", linewidth=1)
        for line in lines.get(phase, []):
            points = sorted(getattr(line, of).items())
            same = line.what.endswith(NOTHING)
            colour = "lightgrey" if same else colours.setdefault(line.what, COLOURS[len(colours) % len(COLOURS)])
            marker = markers.setdefault(line.model, "os^Dv"[len(markers) % 5])
            label = textwrap.fill(f"{line.model}, {line.what}", 70) if (across, down) == (0, 0) else None
            axis.plot([tokens for tokens, _ in points], [float(ratio) for _, ratio in points], marker=marker, color=colour, label=label)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axis.set_xlabel(TITLES[phase])
        axis.grid(alpha=0.3)
    for axes, what in zip(grid, ("throughput ÷ vLLM alone, same run", "kernels' time of vLLM alone ÷ ours"), strict=False):
        axes[0].set_ylabel(what)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(place, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    lines, title = read(arguments.table)
    picture(lines, title, arguments.picture)
    for phase, found in lines.items():
        print(f"{phase}\n\n{table_of(found)}\n")


if __name__ == "__main__":
    main()
