"""Markdown tables of the accuracy study: ``python benchmarks/accuracy/tables.py RESULTS.csv [--into docs/accuracy.md]``.

With ``--into`` the tables replace what stands between the document's markers.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

from slidesparse.bench.accuracy import NAMES

PATTERNS = ("8:10", "6:8", "4:6", "2:4")
"""Columns, from the most weights kept to the fewest."""
METHODS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "admm": "ADMM",
    "auto": "auto (ADMM, reconstruction)",
}
MEANS = {"mean_of_10": "10 tasks", "mean_of_9": "9 tasks", "mean_of_4": "4 tasks"}
TASKS = (
    *("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "openbookqa", "boolq", "lambada_openai", "mmlu", "gsm8k"),
    *MEANS,
)
MAIN = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "openbookqa": "acc_norm", "gsm8k": "exact_match:flexible-extract"}
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

NOT_RUN = "not run"
SCHEMES = ("bf16", "int8", "fp8")

Row = dict[str, str]
Key = tuple[str, str, str]
"""Method, pattern, scheme."""


def read(table: Path) -> dict[str, dict[Key, dict[tuple[str, str], Row]]]:
    """Rows by model, cell, and stage with metric."""
    models: dict[str, dict[Key, dict[tuple[str, str], Row]]] = {}
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            cell = models.setdefault(row["model"], {}).setdefault((row["method"], row["pattern"], row["scheme"]), {})
            cell[row["stage"], row["metric"]] = row
    return models


def tables_of(models: dict[str, dict[Key, dict[tuple[str, str], Row]]]) -> str:
    parts = []
    for model, cells in models.items():
        parts += [f"### {NAMES.get(model, model)}\n", not_run(cells)]
        for metric, title, digits in (
            ("perplexity", "WikiText-2 perplexity", 2),
            ("kl", "KL divergence from dense bf16, nats per token", 4),
            ("agreement", "tokens with dense bf16's most likely token, %", 1),
        ):
            parts.append(text_table(cells, metric, title, digits))
        parts += [task_table(cells), twin_line(cells), error_lines(cells)]
    return "\n".join(part for part in parts if part)


def text_table(cells: dict[Key, dict[tuple[str, str], Row]], metric: str, title: str, digits: int) -> str:
    """Methods by patterns; each scheme begins with a row of the dense model, which has a column of its own."""
    lines = []
    for scheme in SCHEMES:
        dense = value(cells, ("dense", "-", scheme), ("text", metric), digits)
        if dense:
            lines.append(["**dense**", scheme, dense, *([""] * len(PATTERNS))])
        for method, shown in METHODS.items():
            found = [value(cells, (method, pattern, scheme), ("text", metric), digits) for pattern in PATTERNS]
            if any(found):
                lines.append([shown, scheme, "", *(each or NOT_RUN for each in found)])
    return markdown([title, "scheme", "not pruned", *PATTERNS], lines)


def not_run(cells: dict[Key, dict[tuple[str, str], Row]]) -> str:
    """One line: by scheme the cells without a perplexity, then those that have one and no task."""
    names = METHODS | {"auto": "auto"}
    parts, unscored = [], []
    for scheme in SCHEMES:
        lacking: dict[str, list[str]] = {}
        for method in METHODS:
            for pattern in PATTERNS:
                stages = {stage for stage, _ in cells.get((method, pattern, scheme), {})}
                if "text" not in stages:
                    lacking.setdefault(method, []).append(pattern)
                elif not stages & {"mean", *TASKS}:
                    unscored.append(f"{names[method]} {pattern} {scheme}")
        whole = [names[method] for method, patterns in lacking.items() if len(patterns) == len(PATTERNS)]
        told = [] if ("dense", "-", scheme) in cells else ["dense"]
        told += ["every method"] if len(whole) == len(METHODS) else whole
        told += [f"{names[method]} at {' and '.join(patterns)}" for method, patterns in lacking.items() if len(patterns) < len(PATTERNS)]
        parts += [f"in {scheme} {', '.join(told)}"] if told else []
    parts += [f"on tasks {', '.join(unscored)}"] if unscored else []
    return f"**Not run:** {'; '.join(parts)}.\n" if parts else ""


def value(cells: dict[Key, dict[tuple[str, str], Row]], cell: Key, wanted: tuple[str, str], digits: int) -> str:
    row = cells.get(cell, {}).get(wanted)
    if row is None:
        return ""
    number = float(row["value"]) * (100 if wanted[1] == "agreement" else 1)
    return f"{number:,.{digits}f}" if number < 10_000 else f"{number:.1e}"


def task_table(cells: dict[Key, dict[tuple[str, str], Row]]) -> str:
    """Scores in %, under them the difference from dense bf16 with its standard error, of the same items."""
    columns = [task for task in TASKS if any(task_row(found, task) for found in cells.values())]
    lines = []
    for method in ("dense", *METHODS):
        for pattern in ("-", *PATTERNS):
            for scheme in ("bf16", "int8", "fp8"):
                scores = [score(cells.get((method, pattern, scheme), {}), task) for task in columns]
                if any(scores):
                    name = "**dense**" if method == "dense" else f"{METHODS[method]} {pattern}"
                    lines.append([name, scheme, *(each or NOT_RUN for each in scores)])
    return markdown(["tasks, %", "scheme", *(MEANS.get(task, task) for task in columns)], lines)


def task_row(found: dict[tuple[str, str], Row], task: str) -> Row | None:
    return found.get(("mean", task) if task in MEANS else (task, MAIN.get(task, "acc")))


def score(found: dict[tuple[str, str], Row], task: str) -> str:
    row = task_row(found, task)
    if row is None:
        return ""
    text = f"{100 * float(row['value']):.1f}"
    if row["difference_stderr"]:
        return f"{text} ({100 * float(row['difference']):+.1f} ± {100 * float(row['difference_stderr']):.1f})"
    return f"{text} ± {100 * float(row['stderr']):.1f}" if row["stderr"] else text


def twin_line(cells: dict[Key, dict[tuple[str, str], Row]]) -> str:
    """The packed checkpoint beside its masked twin."""
    lines = []
    for (method, pattern, scheme), found in cells.items():
        packed, twin = found.get(("text", "perplexity")), found.get(("twin", "twin_perplexity"))
        if packed and twin:
            ratio = float(packed["value"]) / float(twin["value"]) - 1
            lines.append([f"{METHODS[method]} {pattern} {scheme}", packed["value"], twin["value"], f"{100 * ratio:+.3f} %"])
    return markdown(["WikiText-2 perplexity", "packed", "masked, transformers alone", "difference"], lines)


def error_lines(cells: dict[Key, dict[tuple[str, str], Row]]) -> str:
    """Cells that failed, each with its error."""
    failed = [(*cell, row) for cell, found in cells.items() for (_, metric), row in found.items() if metric == "error"]
    return "".join(f"- Failed: {method} {pattern} {scheme}, {row['stage']}: {row['note']}\n" for method, pattern, scheme, row in failed)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table, empty without lines."""
    if not lines:
        return ""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def put_into(document: Path, tables: str) -> None:
    """Replace what stands between the markers."""
    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        sys.exit(f"{document} needs the lines {BEGIN} and {END}, in this order, once each")
    new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{tables}\n{END}", text, flags=re.DOTALL)
    document.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--into", type=Path, help="a Markdown document with the markers")
    asked = parser.parse_args()
    tables = tables_of(read(asked.table))
    if asked.into:
        put_into(asked.into, tables)
    else:
        print(tables)


if __name__ == "__main__":
    main()
