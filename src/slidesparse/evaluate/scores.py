"""Scores on tasks, and how they compare with those of a reference model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from .windows import Moments


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        group: the group that the task was run as a part of; empty if none.
        filter: what lm-eval did to answers before scoring them; ``none`` for most tasks.
        stderr: as lm-eval gives it; None where it gives none.
        items: how many questions were scored.
        shots: solved examples before each question; None for a group whose tasks differ.
        per_item: score of every item, in order; empty where the score is not their mean.
    """

    task: str
    group: str
    metric: str
    filter: str
    score: float
    stderr: float | None
    items: int
    shots: int | None
    higher_is_better: bool | None
    per_item: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """A score beside that of the reference.

    Attributes:
        recovery: score / reference score; None where the reference scores 0.
        difference: score − reference score.
        difference_stderr: standard error of the difference of the same items; None where per-item scores are missing.
    """

    score: TaskScore
    reference: TaskScore
    recovery: float | None
    difference: float
    difference_stderr: float | None


def items_of_mean(values: Iterable[object], mean: float) -> tuple[float, ...]:
    """The values as numbers, if ``mean`` is their mean; else nothing."""
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if not numbers or not math.isclose(math.fsum(numbers) / len(numbers), mean, rel_tol=1e-9, abs_tol=1e-9):
        return ()
    return tuple(numbers)


def compare(scores: Sequence[TaskScore], references: Sequence[TaskScore]) -> list[Comparison]:
    """Every score beside the reference's of the same task, metric and filter."""
    known = {(score.task, score.metric, score.filter): score for score in references}
    pairs = [(score, known.get((score.task, score.metric, score.filter))) for score in scores]
    return [_beside(score, reference) for score, reference in pairs if reference is not None]


def _beside(score: TaskScore, reference: TaskScore) -> Comparison:
    recovery = score.score / reference.score if reference.score else None
    stderr = None
    if score.per_item and len(score.per_item) == len(reference.per_item):
        items, others = (torch.tensor(each.per_item, dtype=torch.float64) for each in (score, reference))
        error = Moments.of(items - others).stderr
        stderr = None if math.isnan(error) else error
    return Comparison(score, reference, recovery, score.score - reference.score, stderr)
