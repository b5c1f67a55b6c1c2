"""lm-eval task files for data on this machine: ``python benchmarks/accuracy/tasks.py DATA OUT`` prints their names for ``--tasks``.

The patterns in ``tasks/`` follow lm-eval's own files of the same tasks, in prompts, choices and metrics; only the fields differ, because
the local JSONL files have others than the hub's data sets. ``DATA`` and ``OUT`` in them stand for the two folders.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

PATTERNS = Path(__file__).parent / "tasks"
GSM8K_SHOTS = 8
"""Items that gsm8k takes for shots from a file that has no others; they are not scored."""


def write_tasks(data: Path, out: Path, *, only: Collection[str] | None = None) -> list[str]:
    """Write one task file per pattern, and the splits that files must be cut into; return the files.

    ``only`` names the tasks to write, where these are not all.

    Raises:
        FileNotFoundError: a task's data is not there; the message names the file.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for pattern in sorted(PATTERNS.glob("*.yaml")):
        if only is not None and pattern.stem not in only:
            continue
        task = yaml.safe_load(pattern.read_text(encoding="utf-8"))
        if "group" in task:
            subjects = _split_mmlu(data, out)
            (entry,) = task["task"]
            task["task"] = [_replace(entry, {"SUBJECT_IN_WORDS": name.replace("_", " "), "SUBJECT": name}) for name in subjects]
        elif task["task"] == "gsm8k":
            _split_gsm8k(data, out)
        task = _replace(task, {"DATA/": f"{data.resolve()}/", "OUT/": f"{out.resolve()}/"})
        path = out / pattern.name
        path.write_text(yaml.safe_dump(task, sort_keys=False, allow_unicode=True), encoding="utf-8")
        written.append(str(path))
    return written


def _replace(node: Any, words: dict[str, str]) -> Any:
    """The same tree with words replaced in every string."""
    if isinstance(node, dict):
        return {key: _replace(value, words) for key, value in node.items()}
    if isinstance(node, list):
        return [_replace(value, words) for value in node]
    if isinstance(node, str):
        for word, value in words.items():
            node = node.replace(word, value)
    return node


def _split_mmlu(data: Path, out: Path) -> list[str]:
    """One file per subject and split; the subjects, sorted."""
    subjects: set[str] = set()
    for split in ("test", "dev"):
        rows: dict[str, list[str]] = {}
        for line in _lines(data / f"mmlu_{split}.jsonl"):
            rows.setdefault(json.loads(line)["subject"], []).append(line)
        for subject, lines in rows.items():
            _write(out / f"mmlu_{split}_{subject}.jsonl", lines)
        subjects |= rows.keys()
    return sorted(subjects)


def _split_gsm8k(data: Path, out: Path) -> None:
    lines = _lines(data / "gsm8k.jsonl")
    _write(out / "gsm8k_shots.jsonl", lines[:GSM8K_SHOTS])
    _write(out / "gsm8k_test.jsonl", lines[GSM8K_SHOTS:])


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: tasks.py DATA OUT: folder of the JSONL files, folder for the task files")
    print(",".join(write_tasks(Path(sys.argv[1]), Path(sys.argv[2]))))
