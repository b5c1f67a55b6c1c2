"""The picture of a serving benchmark: throughput over that of vLLM alone, by tokens in a step, losing cells included.

python benchmarks/plot_serving.py benchmarks/results/h100_serving.csv docs/serving-h100.png
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

TITLES = {"prefill": "prefill: tokens in the step", "decode": "decode: requests in the batch"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = defaultdict(list)
    with arguments.table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["served"] != "dense":
            how = (row.get("how") or "").removeprefix("as the plan has it").removeprefix(", ")
            what = f"{row['scheme']} {row['pattern']}" + (f", {how}" if how else "")
            lines[row["phase"], row["model"], what].append((int(row["tokens"]), float(row["x_dense"])))
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    colours: dict[str, str] = {}
    markers: dict[str, str] = {}
    for axis, (phase, title) in zip(axes, TITLES.items(), strict=True):
        axis.axhline(1, color="black", linewidth=1)
        for (of, model, what), points in lines.items():
            if of == phase:
                colour = colours.setdefault(what, f"C{len(colours)}")
                marker = markers.setdefault(model, "os^Dv"[len(markers) % 5])
                label = textwrap.fill(f"{model}, {what}", 70) if axis is axes[0] else None
                axis.plot(*zip(*sorted(points), strict=True), marker=marker, color=colour, label=label)
        axis.set(xscale="log", xlabel=title)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("throughput ÷ vLLM alone, same run")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    first = rows[0]
    figure.suptitle(f"{first['gpu']}, vLLM's latency benchmark, {first['date']}", fontsize="medium")
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
