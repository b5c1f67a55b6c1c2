"""Set up ``.venv`` for one of the make targets: ``python3 scripts/setup_env.py demo|test``. Standard library only.

Run again it finds its stamp and does nothing; broken off half-way it goes on from there. A torch that the interpreter running this
script already has is used, not downloaded again.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - said in words here, before anything newer is imported or parsed
    sys.exit(f"slidesparse needs Python 3.11 or newer, this is {sys.version.split()[0]}: run make PYTHON=/path/to/python3.11 ...")

import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
MARK = VENV / ".made-by-slidesparse"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
OLDEST = VENV / "transformers-oldest"
"""The oldest transformers that pyproject.toml allows, for `make test`."""
TORCH = "2.13.0"
TORCH_OLDEST = (2, 11)
EXTRAS = {"demo": "gguf,plot", "test": "dev"}
TOOLS = ("ruff", "import-linter")
"""Packages whose commands the Makefile calls."""
TORCH_SIZE = "about 200 MB as a CPU build, 3 GB with the CUDA libraries that Linux's default build brings"
SIZES = {
    "transformers": 12, "accelerate": 1, "gguf": 1, "matplotlib": 9, "numpy": 17, "safetensors": 1, "typer": 1, "rich": 1,
    "pytest": 1, "hypothesis": 1, "ruff": 11, "import-linter": 4, "compressed-tensors": 1, "triton": 200,
    "cuda-core": 7, "cuda-bindings": 8, "nvidia-cuda-nvrtc": 58,  # NVRTC compiles without a GPU
    "lm-eval": 130,  # with pyarrow, scipy and pandas, which it brings along
}  # fmt: skip
"""Rough megabytes of the larger direct dependencies' downloads."""
OLDEST_SIZE = 45
"""Rough megabytes of the oldest transformers and what it needs, in `OLDEST`."""
INDIRECT = 25
"""Rough megabytes of everything that those bring along."""


def main() -> None:
    target = sys.argv[1] if len(sys.argv) == 2 else ""
    if target not in EXTRAS:
        sys.exit(f"usage: {Path(__file__).name} {'|'.join(EXTRAS)}")
    if is_done(target):
        return
    own_torch = usable_torch()
    announce(target, own_torch)
    make_venv()
    if own_torch:
        share_packages()
    else:
        pip("install", f"torch=={TORCH}", what="torch")
    # Held fast, or a dependency's range could bring in another torch.
    constraint = VENV / "constraints.txt"
    constraint.write_text(f"torch=={torch_of_venv()}\n")
    pip("install", "--editable", f"{ROOT}[{EXTRAS[target]}]", "--constraint", str(constraint), what="slidesparse and its dependencies")
    if own_torch and target == "test":
        # Shared packages bring no commands into .venv/bin.
        pip("install", "--ignore-installed", "--no-deps", *TOOLS, what="the linters")
    if target == "test":
        # Beside the newest, which is installed; put in front by PYTHONPATH it brings what it needs along.
        pip("install", "--upgrade", "--target", str(OLDEST), f"transformers=={oldest_transformers()}.*", what="the oldest transformers")
    stamp(target).write_text(fingerprint())
    print(f".venv is ready for make {target}", flush=True)


def is_done(target: str) -> bool:
    """Whether the venv was made for this target, by this script, from this pyproject.toml, and its interpreter still starts.

    What is there for the tests is there for the demo too.
    """
    wanted = fingerprint()
    return works() and any(path.is_file() and path.read_text() == wanted for path in (stamp(target), stamp("test")))


def stamp(target: str) -> Path:
    return VENV / f".ready-for-{target}"


def fingerprint() -> str:
    parts = [(ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def works() -> bool:
    """Whether the venv's interpreter starts and is as new as needed."""
    if not PYTHON.exists():
        return False
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([PYTHON, "-c", check], capture_output=True).returncode == 0


def usable_torch() -> str | None:
    """Version of a new enough torch that this interpreter can import, or None."""
    if Path(sys.prefix) == VENV or importlib.util.find_spec("torch") is None:
        return None
    found = subprocess.run([sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    version = found.stdout.strip()
    if found.returncode or not version:
        print("The torch of this interpreter cannot be imported: it is left alone and another one goes into .venv.")
        return None
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < TORCH_OLDEST:
        print(f"torch {version} of this interpreter is older than {'.'.join(map(str, TORCH_OLDEST))}: another one goes into .venv.")
        return None
    return version


def announce(target: str, own_torch: str | None) -> None:
    """Say what will be downloaded, and where to, before anything is."""
    print(f"Setting up {VENV.relative_to(ROOT)} for make {target} with Python {sys.version.split()[0]}.")
    missing = [name for name in wanted_packages(target) if not (own_torch and has_package(name)) or name in TOOLS]
    size = sum(SIZES.get(name, 1) for name in missing) + INDIRECT + (OLDEST_SIZE if target == "test" else 0)
    if own_torch:
        print(f"torch {own_torch} is here already and will be used.")
    else:
        print(f"To download: torch {TORCH} ({TORCH_SIZE}; a torch that {sys.executable} can import is used instead)")
    names = ", ".join(missing) or "nothing else that is large"
    print(f"To download: {names}, and what they need (about {size} MB). pip's cache is used where it has them.", flush=True)


def wanted_packages(target: str) -> list[str]:
    """Names of the direct dependencies of the target's extras, without torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names: dict[str, None] = {}

    def add(requirements: list[str]) -> None:
        for requirement in requirements:
            if requirement.startswith("slidesparse["):
                for extra in requirement.partition("[")[2].rstrip("]").split(","):
                    add(project["optional-dependencies"][extra])
            else:
                names[re.match(r"[\w.-]+", requirement)[0]] = None

    add(project["dependencies"])
    add([f"slidesparse[{EXTRAS[target]}]"])
    return [name for name in names if name != "torch"]


def oldest_transformers() -> str:
    """The floor in pyproject.toml, as ``major.minor``."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return next(one.partition(">=")[2] for one in extras["hf"] if one.startswith("transformers>="))


def has_package(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def make_venv() -> None:
    """Make the venv, or make a broken one of ours anew; a working one is kept."""
    if works() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    if VENV.exists() and any(VENV.iterdir()) and not MARK.exists():
        sys.exit(f"{VENV} is there, does not work and was not made by this script: remove it and try again")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    MARK.touch()
    try:
        venv.create(VENV, with_pip=True, symlinks=sys.platform != "win32")
    except subprocess.CalledProcessError:
        sys.exit("This Python cannot make virtual environments (no ensurepip; Debian and Ubuntu: install python3-venv)")


def share_packages() -> None:
    """Let the venv see this interpreter's packages, behind its own; works where this interpreter is itself in a venv, too."""
    site = subprocess.run(
        [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    spec = importlib.util.find_spec("torch")
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(spec.origin).parent.parent)])
    (Path(site.stdout.strip()) / "slidesparse-shared.pth").write_text("".join(f"{folder}\n" for folder in folders))


def torch_of_venv() -> str:
    found = subprocess.run([PYTHON, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"torch in .venv cannot be imported: {found.stderr.strip().splitlines()[-1]}")
    return found.stdout.strip()


def pip(*arguments: str, what: str) -> None:
    # Not quiet on a terminal: half a gigabyte without a progress bar looks like a hang.
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", arguments[0], *quiet, *arguments[1:]]
    if subprocess.run(command).returncode:
        sys.exit(f"Could not install {what}: pip's own words are above. Without a network nothing can be fetched; run make again to go on.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; run make again to go on from here.")
