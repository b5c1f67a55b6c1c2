"""What benchmarks of serving engines share: checkpoints of one model in two forms, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import slidesparse
from slidesparse import Pattern, Recipe


def checkpoint(source: Path, folder: Path, scheme: str, pattern: str, form: str) -> Path:
    """The model at ``source``, magnitude-pruned, packed or as its dense twin; written unless it is there."""
    made = folder / f"{scheme}-{pattern.replace(':', '-')}-{form}"
    if not made.exists():
        slidesparse.convert(source, made, Recipe(Pattern.parse(pattern), "magnitude", scheme, form=form))
    return made


def in_a_process(script: str, asked: dict, stem: Path, *, alone: bool) -> dict:
    """Run ``script --run JSON`` and return what it wrote to ``asked["out"]``, as JSON; its log is ``stem.log``.

    ``alone``: the engine stays in that process, which only one rank can. What the log says of our layers is printed; where the run
    fails, its end.
    """
    out, log = Path(f"{stem}.json"), Path(f"{stem}.log")
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if alone else {})
    with log.open("w", encoding="utf-8") as file:
        words = [sys.executable, script, "--run", json.dumps(asked | {"out": str(out)})]
        done = subprocess.run(words, env=os.environ | settings, stdout=file, stderr=file)
    lines = log.read_text(encoding="utf-8").splitlines()
    if done.returncode:
        raise SystemExit(f"{log}:\n" + "\n".join(lines[-30:]))
    for line in lines:
        if "slidesparse:" in line:
            print(" ", stem.name, line[line.index("slidesparse:") :], flush=True)
    return json.loads(out.read_text(encoding="utf-8"))
