"""Run the tests that need a GPU and add one row about the run to a CSV file: ``python -m tests.gpu tests/gpu_runs.csv [PYTEST ARGUMENTS]``.

The row names the code by hashes of ``src`` and ``tests``, so that a document can say on which card which code was tested. ``-v`` among the
arguments prints a line for each test. A run that does not reach its end adds no row.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from slidesparse.gemm.machine import this_machine

ROOT = Path(__file__).parent.parent
FIELDS = ("date", "src", "tests", "gpu", "driver", "python", "torch", "triton", "vllm", "passed", "failed", "skipped", "seconds")
ENDED = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED


def tree_hash(folder: Path) -> str:
    """Twelve digits of SHA-256 over the names and bytes of a folder's source and data files."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".cu", ".json", ".txt"):
            found.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def counts(report: Path) -> dict[str, int]:
    """Passed, failed (errors among them) and skipped tests of a JUnit report."""
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in total:
            total[name] += int(suite.get(name, 0))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def version(package: str) -> str:
    """Of an installed package; empty without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(out: Path, arguments: list[str]) -> int:
    """Run pytest, print what it prints, add the row if it ran to its end, and return pytest's exit status."""
    machine = asdict(this_machine()) if torch.cuda.is_available() else {}
    about = {
        "date": datetime.date.today().isoformat(),
        "src": tree_hash(ROOT / "src"),
        "tests": tree_hash(ROOT / "tests"),
        "python": sys.version.split()[0],
        **{name: machine.get(name, "") for name in ("gpu", "driver")},
        **{name: version(name) for name in ("torch", "triton", "vllm")},
    }
    with tempfile.TemporaryDirectory() as folder:
        report, start = Path(folder) / "report.xml", time.perf_counter()
        words = [sys.executable, "-m", "pytest", "-m", "needs_gpu", f"--junitxml={report}", *arguments]
        # pytest subtracts one from the other.
        words += [] if any(re.match(r"-v|--verbos", word) for word in arguments) else ["-q"]
        done = subprocess.run(words, cwd=ROOT, check=False)
        if done.returncode not in ENDED:
            print(f"no row for {out}: pytest ended with {done.returncode} before all tests had run", file=sys.stderr)
            return done.returncode
        row = about | counts(report) | {"seconds": round(time.perf_counter() - start)}
    fresh = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(*(f"{name} {row[name]}" for name in FIELDS), sep=", ")
    return done.returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:]))
