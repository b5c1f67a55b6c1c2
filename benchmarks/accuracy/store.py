"""What the study keeps: one JSON file per cell, the items' scores apart, and the CSV table made from them."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cells import ALL_TASKS, SMALL_TASKS, Cell

MAIN = dict.fromkeys(ALL_TASKS, "acc") | dict.fromkeys(("hellaswag", "arc_challenge", "openbookqa"), "acc_norm")
MAIN["gsm8k"] = "exact_match:flexible-extract"
"""The metric by which a task enters the tables: that of most papers."""

MEANS = {"mean_of_4": SMALL_TASKS, "mean_of_9": tuple(task for task in ALL_TASKS if task != "gsm8k"), "mean_of_10": ALL_TASKS}
"""Means over tasks, of all cells that have all of these."""


def metric_name(metric: str, filter_: str) -> str:
    """With what lm-eval did to the answers, where it did something."""
    return metric if filter_ == "none" else f"{metric}:{filter_}"


FIELDS = (
    *("date", "commit", "gpu", "torch", "model", "method", "pattern", "scheme", "stage", "metric", "value", "stderr", "items", "shots"),
    *("difference", "difference_stderr", "calibration", "samples", "length", "seed", "limit", "weights", "seconds", "note"),
)


def read(folder: Path, cell: Cell) -> dict[str, Any]:
    """A cell's results so far; a file that is not whole counts as none."""
    try:
        return json.loads((folder / "cells" / f"{cell.file}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {"cell": cell.name, "stages": {}, "errors": {}}


def read_items(folder: Path, cell: Cell) -> dict[str, str]:
    """Per task the items' scores in its main metric, as a string of 0 and 1."""
    try:
        return json.loads((folder / "items" / f"{cell.file}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write(folder: Path, kind: str, cell: Cell, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path = folder / kind / f"{cell.file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1 if kind == "cells" else None), encoding="utf-8")
    part.replace(path)


def add_stage(folder: Path, cell: Cell, stage: str, record: dict[str, Any], items: str | None = None) -> None:
    """Keep a finished stage; the items first, so that a stage that is there has them."""
    if items is not None:
        write(folder, "items", cell, read_items(folder, cell) | {stage: items})
    content = read(folder, cell)
    content["stages"][stage] = record
    content["errors"].pop(stage, None)
    write(folder, "cells", cell, content)


def collect(folder: Path, table: Path) -> int:
    """Write the CSV table of all cells in the folder; returns its number of rows."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cells").glob("*.json"))]
    cells = {content["cell"]: content for content in found}
    rows = [row for content in found for row in _rows(folder, content, cells)]
    part = table.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(table)
    return len(rows)


def _rows(folder: Path, content: dict[str, Any], cells: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cell = Cell.parse(content["cell"])
    base = {"model": cell.model, "method": cell.method, "pattern": cell.pattern, "scheme": cell.scheme}
    dense = Cell(cell.model, "dense", "-", "bf16")
    reference = cells.get(dense.name, {"stages": {}})["stages"] if cell != dense else {}
    items, others = read_items(folder, cell), read_items(folder, dense) if reference else {}
    for stage, record in content["stages"].items():
        head = base | {"stage": stage} | {key: record[key] for key in FIELDS if key in record}
        for value in record["values"]:
            row = head | {key: _short(field) for key, field in value.items()}
            if value["metric"] == MAIN.get(stage) and stage in reference:
                score = _main(reference, stage)
                row |= {"difference": _short(value["value"] - score), "difference_stderr": _short(_paired(items, others, stage))}
            yield row
    for name, tasks in MEANS.items():
        if all(task in content["stages"] for task in tasks):
            yield base | _mean(name, tasks, content["stages"], reference, (items, others))
    for stage, line in content["errors"].items():
        yield base | {"stage": stage, "metric": "error", "note": line}


def _mean(name: str, tasks: tuple[str, ...], stages: dict[str, Any], reference: dict[str, Any], items: tuple[dict, dict]) -> dict[str, Any]:
    """The mean over tasks, and over their differences from the dense model, whose items are paired."""
    last = stages[tasks[-1]]
    row = {key: last[key] for key in FIELDS if key in last and key != "seconds"} | {"stage": "mean", "metric": name}
    row["value"] = _short(sum(_main(stages, task) for task in tasks) / len(tasks))
    row["items"] = sum(len(items[0].get(task, "")) for task in tasks)
    errors = [_spread(np.array(list(items[0].get(task, "")), float)) for task in tasks]
    row["stderr"] = _short(math.hypot(*errors) / len(tasks))
    if all(task in reference for task in tasks):
        row["difference"] = _short(sum(_main(stages, task) - _main(reference, task) for task in tasks) / len(tasks))
        row["difference_stderr"] = _short(math.hypot(*(_paired(*items, task) for task in tasks)) / len(tasks))
    return row


def _main(stages: dict[str, Any], task: str) -> float:
    return next(value["value"] for value in stages[task]["values"] if value["metric"] == MAIN[task])


def _paired(items: dict[str, str], others: dict[str, str], task: str) -> float:
    """Standard error of the mean difference of the same items; NaN where they are not the same."""
    ours, theirs = items.get(task, ""), others.get(task, "")
    if not ours or len(ours) != len(theirs):
        return math.nan
    return _spread(np.array(list(ours), float) - np.array(list(theirs), float))


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _short(value: Any) -> Any:
    """Six significant digits; nothing for NaN."""
    if not isinstance(value, float):
        return "" if value is None else value
    return "" if math.isnan(value) else f"{value:.6g}"


def is_done(folder: Path, cell: Cell, stages: tuple[str, ...]) -> bool:
    return set(stages) <= read(folder, cell)["stages"].keys()
