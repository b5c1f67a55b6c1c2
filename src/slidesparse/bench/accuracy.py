"""What the accuracy study found, by pattern: a summary of its results that comes with the package. `make tables` writes it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path

NAMES = {"smollm2": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-1.5B-Instruct"}
FILE = "accuracy.json"


@dataclass(frozen=True)
class Loss:
    """The best method of a pattern in one model and scheme: WikiText-2 perplexity, and the mean of tasks in points.

    The dense model has the same scheme. ``tasks`` is the difference from it, with its standard error; None where tasks were not run.
    """

    model: str
    pattern: str
    method: str
    perplexity: float
    dense_perplexity: float
    tasks: float | None
    tasks_error: float | None
    count: int
    scheme: str = "bf16"


def losses(pattern: str, scheme: str = "bf16") -> list[Loss]:
    """One for each model of the study that has the pattern in this scheme."""
    return [loss for loss in study() if (loss.pattern, loss.scheme) == (pattern, scheme)]


@cache
def study() -> tuple[Loss, ...]:
    """All of the summary."""
    text = (resources.files("slidesparse.bench") / FILE).read_text(encoding="utf-8")
    return tuple(Loss(**each) for each in json.loads(text))


def summarised(table: Path) -> list[Loss]:
    """The summary of the study's rows: of each model, scheme and pattern the method with the lowest perplexity."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    schemes = sorted({row["scheme"] for row in rows})
    return [loss for scheme in schemes for loss in _summarised([row for row in rows if row["scheme"] == scheme], scheme)]


def _summarised(rows: Sequence[Mapping[str, str]], scheme: str) -> Iterator[Loss]:
    text = {(row["model"], row["pattern"], row["method"]): row for row in rows if (row["stage"], row["metric"]) == ("text", "perplexity")}
    means = {
        (row["model"], row["pattern"], row["method"], int(row["metric"].rpartition("_")[2])): row for row in rows if row["stage"] == "mean"
    }
    for model, pattern in sorted({key[:2] for key in text if key[1] != "-"}):
        dense = text.get((model, "-", "dense"))
        if dense is None:
            continue
        method = min((key[2] for key in text if key[:2] == (model, pattern)), key=lambda each: float(text[model, pattern, each]["value"]))
        most = max((key[3] for key in means if key[:3] == (model, pattern, method) and means[key]["difference"]), default=0)
        mean = means.get((model, pattern, method, most))
        tasks, error = (None, None) if mean is None else (round(100 * float(mean[name]), 4) for name in ("difference", "difference_stderr"))
        pruned, whole = (round(float(row["value"]), 3) for row in (text[model, pattern, method], dense))
        yield Loss(NAMES.get(model, model), pattern, method, pruned, whole, tasks, error, most, scheme)


def written(table: Path) -> str:
    """The file of the package, one loss a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(loss)) for loss in summarised(table)) + "\n]\n"


def rounded(perplexity: float) -> str:
    """As a table shows it."""
    return f"{perplexity:,.2f}" if perplexity < 100 else f"{perplexity:,.0f}"
