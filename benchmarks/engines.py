"""An engine in a process of its own, for `agreement`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def _print_ours(log: Path) -> None:
    for line in log.read_text(encoding="utf-8").splitlines():
        if "slidesparse:" in line:
            print(" ", log.stem, line[line.index("slidesparse:") :], flush=True)


def _end_of(log: Path) -> str:
    return f"{log}:\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
