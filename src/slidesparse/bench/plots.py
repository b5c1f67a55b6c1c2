"""Draws figures as SVG and PNG, for light and for dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from .figures import DENSE, Figure, Line, Panel
from .kernel import CONTROL

THEMES = {
    "light": {"page": "#ffffff", "ink": "#1b1f24", "grid": "#d0d7de", "6:8": "#0072B2", "4:6": "#C78500"},
    "dark": {"page": "#0d1117", "ink": "#e6edf3", "grid": "#3d444d", "6:8": "#56B4E9", "4:6": "#E69F00"},
}
_COLOURS = {"2:4": "#D55E00", "8:10": "#009E73", "14:16": "#CC79A7", CONTROL: "#8c959f"}
_MARKERS = {"2:4": "s", "4:6": "^", "6:8": "o", "8:10": "D", "14:16": "v", CONTROL: "x", DENSE: "P"}
_OTHERS = (("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^"), ("#E69F00", "v"), ("#8c959f", "P"))
"""Of Okabe and Ito, told apart by colour-blind eyes; markers tell lines apart, too."""
FORMATS = ("svg", "png")


def draw(figure: Figure, folder: Path, themes: Sequence[str] = tuple(THEMES)) -> list[Path]:
    """Write a figure in every theme and format, and return the files.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise UnsupportedError(f"pictures need matplotlib ({error}): pip install 'slidesparse[plot]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for theme in themes:
        colours = THEMES[theme]
        settings = {"svg.hashsalt": figure.name, "font.size": 10, "text.color": colours["ink"], "axes.labelcolor": colours["ink"]}
        settings |= {"xtick.color": colours["ink"], "ytick.color": colours["ink"], "axes.edgecolor": colours["grid"]}
        with matplotlib.rc_context(settings):
            canvas = Canvas(figsize=(4.6 * max(2, len(figure.panels)), 4.4), layout="constrained", facecolor=colours["page"])
            axes = canvas.subplots(1, len(figure.panels), squeeze=False, sharey=True)[0]
            for axis, panel in zip(axes, figure.panels, strict=True):
                _panel(axis, panel, colours)
            canvas.suptitle(figure.title, fontsize=11, wrap=True)
            for kind in FORMATS:
                place = folder / f"{figure.name}-{theme}.{kind}"
                canvas.savefig(place, dpi=130, metadata={"Date": None} if kind == "svg" else None)
                made.append(place)
    return made


def _panel(axis: Any, panel: Panel, colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_facecolor(colours["page"])
    axis.grid(color=colours["grid"], alpha=0.5, linewidth=0.6)
    axis.set_axisbelow(True)
    for roof, dashes in zip(panel.roofs, ("--", "-."), strict=False):
        axis.plot(*zip(*roof.points, strict=True), color=colours["ink"], linewidth=1, linestyle=dashes, label=roof.name)
    if panel.level is not None and all(line.name != DENSE for line in panel.lines):
        # Speed stands upright where it is the height, and across where it is the width.
        (axis.axhline if panel.log_x else axis.axvline)(panel.level, color=colours["ink"], linewidth=1.2, label="dense")
    for number, line in enumerate(panel.lines):
        _line(axis, line, _style(line.name, number, colours), left=number % 2 == 0, page=colours["page"])
    if panel.log_x:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if panel.log_y:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.margins(0.1, 0.1 if panel.log_y else 0.25)  # the legend finds room
    axis.set_xlabel(panel.x)
    if axis.get_subplotspec().is_first_col():  # the others share it
        axis.set_ylabel(panel.y)
    axis.set_title(panel.title, fontsize=10, color=colours["ink"])
    axis.legend(fontsize=8, facecolor=colours["page"], edgecolor=colours["grid"], labelcolor=colours["ink"])


def _style(name: str, number: int, colours: dict[str, str]) -> tuple[str, str]:
    if name == DENSE:
        return colours["ink"], _MARKERS[DENSE]
    if name in _MARKERS:
        return _COLOURS.get(name) or colours[name], _MARKERS[name]
    return (colours["6:8"], "o") if number == 0 else _OTHERS[(number - 1) % len(_OTHERS)]


def _line(axis: Any, line: Line, style: tuple[str, str], left: bool, page: str) -> None:
    """Labels stand to the right of points, of every other line to the ``left``: points of two lines may have one height.

    Behind them is the colour of the ``page``: lines do not run through.
    """
    colour, marker = style
    name = "control, γ = 2" if line.name == CONTROL else line.name
    axis.plot(*zip(*line.points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.6, label=name)
    if line.bound is not None:
        axis.axhline(line.bound, color=colour, linewidth=1, linestyle=":", alpha=0.8)
    for (x, y), label in zip(line.points, line.labels, strict=False):
        place, side = ((0, -15), "center") if line.name == DENSE else ((-6, -12), "right") if left else ((5, 5), "left")
        box = {"boxstyle": "square,pad=0.05", "facecolor": page, "edgecolor": "none", "alpha": 0.85}
        axis.annotate(label, (x, y), xytext=place, textcoords="offset points", ha=side, fontsize=9, color=colour, bbox=box)
