"""Samples for calibrated pruning: text from files or from a data set through a tokenizer, cut into sequences of one length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.calibration import Calibration, Texts, document_of, in_pieces, read_texts, read_token_ids
from ..errors import CheckpointError, UnsupportedError, first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of these is in every model directory that has a tokenizer."""

_CHOICE = 4  # reading stops once there are this many times the samples asked for to choose among


@dataclass(frozen=True)
class Samples:
    """``tokens`` int64 ``[S, L]``, and one sentence that says what they are: how many, of what, and how they were chosen."""

    tokens: Tensor
    description: str


def calibration_samples(tokenizer: Any, calibration: Calibration, seed: int = 0) -> Samples:
    """The calibration's samples, in the order of the text; no token of the text is in two of them.

    The text is tokenised as one stream, without special tokens, in pieces that end at line ends, and cut into whole samples. Each sample
    begins with what the tokenizer puts before a text (for most families BOS or nothing), as text does wherever the model is used; the
    rest of its ``length`` is text. Token ids are taken as they are, every row cut into whole samples.

    Of more samples than asked for, ``seed`` chooses. Reading stops at 4 times as many, so of a large file or data set only the beginning
    is read, and memory stays bounded. Of fewer, all are taken, and the description says so.

    Args:
        tokenizer: of transformers' interface; may be None where the source is a file of token ids.

    Raises:
        CheckpointError: see `read_texts` and `read_token_ids`; not enough text for a single sample; a data set that cannot be read.
        UnsupportedError: a data set, and the package datasets is not installed.
    """
    asked, length = calibration.samples, calibration.length
    file = calibration.token_file()
    found = _of_text(tokenizer, calibration) if file is None else _of_token_ids(file, calibration.length)
    if not found.count:
        raise CheckpointError(
            f"{found.origin}: {found.tokens} tokens are too few for one sample of {length}: give more text, or a smaller --length"
        )
    chosen = torch.arange(found.count)
    if found.count > asked:
        chosen = torch.randperm(found.count, generator=torch.Generator().manual_seed(seed))[:asked].sort().values
        said = f"{asked} of the {found.count} samples of {length} tokens that {found.origin} gives, chosen by seed {seed}"
    else:
        missing = f", {asked} were asked for" if found.count < asked else ""
        said = f"{found.origin} gives {found.count} sample{'s' * (found.count > 1)} of {length} tokens{missing}"
    return Samples(found.take(chosen.tolist()), said)


@dataclass(frozen=True)
class _Found:
    """Whole samples to choose among: ``take`` gives those of a list of numbers; ``tokens`` were read, or stand in a row of token ids."""

    origin: str
    tokens: int
    count: int
    take: Callable[[list[int]], Tensor]


def _of_token_ids(file: Path, length: int) -> _Found:
    ids = read_token_ids(file)
    in_row = ids.shape[1] // length

    def take(chosen: list[int]) -> Tensor:
        rows = [ids[i // in_row, i % in_row * length :][:length].astype(np.int64) for i in chosen]
        return torch.from_numpy(np.stack(rows))

    return _Found(f"the file of token ids {file}", ids.shape[1], ids.shape[0] * in_row, take)


def _of_text(tokenizer: Any, calibration: Calibration) -> _Found:
    texts = _data_set(calibration) if calibration.files() is None else read_texts(calibration)
    lead = _before_text(tokenizer)
    room = calibration.length - len(lead)
    if room < 1:
        raise CheckpointError(
            f"the tokenizer puts {len(lead)} tokens before a text, a sample has {calibration.length}: give a larger --length"
        )
    enough = _CHOICE * calibration.samples * room
    origin, parts, tokens = texts.description, [torch.empty(0, dtype=torch.int64)], 0
    for piece in texts.pieces:
        parts.append(torch.tensor(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64))
        tokens += parts[-1].numel()
        if tokens > enough:
            origin = f"the beginning of {origin}"
            break
    count = min(tokens, enough) // room
    text = torch.cat(parts)[: count * room].reshape(count, room)
    samples = torch.cat((torch.tensor(lead, dtype=torch.int64).expand(count, -1), text), dim=1)
    return _Found(origin, tokens, count, lambda chosen: samples[chosen])


def _before_text(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text; those it puts after one, as for a classifier, are not wanted here."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for begin in range(len(whole) - len(bare) + 1):
        if whole[begin : begin + len(bare)] == bare:
            return whole[:begin]
    return []


def _data_set(calibration: Calibration) -> Texts:
    source = str(calibration.source)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UnsupportedError(
            f"there is no file {source}; to calibrate on a data set of that name: pip install datasets ({error})"
        ) from error
    return Texts(in_pieces(_rows(load_dataset, source)), f"the data set {source}")


def _rows(load_dataset: Callable[..., Iterable[Any]], source: str) -> Iterator[str]:
    """The documents of a data set's split ``train``, fetched as they are asked for."""
    name, _, config = source.partition(":")
    try:
        for number, row in enumerate(load_dataset(name, config or None, split="train", streaming=True)):
            yield document_of(row, f"data set {source}, row {number}")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"there is no file {source}, and no data set of that name can be read ({first_line(error)}): name a text file"
        ) from error
