"""The command line: thin commands over the Python API, one-line errors, exit codes that mean something.

0 done · 1 the input or the machine is at fault · 2 the command line is · 3 verification failed · 130 interrupted
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__, env
from ..errors import SlideSparseError
from . import advising, benching, evaluating, examine, picturing, produce, run, tuning
from .screen import UsageError

app = typer.Typer(
    name="slidesparse",
    help="Prune, quantise, pack and run language models with (2N-2):2N structured sparsity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(show: bool) -> None:
    if show:
        print(f"slidesparse {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version and exit.")) -> None:
    """Prune, quantise, pack and run language models with (2N-2):2N structured sparsity."""


for command in (produce.prune, produce.quantize, produce.pack, produce.convert):
    app.command()(command)
app.command(name="import")(produce.import_)
app.command()(examine.inspect)
app.command()(examine.verify)
app.command()(tuning.tune)
app.command()(advising.advise)
app.add_typer(benching.app)
app.command()(picturing.plot)
app.command()(picturing.report)
app.command()(run.generate)
app.command(name="eval")(evaluating.eval_)
app.command()(examine.doctor)


def main() -> None:
    """Entry point of the ``slidesparse`` script."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        # Not every terminal can show an arrow or a multiplication sign; that is no reason to fail.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = app(prog_name="slidesparse", standalone_mode=False)
    except UsageError as error:
        _refuse(error)
    except (SlideSparseError, ValueError, OSError) as error:
        if env.debug():
            raise
        _fail(" ".join(str(error).split()) or type(error).__name__, 1)
    if code == 130:
        _fail("interrupted; run again to go on: a conversion from its last finished shard or block, a plan or rows from the last cell", 130)
    sys.exit(code or 0)


def _refuse(error: Any) -> None:
    """A command line that cannot be meant, in one line; without any arguments the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    command = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
    message = error.format_message().replace("Value error, ", "")  # a word of the library that checks values
    _fail(" ".join(message.split()) + command, error.exit_code)


def _fail(message: str, code: int) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}")
    sys.exit(code)
