"""The text that calibrated pruning reads: what a job asks for, and how files of text or token ids are read, block by block."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, first_line

PIECE = 1 << 18
"""Characters after which a piece of text ends, at the next end of a line or document."""

_JSON_LINES, _TOKEN_IDS = (".jsonl", ".json", ".ndjson"), ".npy"
_FILES = (".txt", ".md", ".text", *_JSON_LINES, _TOKEN_IDS)
_FIELDS = (("text",), ("content",), ("prompt", "completion"))
_SHOWN = 6  # keys an error lists


@dataclass(frozen=True)
class Calibration:
    """How much of which text a job reads; the seed that chooses among it is given apart.

    Attributes:
        source: a UTF-8 text file; JSON lines (``.jsonl``, ``.ndjson``, ``.json``); several of these, with commas between; token ids
            (``.npy``, integers ``[S, T]`` or ``[T]``); the name of a data set, ``NAME`` or ``NAME:CONFIG``; None for the built-in text.
        samples: how many sequences to take, where the source holds as many.
        length: tokens of each.

    Raises:
        ValueError: samples or length below 1, or a source that is blank.
    """

    source: str | None = None
    samples: int = 128
    length: int = 2048

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"calibration {name} must be a whole number of at least 1, got {value!r}")
        if self.source is not None and (not isinstance(self.source, str) or not all(map(str.strip, self.source.split(",")))):
            raise ValueError(f"calibration source must name files or a data set, got {self.source!r}")

    def files(self) -> tuple[Path, ...] | None:
        """The files to read, that of the built-in text if there is no source; None if the source is the name of a data set.

        A source is a data set's name where no such file exists, and where its name does not end like a file's.

        Raises:
            CheckpointError: a folder, a file that is missing, or token ids beside other files.
        """
        if self.source is None:
            return (_built_in(),)
        # os.path answers False for names that no file can have, such as a long list; Path would raise.
        names = [self.source] if os.path.exists(self.source) else [name.strip() for name in self.source.split(",")]
        if len(names) == 1 and not os.path.exists(names[0]) and not _named_like_a_file(names[0]):
            return None
        files = tuple(map(Path, names))
        for file in files:
            if os.path.isdir(file):
                raise CheckpointError(f"{file} is a folder: name the text files to calibrate on, with commas between")
            if not os.path.isfile(file):
                raise CheckpointError(f"{file}: no such file to calibrate on")
            if file.suffix.lower() == _TOKEN_IDS and len(files) > 1:
                raise CheckpointError(f"{file} holds token ids: it cannot be joined with other files")
        return files

    def token_file(self) -> Path | None:
        """The file of token ids, where the source is one: no tokenizer is needed then.

        Raises:
            CheckpointError: see `files`.
        """
        files = self.files()
        return files[0] if files and files[0].suffix.lower() == _TOKEN_IDS else None

    def fingerprint(self) -> dict[str, Any]:
        """A JSON form that tells two jobs apart, with the sha256 of every file; a data set has its name only.

        Raises:
            CheckpointError: see `files`; a file that cannot be read.
        """
        files = self.files()
        hashes = None if files is None else [sha256_of(file) for file in files]
        return {"source": self.source, "sha256": hashes, "samples": self.samples, "length": self.length}


@dataclass(frozen=True)
class Texts:
    """Text to calibrate on: put together, the ``pieces`` are the whole of it; ``description`` says where it is from, as a noun.

    ``pieces`` are read as they are asked for, in whole lines of about `PIECE` characters together, so a large file needs no memory.
    """

    pieces: Iterator[str]
    description: str


def read_texts(calibration: Calibration) -> Texts:
    """The text of the calibration's files; documents of JSON lines have a blank line between them.

    Raises:
        CheckpointError: see `Calibration.files`; token ids, or the name of a data set. Raised while reading: a file that cannot be read,
            is not UTF-8, holds no text, or has a line that is no document; the message names the line and the keys found there.
    """
    files = calibration.files()
    if files is None:
        raise CheckpointError(f"{calibration.source}: no such file to calibrate on")
    if calibration.token_file():
        raise CheckpointError(f"{files[0]} holds token ids, not text")
    named = f"the file{'s' * (len(files) > 1)} {', '.join(map(str, files))}"
    description = "the built-in text" if calibration.source is None else named
    return Texts(in_pieces(text for file in files for text in _read_file(file)), description)


def in_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of at least `PIECE` characters, the last one excepted."""
    parts: list[str] = []
    size = 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size >= PIECE:
            yield "".join(parts)
            parts, size = [], 0
    if parts:
        yield "".join(parts)


def document_of(row: object, where: str) -> str:
    """The document of a row, with a blank line after it: ``text``, ``content``, or ``prompt`` and ``completion`` on lines of their own.

    Raises:
        CheckpointError: no such field, or one that is not text; the message begins with ``where`` and names the keys that were found.
    """
    if not isinstance(row, Mapping):
        raise CheckpointError(f"{where}: not a JSON object with a field text, but {type(row).__name__}")
    for names in _FIELDS:
        if all(name in row for name in names):
            break
    else:
        found = ", ".join(list(map(str, row))[:_SHOWN]) + (", …" if len(row) > _SHOWN else "")
        raise CheckpointError(f"{where}: none of the fields text, content, prompt and completion, but {found or 'no key at all'}")
    for name in names:
        if not isinstance(row[name], str):
            raise CheckpointError(f"{where}: the field {name} is not text, but {type(row[name]).__name__}")
    text = "\n".join(row[name] for name in names).rstrip()
    return f"{text}\n\n" if text else ""


def read_token_ids(path: Path) -> np.ndarray:
    """Token ids ``[S, T]`` of a ``.npy`` file, mapped rather than read; one sequence ``[T]`` becomes ``[1, T]``.

    Raises:
        CheckpointError: the file cannot be read, or is not a non-empty array of integers of 0 and above, ``[S, T]`` or ``[T]``.
    """
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"cannot read token ids from {path}: {first_line(error)}") from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise CheckpointError(f"{path}: token ids must be integers [S, T] or [T], found {found}")
    if int(ids.min()) < 0:
        raise CheckpointError(f"{path}: token id {int(ids.min())} is below 0")
    return ids.reshape(1, -1) if ids.ndim == 1 else ids


def _built_in() -> Path:
    return Path(str(resources.files("slidesparse.checkpoint") / "text" / "calibration.txt"))


def _named_like_a_file(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix.lower() in _FILES


def sha256_of(file: Path) -> str:
    """The hash of a file's content.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def _read_file(file: Path) -> Iterator[str]:
    """A file's text in order: its lines, or its documents."""
    found = False
    for number, line in _lines(file):
        text = line
        if file.suffix.lower() in _JSON_LINES:
            text = document_of(_parsed(line, f"{file}, line {number}"), f"{file}, line {number}") if line.strip() else ""
        found = found or bool(text.strip())
        yield text
    if not found:
        raise CheckpointError(f"{file} holds no text to calibrate on")
    yield "\n\n"  # the next file is another document


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; decoded one by one, so that an error can name the line."""
    number = 0
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 text: {error.reason} in line {number}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def _parsed(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON ({error}); a file of JSON lines has one object on each line") from error
