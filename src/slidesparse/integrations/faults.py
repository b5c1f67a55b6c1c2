"""Whose fault an error is: a library's, which its input made fail in one of many ways, or this package's own, which nothing may hide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..errors import CheckpointError, SlideSparseError, first_line

_LIBRARIES = ("accelerate", "gguf", "huggingface_hub", "safetensors", "tokenizers", "transformers")
_LOADING = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers' and gguf's readers let through where a file holds what they did not expect."""


@contextmanager
def one_line(path: Path, what: str = "it") -> Iterator[None]:
    """What a library cannot load, in one line; ``what`` of the folder or file it is.

    Raises:
        CheckpointError: a library is missing, or failed at what the files hold. Errors of this package's own pass as they are.
    """
    try:
        yield
    except SlideSparseError:
        raise
    except ImportError as error:
        raise CheckpointError(f"{path} needs a package that is not installed: {error}") from error
    except _LOADING as error:
        if not is_a_librarys(error):
            raise
        raise CheckpointError(f"{path}: transformers cannot load {what} ({first_line(error)})") from error


def is_a_librarys(error: BaseException) -> bool:
    """Whether a library raised it, called by this package, and not this package, called back by the library."""
    found = False
    for frame, _ in walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        found = package != __package__.partition(".")[0] and (found or package in _LIBRARIES)
    return found
