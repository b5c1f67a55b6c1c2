"""The cells of the accuracy study, most important first, and the jobs that fill them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

PATTERNS = ("6:8", "4:6", "2:4", "8:10")
METHODS = ("auto", "admm", "sparsegpt", "wanda", "magnitude")
DENSE = "dense"
CONVERT, TEXT, TWIN = "convert", "text", "twin"
"""Stages besides the tasks, each of which is a stage by its own name."""

SMALL_TASKS = ("arc_easy", "piqa", "hellaswag", "lambada_openai")
ALL_TASKS = (*SMALL_TASKS, "arc_challenge", "winogrande", "openbookqa", "boolq", "mmlu", "gsm8k")
LAST = "gsm8k"
"""Generates text, which takes longest: every other task of a model comes first."""


@dataclass(frozen=True)
class Cell:
    """One checkpoint to evaluate; ``pattern`` is ``-`` for the dense model."""

    model: str
    method: str
    pattern: str
    scheme: str

    @property
    def name(self) -> str:
        return f"{self.model}:{self.method}:{self.pattern}:{self.scheme}"

    @property
    def file(self) -> str:
        return f"{self.model}_{self.method}_{self.pattern.replace(':', '-')}_{self.scheme}"

    @property
    def twinned(self) -> bool:
        """Whether the masked twin is evaluated, too."""
        return (self.method, self.pattern, self.scheme) == ("auto", "6:8", "bf16")

    @classmethod
    def parse(cls, name: str) -> Cell:
        """From ``model:method:pattern:scheme``.

        Raises:
            ValueError: not of that form.
        """
        parts = name.split(":")
        if len(parts) < 4:
            raise ValueError(f"cell {name!r} is not model:method:pattern:scheme")
        return cls(parts[0], parts[1], ":".join(parts[2:-1]), parts[-1])


@dataclass(frozen=True)
class Job:
    """Stages of one cell that one process runs, in order."""

    cell: Cell
    stages: tuple[str, ...]


def jobs_of(model: str, skipped: tuple[str, ...] = (), only: tuple[str, ...] = ("*",)) -> list[Job]:
    """What is asked of a model: the study of a small model where it is named smollm2, of a larger one otherwise.

    Args:
        skipped: globs of tasks to leave out; ``text`` leaves the text out.
        only: globs of the cells' names.
    """
    jobs = _of_small(model) if model.startswith("smollm") else _of_large(model)
    left = []
    for job in jobs:
        stages = tuple(stage for stage in job.stages if not any(fnmatchcase(stage, entry) for entry in skipped))
        if stages and any(fnmatchcase(job.cell.name, entry) for entry in only):
            left.append(Job(job.cell, stages))
    return left


def text_stages(cell: Cell) -> tuple[str, ...]:
    return (TEXT, TWIN) if cell.twinned else (TEXT,)


def _of_small(model: str) -> list[Job]:
    """Everything of a cell in one process: loading takes longer than most stages."""
    cells = [_dense(model)]
    cells += [Cell(model, method, pattern, "bf16") for method in METHODS for pattern in PATTERNS]
    for scheme in ("fp8", "int8"):
        cells += [_dense(model, scheme), *(Cell(model, "auto", pattern, scheme) for pattern in PATTERNS)]
    return [Job(cell, (*text_stages(cell), *SMALL_TASKS)) for cell in cells]


def _of_large(model: str) -> list[Job]:
    """The text everywhere, then tasks where they tell most."""

    def cells(method: str, patterns: str, scheme: str = "bf16") -> list[Cell]:
        return [Cell(model, method, pattern, scheme) for pattern in patterns.split()]

    listed = [_dense(model), *cells("auto", "6:8 4:6"), _dense(model, "fp8"), *cells("auto", "6:8 4:6", "fp8")]
    listed += [*cells("wanda", "6:8"), *cells("sparsegpt", "6:8"), *cells("magnitude", "6:8"), *cells("auto", "2:4 8:10")]
    listed += [*cells("magnitude", "4:6 2:4 8:10"), *cells("wanda", "2:4"), *cells("sparsegpt", "2:4"), *cells("auto", "2:4 8:10", "fp8")]
    listed += cells("magnitude", "6:8 4:6 2:4 8:10", "fp8")
    scored = [_dense(model), *cells("auto", "6:8"), *cells("magnitude", "6:8"), *cells("auto", "4:6 2:4 8:10")]
    jobs = [Job(cell, text_stages(cell)) for cell in listed]
    jobs += [Job(cell, tuple(task for task in ALL_TASKS if task != LAST)) for cell in scored]
    return jobs + [Job(cell, (LAST,)) for cell in scored]


def _dense(model: str, scheme: str = "bf16") -> Cell:
    return Cell(model, DENSE, "-", scheme)
