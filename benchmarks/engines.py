"""What benchmarks of serving engines share: checkpoints of one model in two forms, and engines in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import slidesparse
from slidesparse import Pattern, Recipe


def checkpoint(source: Path, folder: Path, scheme: str, pattern: str, form: str) -> Path:
    """The model at ``source``, magnitude-pruned, packed or as its dense twin; written unless it is there."""
    made = folder / f"{scheme}-{pattern.replace(':', '-')}-{form}"
    if not made.exists():
        slidesparse.convert(source, made, Recipe(Pattern.parse(pattern), "magnitude", scheme, form=form))
    return made


SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine stays in the process that makes it, which only one rank can."""


def in_a_process(script: str, asked: dict, stem: Path, *, alone: bool) -> dict:
    """Run ``script --run JSON`` and return what it wrote to ``asked["out"]``, as JSON; its log is ``stem.log``.

    What the log says of our layers is printed; where the run fails, its end.
    """
    out, log = Path(f"{stem}.json"), Path(f"{stem}.log")
    with log.open("w", encoding="utf-8") as file:
        words = [sys.executable, script, "--run", json.dumps(asked | {"out": str(out)})]
        done = subprocess.run(words, env=os.environ | SETTINGS | (ALONE if alone else {}), stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(_end_of(log))
    _print_ours(log)
    return json.loads(out.read_text(encoding="utf-8"))


class Asked:
    """An engine that ``script --run JSON`` makes in a process of its own, and which then answers: several take turns on one GPU.

    It finds the file descriptor of a pipe in ``asked["pipe"]``, sends what it first has to say, and one answer for every question.
    """

    def __init__(self, script: str, asked: dict, stem: Path) -> None:
        self.log = Path(f"{stem}.log")
        self._pipe, theirs = Pipe()
        with self.log.open("w", encoding="utf-8") as file, theirs:
            words = [sys.executable, script, "--run", json.dumps(asked | {"pipe": theirs.fileno(), "stem": str(stem)})]
            # Killed with us: it waits at the pipe, which ends then.
            self._process = subprocess.Popen(words, env=os.environ | SETTINGS | ALONE, stdout=file, stderr=file, pass_fds=[theirs.fileno()])

    def started(self) -> Any:
        """Wait for what it first has to say; what its log says of our layers is printed."""
        first = self._answer()
        _print_ours(self.log)
        return first

    def __call__(self, question: object) -> Any:
        """Ask, and wait for the answer."""
        self._pipe.send(question)
        return self._answer()

    def close(self) -> None:
        """Let it end."""
        self._pipe.close()
        self._process.wait()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.wait()
            raise SystemExit(_end_of(self.log)) from None


def _print_ours(log: Path) -> None:
    for line in log.read_text(encoding="utf-8").splitlines():
        if "slidesparse:" in line:
            print(" ", log.stem, line[line.index("slidesparse:") :], flush=True)


def _end_of(log: Path) -> str:
    return f"{log}:\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
