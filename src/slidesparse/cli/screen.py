"""What the commands share on screen: progress bars on stderr, tables and JSON on stdout."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

UsageError: Any = typer.BadParameter.__base__
"""The error of a command line that cannot be meant: typer exports no name for it; it is BadParameter's base class."""

# A pipe has no width of its own: wide enough for every table.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout and sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False)

Minutes = Annotated[
    float | None, typer.Option(min=0, help="Begin no measurement after so many minutes; show what there is then.", show_default="no limit")
]

_INTERRUPTED = "interrupted"
_EVERY = 5.0
"""Seconds between two lines of progress in a log."""
_report: TextIO | None = None
"""Where JSON goes while everything else is kept from stdout."""


@contextmanager
def progress(title: str, *, count: bool = False) -> Iterator[Callable[..., None]]:
    """Progress on stderr as the callback the API takes; bytes, or steps with ``count``. A bar, or where no person looks a line at times."""
    began = time.monotonic()
    told = began - (_EVERY if count else 0.0)

    def line(done: int, total: int, what: str) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _EVERY or (count and done == total):
            told = now
            amount = "" if not total else f" {done} of {total}" if count else f" {size(done)} of {size(total)}"
            err.print(f"{title}{amount}, {now - began:.0f} s{f': {what}' if what else ''}", markup=False)

    units = (MofNCompleteColumn(),) if count else (DownloadColumn(binary_units=False), TransferSpeedColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *units, TimeRemainingColumn(), TextColumn("[dim]{task.fields[what]}"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None, what="")

        def update(done: int, total: int, what: str = "") -> None:
            bar.update(task, completed=done, total=total, what=what)
            if bar.disable:
                line(done, total, what)

        yield update


class _TimeIsUpError(Exception):
    """Not an error: nothing more is begun."""


class Measuring:
    """A run of measurements that stand each for itself: the callback that the API takes, and how the run ended."""

    def __init__(self, show: Callable[..., None], minutes: float | None) -> None:
        self._show, self._ends = show, math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._done = self._total = 0
        self.why = ""

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Between two measurements; raises where the time is up."""
        self._done, self._total = done, total
        self._show(done, total, what)
        if done < total and time.monotonic() > self._ends:
            raise _TimeIsUpError

    @property
    def told(self) -> str:
        """What was not measured, and why; empty where all was."""
        return self.why and f"{self.why}: {self._done} of {self._total} were measured; run again to go on"

    def end(self) -> None:
        """Say so, and end the command where a person or the system asked for that."""
        if self.why:
            err.print(self.told, markup=False)
        if self.why == _INTERRUPTED:
            raise typer.Exit(130)


@contextmanager
def stoppable() -> Iterator[None]:
    """Whoever ends the command from outside gets what Ctrl-C gets. Not around libraries that fork: pools end their workers so, too."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def measuring(title: str, minutes: float | None) -> Iterator[Measuring]:
    """Measurements until all are made, so many minutes are over, or Ctrl-C or SIGTERM comes: what was measured is shown in any case."""
    with progress(title, count=True) as show, stoppable():
        run = Measuring(show, minutes)
        try:
            yield run
        except _TimeIsUpError:
            run.why = f"stopped after {minutes:g} minutes"
        except KeyboardInterrupt:
            run.why = _INTERRUPTED


def say(text: str) -> None:
    """One plain line on stdout: names and paths may hold brackets."""
    out.print(text, markup=False)


def table(*columns: str, overflow: Literal["fold", "ellipsis"] = "ellipsis") -> Table:
    """A table without lines; columns behind > are numbers."""
    made = Table(box=None, header_style="bold")
    for name in columns:
        made.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow=overflow)
    return made


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json_text(data), file=_report or sys.stdout, flush=True)


def json_alone(context: typer.Context, asked: bool) -> bool:
    """The option --json: until the command ends, stdout is for `print_json` alone."""
    if asked and not context.resilient_parsing:
        context.with_resource(_reports_alone())
    return asked


@contextmanager
def _reports_alone() -> Iterator[None]:
    global _report
    with stdout_on_stderr() as stream:
        _report = stream
        try:
            yield
        finally:
            _report = None


def json_text(data: Any) -> str:
    """One JSON document: dataclasses as objects, paths as strings."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = dataclasses.asdict(data)
    return json.dumps(_finite(data), indent=2, allow_nan=False, default=lambda each: str(each) if isinstance(each, Path) else repr(each))


@contextmanager
def options_at_fault() -> Iterator[None]:
    """Options that contradict each other are the command line's fault."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextmanager
def stdout_on_stderr() -> Iterator[TextIO]:
    """What libraries print, and the processes they start, goes to stderr; gives the stream that still is stdout."""
    own = sys.stdout
    own.flush()
    kept = os.dup(1)
    stream = os.fdopen(os.dup(kept), "w", encoding=own.encoding, errors=own.errors) if _fileno(own) == 1 else own
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield stream
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        if stream is not own:
            stream.close()


def _fileno(stream: TextIO) -> int | None:
    """The descriptor behind a stream; None of one in memory."""
    try:
        return stream.fileno()
    except OSError:
        return None


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def size(nbytes: int) -> str:
    """Bytes as a person reads them, in powers of ten."""
    for limit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.2f} {name}"
    return f"{nbytes} B"
