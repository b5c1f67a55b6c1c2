"""docs/commands.md, from what ``slidesparse COMMAND --help`` says: ``.venv/bin/python scripts/write_commands.py``."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path
from typing import Any

import typer

from slidesparse.cli import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD = """# Commands

`scripts/write_commands.py` writes this page from `--help`. What the commands read and write, and what the methods of pruning do:
[converting.md](converting.md). What the errors mean: [troubleshooting.md](troubleshooting.md).

With `--json` the report is all that stdout holds; what libraries print goes to stderr. With `SLIDESPARSE_DEBUG=1` an error shows where it
comes from.

| exit code | means |
|---|---|
| 0 | done |
| 1 | the input or the machine is at fault |
| 2 | the command line is: an option that does not exist, a value that cannot be meant, options that contradict each other |
| 3 | verification failed, or a pattern is violated |
| 130 | interrupted; the same command goes on from there |
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(map(section, commands(typer.main.get_command(app))))


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, those of groups too."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def section(named: tuple[str, Any]) -> str:
    """One command: how it is called, what it does, and a row for each argument and option."""
    name, command = named
    shown = [each for each in command.params if each.name != "help" and not getattr(each, "hidden", False)]
    arguments = [each for each in shown if each.param_type_name == "argument"]
    options = [each for each in shown if each.param_type_name == "option"]
    words = [metavar(each) if each.required else f"[{metavar(each)}]" for each in arguments]
    call = " ".join(["slidesparse", name, *words, *(["[OPTIONS]"] if options else [])])
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    rows = [f"| {escaped(metavar(each))} | {said(each, hints)} | {default(each)} |" for each in arguments]
    rows += [f"| {', '.join(f'`{word}`' for word in ordered(each))} | {said(each, hints)} | {default(each)} |" for each in options]
    table = "\n".join(["| | | default |", "|---|---|---|", *rows]) + "\n" if rows else ""
    return f"\n## {name}\n\n    {call}\n\n{' '.join(command.help.split())}\n\n{table}"


def metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def ordered(option: Any) -> list[str]:
    """The option's names, the long one in front, and the one that turns it off behind."""
    return [*sorted(option.opts, key=len, reverse=True), *option.secondary_opts]


def said(parameter: Any, hints: dict[str, Any]) -> str:
    """The help of an argument or option, and the words that it takes where they are few."""
    kinds = [hints[parameter.name], *typing.get_args(hints[parameter.name])]
    words = [str(each.value) for kind in kinds if isinstance(kind, EnumType) for each in kind]
    return escaped(" ".join((parameter.help or "").split()) + (f" One of {', '.join(words)}." if words else ""))


def escaped(text: str) -> str:
    """The text as it may stand in a table."""
    return text.replace("|", "\\|")


def default(parameter: Any) -> str:
    """What holds when nothing is given; empty for switches that are off and for what must be given."""
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    value = parameter.default
    untold = callable(value) or value is None or value is False or value == () or parameter.show_default is False
    return "" if untold else "on" if value is True else str(getattr(value, "value", value))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} is written")
