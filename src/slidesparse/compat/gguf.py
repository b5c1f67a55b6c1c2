"""A GGUF file parsed once: transformers parses it anew for each of its parts, unless it is given a reader that has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np


class Reader(gguf.GGUFReader):  # type: ignore[misc]  # gguf has no types
    """gguf's own, on a plain array: a vocabulary is a million slices, and each of a memmap is an object that looks for its file."""

    @property
    def data(self) -> np.ndarray:
        """The file's bytes, mapped."""
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)


@contextmanager
def parsed_once(path: Path, reader: Any) -> Iterator[None]:
    """While this lasts, whoever asks the gguf package to read ``path`` gets the reader that is there, and tables of names are made once.

    Parsing takes seconds, for the vocabulary; configuration, tokenizer and names are three calls of transformers'. It asks for the table
    of names for every module of the model, which takes longer than all the rest of an import.
    """
    reading, naming = gguf.GGUFReader, gguf.get_tensor_name_map

    def read(given: Any, *more: Any) -> Any:
        return reader if Path(given).resolve() == path.resolve() else reading(given, *more)

    gguf.GGUFReader, gguf.get_tensor_name_map = read, cache(naming)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reading, naming
