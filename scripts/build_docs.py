"""The pages of docs and the API reference as a site: ``python3 scripts/build_docs.py [OUT]``. A warning is a failure.

Standard library only. What pyproject.toml's extra ``docs`` names goes into an environment of its own. Docstrings are read, not imported, so
no torch is needed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".cache" / "docs-venv"


def main() -> None:
    out = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / ".cache" / "site"
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    stamp, mark = VENV / "ready", hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != mark:
        print(f"Setting up {VENV.relative_to(ROOT)}. To download: {', '.join(wanted)} (about 40 MB).", flush=True)
        venv.create(VENV, with_pip=True, clear=True)
        run("pip", "--quiet", "--disable-pip-version-check", "install", *wanted)
        stamp.write_text(mark)
    # Not quiet: what is not said is not counted as a warning.
    run("mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(out))
    print(f"The site is in {out}: open index.html")


def run(module: str, *arguments: str) -> None:
    # Material speaks of its successor at every build otherwise.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    if status := subprocess.run([VENV / "bin" / "python", "-m", module, *arguments], env=environment).returncode:
        sys.exit(status)


if __name__ == "__main__":
    main()
