"""plot and report: pictures and a page from the rows of benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import screen

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder with rows of `bench`, or one such file.", show_default=False)]


def plot(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder of the pictures.", show_default="DIR/pictures")] = None,
) -> None:
    """Pictures of what was measured, each as SVG and PNG, for light and for dark pages.

    Speed-up against tokens, a roofline, decoding against the batch, and what a pattern costs against what it gains.
    """
    from ..bench.figures import figures
    from ..bench.plots import draw
    from ..bench.rows import read_folder
    from ..errors import OutputExistsError

    place = out or (folder if folder.is_dir() else folder.parent) / "pictures"
    if place.exists() and not place.is_dir():
        raise OutputExistsError(f"{place} is a file: name a folder with --out")
    made = [file for figure in figures(read_folder(folder)) for file in draw(figure, place)]
    if not made:
        raise ValueError(f"{folder}: no row there has a time of a sparse kernel or of an engine: there is nothing to draw")
    for file in made:
        screen.say(str(file))


def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="The page.", show_default="DIR/report.html")] = None,
) -> None:
    """One HTML page of what was measured, with nothing outside it: machines and versions, pictures, tables that a click sorts."""
    from ..bench.report import BEGIN, page
    from ..bench.rows import read_folder
    from ..checkpoint.staging import write_text
    from ..errors import OutputExistsError

    place = out or (folder if folder.is_dir() else folder.parent) / "report.html"
    if place.is_dir():
        raise OutputExistsError(f"{place} is a folder: name a file with --out")
    if place.exists() and not place.read_bytes().startswith(BEGIN.encode()):
        raise OutputExistsError(f"{place} is there, and not a page that report wrote: name another file with --out")
    place.parent.mkdir(parents=True, exist_ok=True)
    text = page(read_folder(folder), f"slidesparse benchmarks: {folder.resolve().name}")
    write_text(place, text)
    screen.say(f"{place}: {screen.size(place.stat().st_size)}")
