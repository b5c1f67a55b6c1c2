"""What the accuracy study found, by pattern: a summary of its results that comes with the package. `make tables` writes it."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path

NAMES = {"smollm2": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-1.5B-Instruct"}
FILE = "accuracy.json"


@dataclass(frozen=True)
class Loss:
    """The best method of a pattern in one model, weights of 16 bits: WikiText-2 perplexity, and the mean of tasks in points.

    ``tasks`` is the difference from the dense model, with its standard error; None where tasks were not run.
    """

    model: str
    pattern: str
    method: str
    perplexity: float
    dense_perplexity: float
    tasks: float | None
    tasks_error: float | None
    count: int


def losses(pattern: str) -> list[Loss]:
    """One for each model of the study that has the pattern."""
    return [loss for loss in _shipped() if loss.pattern == pattern]


@cache
def _shipped() -> tuple[Loss, ...]:
    text = (resources.files("slidesparse.bench") / FILE).read_text(encoding="utf-8")
    return tuple(Loss(**each) for each in json.loads(text))


def summarised(table: Path) -> list[Loss]:
    """The summary of the study's rows: of each model and pattern the method with the lowest perplexity, in bf16."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scheme"] == "bf16"]
    text = {(row["model"], row["pattern"], row["method"]): row for row in rows if (row["stage"], row["metric"]) == ("text", "perplexity")}
    means = {
        (row["model"], row["pattern"], row["method"], int(row["metric"].rpartition("_")[2])): row for row in rows if row["stage"] == "mean"
    }
    found = []
    for model, pattern in sorted({key[:2] for key in text if key[1] != "-"}):
        dense = text.get((model, "-", "dense"))
        if dense is None:
            continue
        method = min((key[2] for key in text if key[:2] == (model, pattern)), key=lambda each: float(text[model, pattern, each]["value"]))
        most = max((key[3] for key in means if key[:3] == (model, pattern, method) and means[key]["difference"]), default=0)
        mean = means.get((model, pattern, method, most))
        tasks, error = (None, None) if mean is None else (round(100 * float(mean[name]), 2) for name in ("difference", "difference_stderr"))
        pruned, whole = (round(float(row["value"]), 3) for row in (text[model, pattern, method], dense))
        found.append(Loss(NAMES.get(model, model), pattern, method, pruned, whole, tasks, error, most))
    return found


def written(table: Path) -> str:
    """The file of the package, one loss a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(loss)) for loss in summarised(table)) + "\n]\n"


def rounded(perplexity: float) -> str:
    """As a table shows it."""
    return f"{perplexity:,.2f}" if perplexity < 100 else f"{perplexity:,.0f}"
