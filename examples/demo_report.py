"""The demo's results as tables on the screen, JSON, CSV, Markdown and one picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slidesparse import Pattern

Row = dict[str, Any]
INK, BLUE, ORANGE, GREY = "#222222", "#2166ac", "#d6604d", "#9a9a9a"


def size_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the size table; times are against dense bf16."""
    dense = rows[0]
    cells = [
        [
            row["form"],
            row["pattern"],
            row["weights"],
            f"{row['linears_bytes'] / 1e6:.1f}",
            f"{row['linears_bytes'] / dense['linears_bytes']:.3f}",
            f"{row['checkpoint_bytes'] / 1e6:.1f}",
        ]
        for row in rows
    ]
    return ["stored as", "pattern", "weights", "linears, MB", "× dense bf16", "whole checkpoint, MB"], cells


def perplexity_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the perplexity table."""
    cells = [
        [
            row["model"],
            row["method"],
            f"{100 * kept(row):.1f} %",
            f"{row['perplexity']:.1f}",
            f"{row['linears_bytes'] / 1e6:.1f}",
            f"{row['tokens']}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return ["model", "pruned by", "weights kept", "perplexity", "linears, packed, MB", "tokens", "seconds"], cells


def kept(row: Row) -> float:
    """The part of the linear layers' weights that a row's pattern keeps."""
    pattern = None if row["pattern"] == "–" else Pattern.parse(row["pattern"])
    return 1.0 if pattern is None else pattern.kept / pattern.group


def show(console: Console, title: str, header: list[str], cells: list[list[str]]) -> None:
    """Print one table."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in cells:
        table.add_row(*row)
    console.print(table)


def markdown(header: list[str], cells: list[list[str]]) -> str:
    """One table as Markdown."""
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *cells])


def write(out: Path, results: dict[str, Any], text: str) -> None:
    """Write results.json, sizes.csv, perplexity.csv, results.md and picture.png into ``out``."""
    (out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "results.md").write_text(text, encoding="utf-8")
    for name in ("sizes", "perplexity"):
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(results[name][0]))
            writer.writeheader()
            writer.writerows(results[name])
    picture(out / "picture.png", results)


def picture(path: Path, results: dict[str, Any]) -> None:
    """Perplexity against weights kept, beside the bytes of the linear layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.2), width_ratios=(1.15, 1), layout="constrained")
    _perplexity_panel(left, results["perplexity"])
    _size_panel(right, results["sizes"])
    figure.suptitle(f"{results['model']}, pruned without training", fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _perplexity_panel(axes: Any, rows: list[Row]) -> None:
    for row in rows:
        int8 = row["weights"] == "int8"
        color, marker = (ORANGE, "D") if int8 else (BLUE, "o")
        axes.plot(100 * kept(row), row["perplexity"], marker, color=color, ms=9 if int8 else 8, mfc="none" if int8 else color, mew=2)
        if row["pattern"] == "–":
            _label(axes, row, f"dense  {_short(row['perplexity'])}", 0, -20, "center", color)
        elif int8:
            _label(axes, row, f"int8, packed  {_short(row['perplexity'])}", -10, -16, "right", color)
        else:
            _label(axes, row, f"{row['pattern']} {row['method']}  {_short(row['perplexity'])}", 10, 8, "left", color)
    axes.set_yscale("log")
    axes.set_xlim(46, 104)
    low, high = min(row["perplexity"] for row in rows), max(row["perplexity"] for row in rows)
    axes.set_ylim(low * 0.6, high * 2)
    axes.set_xlabel("weights kept in the linear layers, %")
    axes.set_ylabel("perplexity (log scale, lower is better)")
    axes.set_title(f"Perplexity on {rows[0]['tokens']} tokens", loc="left", fontsize=11)
    axes.grid(True, which="major", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Any, row: Row, text: str, right: int, up: int, align: str, color: str) -> None:
    place = (100 * kept(row), row["perplexity"])
    axes.annotate(text, place, xytext=(right, up), textcoords="offset points", ha=align, color=color, fontweight="bold")


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _size_panel(axes: Any, rows: list[Row]) -> None:
    dense = rows[0]["linears_bytes"]
    shown = [row for row in rows if row["form"] != "masked"]
    labels = [f"{'dense' if row['form'] == 'dense' else row['pattern']}  {row['weights']}" for row in shown]
    colors = [GREY if row["form"] == "dense" else ORANGE if row["weights"] == "int8" else BLUE for row in shown]
    places = range(len(shown))
    axes.barh(places, [row["linears_bytes"] / 1e6 for row in shown], color=colors, height=0.68)
    for place, row in zip(places, shown, strict=True):
        share = "" if place == 0 else f"  ({row['linears_bytes'] / dense:.0%})"
        megabytes = row["linears_bytes"] / 1e6
        axes.text(megabytes + dense * 0.012 / 1e6, place, f"{megabytes:.0f} MB{share}", va="center", fontsize=10)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, dense * 1.22 / 1e6)
    axes.set_xlabel("MB: values, keep-bits and scales")
    axes.set_title("What the linear layers take on disk", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
