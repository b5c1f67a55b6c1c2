"""What is published, tried as a stranger would: ``python -m tests.dist [--shared] [WHEEL]``.

Without WHEEL it builds sdist and wheel into ``dist``, the wheel from the unpacked sdist, and runs ``make test ARGS="-k pack"`` there. The
wheel is installed into an empty environment, which imports it, runs ``doctor``, and converts, verifies, evaluates and continues a tiny
model. With ``--shared`` nothing is fetched: the environment sees the packages of this interpreter behind the wheel.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
IN_SDIST = ("Makefile", "README.md", "CHANGELOG.md", "LICENSE", "mkdocs.yml", "scripts/setup_env.py", "tests/data", "tests/test_pack.py")
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
MODEL = """
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
bytes_ = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(bytes_, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
    bos_token_id=0, eos_token_id=None,
)
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained("dense")
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained("dense")
"""
"""Two blocks with random weights; every byte is a token."""
COMMANDS = (
    ("doctor",),
    ("convert", "dense", "packed", "--pattern", "6:8", "--scheme", "int8", "--samples", "8", "--length", "64", "--device", "cpu"),
    ("verify", "packed"),
    ("eval", "packed", "--text", "text.txt", "--reference", "dense", "--context", "64", "--stride", "32", "--device", "cpu"),
    ("generate", "packed", "One", "-n", "4", "--device", "cpu"),
)


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel in ``dist``, made from the sdist beside it, and that sdist unpacked in ``folder``."""
    out = ROOT / "dist"
    for old in out.glob("slidesparse-*"):
        old.unlink()
    tell("building sdist and wheel")
    words = [sys.executable, "-m", "hatchling", "build", "-d", str(out), "-t"]
    subprocess.run([*words, "sdist"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(out.glob("slidesparse-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    unpacked = next(folder.glob("slidesparse-*"))
    for name in IN_SDIST:
        if not (unpacked / name).exists():
            sys.exit(f"the sdist lacks {name}")
    subprocess.run([*words, "wheel"], cwd=unpacked, check=True, stdout=subprocess.DEVNULL)
    wheel = next(out.glob("slidesparse-*.whl"))
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    if missing := sorted(source - set(zipfile.ZipFile(wheel).namelist())):
        sys.exit(f"the wheel lacks {', '.join(missing)}")
    return wheel, unpacked


def try_wheel(wheel: Path, folder: Path, shared: bool) -> None:
    """Install the wheel into an environment of its own and use it."""
    tell(f"installing {wheel.name} into an empty environment" + (" that sees this interpreter's packages" if shared else ""))
    venv.create(folder / "venv", with_pip=True)
    bin_ = folder / "venv" / "bin"
    words = [bin_ / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if shared:
        site = subprocess.run([bin_ / "python", "-c", SITE], capture_output=True, text=True, check=True).stdout.strip()
        places = [place for place in sys.path if place.endswith("-packages")]
        (Path(site) / "shared.pth").write_text("".join(f"{place}\n" for place in places))
        words += ["--no-deps", "--no-index", "--force-reinstall", str(wheel)]
    else:
        words += [f"{wheel}[hf]", f"torch=={torch.__version__.partition('+')[0]}"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(words, check=True, env=clean)
    work = folder / "work"
    work.mkdir()
    (work / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    for code in ("import slidesparse; print(slidesparse.__version__, slidesparse.__file__)", MODEL):
        subprocess.run([bin_ / "python", "-c", code], cwd=work, check=True, env=clean)
    for command in COMMANDS:
        tell("slidesparse " + " ".join(command))
        subprocess.run([bin_ / "slidesparse", *command], cwd=work, check=True, env=clean)


def try_sdist(unpacked: Path) -> None:
    """Run a part of the tests from the unpacked sdist, with the packages of this interpreter."""
    tell('make test ARGS="-k pack" in the unpacked sdist')
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    subprocess.run(["make", "test", f"PYTHON={sys.executable}", "ARGS=-k pack"], cwd=unpacked, check=True, env=clean)


def tell(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="try this one instead of building")
    parser.add_argument("--shared", action="store_true", help="fetch nothing: use the packages of this interpreter")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.wheel:
            try_wheel(asked.wheel.resolve(), folder, asked.shared)
        else:
            wheel, unpacked = build(folder)
            try_wheel(wheel, folder, asked.shared)
            try_sdist(unpacked)
    tell("all of it works")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed with status {error.returncode}: {' '.join(map(str, error.cmd))[:300]}")
