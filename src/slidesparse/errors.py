"""The errors the library raises on purpose; the command line prints their message as one line."""

from __future__ import annotations


class SlideSparseError(Exception):
    """Base of every deliberate error: the message names what is wrong, where, and what to do."""


class PatternError(SlideSparseError, ValueError):
    """Weights do not obey the pattern asked for.

    Attributes:
        row: first offending row, counted in the tensor that was passed in.
        group: first offending group of that row.
        values: the weights of that group.
    """

    def __init__(self, message: str, *, row: int = 0, group: int = 0, values: tuple[float, ...] = ()) -> None:
        super().__init__(message)
        self.row, self.group, self.values = row, group, values

    def reworded(self, message: str) -> PatternError:
        """The same violation under another message, such as one that names the layer."""
        return PatternError(message, row=self.row, group=self.group, values=self.values)


class WeightError(SlideSparseError, ValueError):
    """Weights or scales hold values that cannot be converted (NaN, Inf, wrong dtype or shape)."""


class CheckpointError(SlideSparseError):
    """A checkpoint on disk is damaged, incomplete, contradictory or not one at all."""


class OutputExistsError(CheckpointError):
    """The output is already there and may not be replaced."""


class UnsupportedError(SlideSparseError):
    """An explicit request that cannot run here; the message says why."""


class EvaluationError(SlideSparseError):
    """Tasks, a text or a reference that an evaluation cannot go on with."""


class CompileError(UnsupportedError):
    """The source of a kernel does not compile, or not to what was asked for."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing; of another library's at most 300 characters."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if isinstance(error, SlideSparseError) else line[:300]
