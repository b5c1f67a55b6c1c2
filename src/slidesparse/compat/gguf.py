"""The one place where another library is given something else than its own: transformers parses a GGUF file anew for each of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf


@contextmanager
def parsed_once(path: Path, reader: Any) -> Iterator[None]:
    """While this lasts, whoever asks the gguf package to read ``path`` gets the reader that is there.

    Parsing takes seconds, for the vocabulary; configuration, tokenizer and names are three calls of transformers'.
    """
    own = gguf.GGUFReader

    def read(given: Any, *more: Any) -> Any:
        return reader if Path(given).resolve() == path.resolve() else own(given, *more)

    gguf.GGUFReader = read
    try:
        yield
    finally:
        gguf.GGUFReader = own
