"""The accuracy study's picture: what a pattern costs in perplexity, by method.

python benchmarks/accuracy/plot.py RESULTS.csv docs/accuracy.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from tables import METHODS, PATTERNS, read

from slidesparse.bench.accuracy import NAMES

COLOURS = {"magnitude": "#999999", "wanda": "#E69F00", "sparsegpt": "#56B4E9", "admm": "#009E73", "auto": "#D55E00"}
"""Of Okabe and Ito, told apart by colour-blind eyes; markers tell the methods apart, too."""
MARKERS = {"magnitude": "s", "wanda": "^", "sparsegpt": "D", "admm": "v", "auto": "o"}


def kept(pattern: str) -> float:
    """Share of the weights that a pattern keeps, in %."""
    some, of = pattern.split(":")
    return 100 * int(some) / int(of)


def picture(table: Path, place: Path) -> None:
    """A panel per model; the axis of loss is logarithmic, so that magnitude at 2:4 and the best at 8:10 are both seen."""
    studied = sorted(read(table).items(), key=lambda item: -len(item[1]))  # the most cells first
    models = {model: cells for model, cells in studied if loss(cells, "auto") or loss(cells, "magnitude")}
    size = (5.5 * len(models), 4.5)
    figure, axes = plt.subplots(1, len(models), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained")
    for axis, (model, cells) in zip(axes[0], models.items(), strict=True):
        for method, shown in METHODS.items():
            points = loss(cells, method)
            if points:
                axis.plot(*zip(*points, strict=True), color=COLOURS[method], marker=MARKERS[method], label=shown)
        axis.set_yscale("log", nonpositive="clip")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g} %")
        axis.yaxis.set_minor_formatter(lambda value, _: "")
        axis.set_xticks([kept(pattern) for pattern in PATTERNS], [f"{pattern}\n{kept(pattern):.0f} %" for pattern in PATTERNS])
        axis.set_xlabel("pattern and weights kept")
        axis.set_title(f"{NAMES.get(model, model)}, bf16", fontsize="medium")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("WikiText-2 perplexity above the dense model's")
    max(axes[0], key=lambda axis: len(axis.lines)).legend(fontsize="small")
    figure.savefig(place, dpi=110)


def loss(cells: dict, method: str) -> list[tuple[float, float]]:
    """Kept weights, and by how many % the perplexity lies above the dense model's."""
    dense = cells.get(("dense", "-", "bf16"), {}).get(("text", "perplexity"))
    found = [(pattern, cells.get((method, pattern, "bf16"), {}).get(("text", "perplexity"))) for pattern in PATTERNS]
    return [(kept(pattern), 100 * (float(row["value"]) / float(dense["value"]) - 1)) for pattern, row in found if row and dense]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("picture", type=Path)
    asked = parser.parse_args()
    picture(asked.table, asked.picture)


if __name__ == "__main__":
    main()
