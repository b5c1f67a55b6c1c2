"""An evaluation as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .divergence import DivergenceResult
from .perplexity import PerplexityResult
from .scores import Comparison, TaskScore, compare

FORMATS = (".json", ".md")
"""Endings of the files a report can be written to."""


@dataclass(frozen=True)
class TextScore:
    """A text under the model and, where there is a reference, beside it; ``divergence`` is None where logits were not to be had."""

    path: Path
    model: PerplexityResult
    reference: PerplexityResult | None = None
    ratio: float | None = None
    ratio_stderr: float | None = None
    divergence: DivergenceResult | None = None

    @classmethod
    def of(cls, path: Path, found: DivergenceResult) -> TextScore:
        """All of it."""
        return cls(path, found.model, found.reference, found.ratio, found.ratio_stderr, found)


@dataclass(frozen=True)
class Report:
    """What one run of an evaluation found.

    Attributes:
        runtime: what ran the model.
        versions: of the packages that scored and ran it.
        notes: sentences on what was asked for and is missing.
    """

    model: Path
    runtime: str
    reference: Path | None = None
    text: TextScore | None = None
    tasks: list[TaskScore] = field(default_factory=list)
    reference_tasks: list[TaskScore] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def comparisons(self) -> list[Comparison]:
        """Scores beside the reference's; empty without one."""
        return compare(self.tasks, self.reference_tasks)


def as_json(report: Report) -> dict[str, Any]:
    """Plain data; what was not asked for has no key."""
    data: dict[str, Any] = {"model": str(report.model), "runtime": report.runtime, "versions": report.versions}
    if report.reference is not None:
        data["reference"] = str(report.reference)
    text = report.text
    if text is not None:
        data |= {"text": str(text.path)} | dataclasses.asdict(text.model)
        if text.reference is not None:
            data |= {f"reference_{key}": getattr(text.reference, key) for key in ("perplexity", "perplexity_stderr", "nll")}
            data |= {"perplexity_ratio": text.ratio, "perplexity_ratio_stderr": text.ratio_stderr}
        if text.divergence is not None:
            names = {"kl": "kl", "kl_stderr": "kl_stderr", "top1_agreement": "agreement", "top1_agreement_stderr": "agreement_stderr"}
            data |= {key: getattr(text.divergence, name) for key, name in names.items()}
    if report.tasks:
        beside = {(each.score.task, each.score.metric, each.score.filter): each for each in report.comparisons}
        data["tasks"] = [_row(score, beside.get((score.task, score.metric, score.filter))) for score in report.tasks]
    if report.notes:
        data["notes"] = report.notes
    return data


def _row(score: TaskScore, beside: Comparison | None) -> dict[str, Any]:
    row = {item.name: getattr(score, item.name) for item in dataclasses.fields(score) if item.name != "per_item"}
    if beside is not None:
        row |= {"reference_score": beside.reference.score, "reference_stderr": beside.reference.stderr, "recovery": beside.recovery}
        row |= {"difference": beside.difference, "difference_stderr": beside.difference_stderr}
    return row


def as_markdown(report: Report) -> str:
    """Tables: the text's scores, then the tasks'; the tasks of a group that has a score itself are left to the JSON form."""
    lines = [
        f"# {report.model}",
        "",
        f"Run by {report.runtime} ({', '.join(f'{name} {version}' for name, version in report.versions.items())}).",
    ]
    if report.reference is not None:
        lines += ["", f"Reference: {report.reference}, evaluated in the same way. Recovery is score / reference score."]
    if report.text is not None:
        score = report.text.model
        lines += ["", f"## {report.text.path}", ""]
        lines += [f"{score.tokens} tokens scored, context {score.context}, stride {score.stride}.", ""]
        lines += _table(("", "value", "± standard error"), text_rows(report.text))
    if report.tasks:
        header, rows = task_rows(report)
        lines += ["", "## Tasks", "", *_table(header, rows)]
    for note in report.notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def text_rows(text: TextScore) -> list[tuple[str, str, str]]:
    """Name, value and standard error of everything known of a text."""
    rows = [("perplexity", _fixed(text.model.perplexity), _fixed(text.model.perplexity_stderr))]
    if text.reference is not None:
        rows.append(("reference perplexity", _fixed(text.reference.perplexity), _fixed(text.reference.perplexity_stderr)))
        rows.append(("perplexity / reference perplexity", _fixed(text.ratio), _fixed(text.ratio_stderr)))
    if text.divergence is not None:
        found = text.divergence
        rows.append(("KL(reference ‖ model), nats per token", _fixed(found.kl), _fixed(found.kl_stderr)))
        rows.append(("top-1 agreement with the reference", _fixed(found.agreement), _fixed(found.agreement_stderr)))
    return rows


def task_rows(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of tasks, with the reference's columns if there is one."""
    header: tuple[str, ...] = ("task", "metric", "shots", "items", "score", "±")
    if report.reference_tasks:
        header += ("reference", "±", "recovery", "difference", "±")
    beside = {(each.score.task, each.score.metric, each.score.filter): each for each in report.comparisons}
    rows = []
    for score in _shown(report.tasks):
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        shots = "" if score.shots is None else str(score.shots)
        row: tuple[str, ...] = (score.task, metric, shots, str(score.items), _fixed(score.score), _fixed(score.stderr))
        each = beside.get((score.task, score.metric, score.filter))
        if report.reference_tasks:
            row += ("",) * 5 if each is None else _beside(each)
        rows.append(row)
    return header, rows


def _beside(each: Comparison) -> tuple[str, ...]:
    reference = each.reference
    shown = (_fixed(reference.score), _fixed(reference.stderr), _fixed(each.recovery))
    return (*shown, _fixed(each.difference, "+"), _fixed(each.difference_stderr))


def _shown(tasks: list[TaskScore]) -> Iterable[TaskScore]:
    scored = {score.task for score in tasks}
    return (score for score in tasks if score.group not in scored)


def _fixed(value: float | None, sign: str = "") -> str:
    """Four places after the point; four digits of numbers too large or too small for that, nothing for None."""
    if value is None:
        return ""
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:{sign}.4f}" if plain else f"{value:{sign}.4g}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A Markdown table; the first column to the left, numbers to the right."""
    sides = ["---" if i == 0 or name == "metric" else "---:" for i, name in enumerate(header)]
    whole = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, sides, *whole)]
