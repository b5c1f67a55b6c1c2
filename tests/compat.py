"""Tests of what faces other libraries, against the oldest and the newest versions of these.

``python -m tests.compat [-o FILE.csv] [-s FOLDERS] [NAME ...] [-- PYTEST ARGUMENTS]``.

Every name makes an environment of its own under ``.compat`` (pip brings the torch that vLLM pins; a GPU is not needed). Each run adds a row
to the CSV file. With ``-s`` nothing is made: this interpreter runs, with packages of these folders in front of its own.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, replace
from pathlib import Path

from tests.gpu import ENDED, ROOT, counts, tree_hash

from slidesparse.compat.versions import TESTED

FIELDS = ("date", "src", "environment", "python", "torch", "transformers", "vllm", "passed", "failed", "skipped", "seconds")
MOST = tuple(f"tests/test_{name}.py" for name in ("transformers", "device_map", "sources", "overrides_runtime", "gguf"))
MORE = ("end_to_end", "streaming", "state", "evaluate", "compat", "round_trips", "peft", "architectures")
TRANSFORMERS = (*MOST, *(f"tests/test_{name}.py" for name in MORE))
VLLM = ("tests/test_compat.py", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_vllm*.py"))))


@dataclass(frozen=True)
class Environment:
    """What pip is asked for besides this package, and the files of tests that run."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]


ENVIRONMENTS = {
    "transformers-oldest": Environment((f"transformers=={TESTED['transformers'].oldest}",), TRANSFORMERS),
    "transformers-newest": Environment((f"transformers=={TESTED['transformers'].newest}.*",), TRANSFORMERS),
    "vllm-oldest": Environment((f"vllm=={TESTED['vllm'].oldest}",), VLLM),
    "vllm-newest": Environment(("vllm==0.33.*",), VLLM),  # without a GPU, which is less than `TESTED` means
}
SHORT = {"transformers-floor": replace(ENVIRONMENTS["transformers-oldest"], tests=MOST)}
"""What `make test` runs besides its own."""
ABOUT_RUNS = "tests/test_compat.py::test_the_oldest_and_the_newest_version_have_a_run_without_failures"
"""It asks for the rows that are made here."""
NO_TESTS = 5
"""pytest's exit status where an option left none."""
VERSIONS = """
import json, platform
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "vllm")}}))
"""


def made(name: str) -> str:
    """The interpreter of an environment, set up unless it is there."""
    folder = ROOT / ".compat" / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True, symlinks=sys.platform != "win32")
        words = [python, "-m", "pip", "--quiet", "install", "--editable", f"{ROOT}[dev]", *(ENVIRONMENTS | SHORT)[name].packages]
        subprocess.run(words, check=True)
        (folder / "ready").touch()
    return str(python)


def run(name: str, sites: str, arguments: list[str]) -> tuple[int, dict[str, object]]:
    """Run an environment's tests; gives pytest's exit status and the row about it."""
    python = made(name) if not sites else sys.executable
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "src"), sites)))}
    told = subprocess.run([python, "-c", VERSIONS], env=surroundings, capture_output=True, text=True, check=True)
    about = {"date": datetime.date.today().isoformat(), "src": tree_hash(ROOT / "src"), "environment": name, **json.loads(told.stdout)}
    with tempfile.TemporaryDirectory() as folder:
        report, start = Path(folder) / "report.xml", time.perf_counter()
        words = [
            python,
            "-m",
            "pytest",
            "-q",
            f"--junitxml={report}",
            "--deselect",
            ABOUT_RUNS,
            *(ENVIRONMENTS | SHORT)[name].tests,
            *arguments,
        ]
        done = subprocess.run(words, cwd=ROOT, env=surroundings, check=False)
        if done.returncode not in (*ENDED, NO_TESTS):
            sys.exit(f"no row for {name}: pytest ended with {done.returncode} before all tests had run")
        row = about | counts(report) | {"seconds": round(time.perf_counter() - start)}
    return done.returncode, row


def main() -> int:
    """Run the environments named, all by default; the exit status is 1 if a test failed anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("-o", "--output", type=Path, help="CSV file to which each run adds a row")
    parser.add_argument("-s", "--sites", default="", help="folders of packages, with the separator of paths between them")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    known, arguments = parser.parse_args(words[:cut]), words[cut + 1 :]
    sites = os.pathsep.join(str(Path(folder).absolute()) for folder in known.sites.split(os.pathsep) if folder)
    if unknown := set(known.names) - (ENVIRONMENTS | SHORT).keys():
        parser.error(f"there is no environment {', '.join(sorted(unknown))}: choose of {', '.join(ENVIRONMENTS)}")
    failed = False
    for name in known.names or ENVIRONMENTS:
        status, row = run(name, sites, arguments)
        failed |= status not in (0, NO_TESTS)
        print(*(f"{field} {row[field]}" for field in FIELDS), sep=", ")
        if known.output is not None:
            fresh = not known.output.exists()
            with known.output.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
