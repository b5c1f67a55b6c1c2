"""One self-contained HTML page from rows: the machines on top, pictures, and tables that a click on a column sorts."""

from __future__ import annotations

import base64
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from ..errors import UnsupportedError
from .accuracy import losses
from .audit import losing
from .figures import SHOWN, Figure, figures
from .kernel import CONTROL
from .models import MODELS
from .rows import COLUMNS, OK, Row, machines, newest
from .speedups import CAVEAT, FORMULA, Curve, curves, efficiencies

Cells = Sequence[Sequence[object]]
_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --soft: #151b23 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid var(--line); padding: 0.2em 0.7em; text-align: right; white-space: nowrap }
th { cursor: pointer; background: var(--soft) } th[aria-sort=ascending]::after { content: " ▲" }
th[aria-sort=descending]::after { content: " ▼" } td.text, th.text { text-align: left } img { max-width: 100%; height: auto }
"""
_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const down = head.ariaSort === "ascending", at = head.cellIndex, body = head.closest("table").tBodies[0];
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.ariaSort = down ? "descending" : "ascending";
  const value = row => { const cell = row.cells[at]; return cell.dataset.n === undefined ? cell.textContent : +cell.dataset.n };
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b))));
};
"""


BEGIN = "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=generator content=slidesparse>"
"""How every page begins."""


def page(rows: Sequence[Row], title: str) -> str:
    """The page as text; pictures are in it where matplotlib is installed."""
    parts = [f"<h1>{escape(title)}</h1>", "<ul>", *(f"<li>{escape(each)}</li>" for each in machines(rows)), "</ul>", *_body(rows)]
    head = f"<meta name=viewport content='width=device-width'><title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"{BEGIN}{head}</head><body>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"


def _body(rows: Sequence[Row]) -> Iterator[str]:
    made = list(figures(rows))
    try:
        yield from _pictures(made)
    except UnsupportedError as error:
        yield f"<p>{escape(str(error))}</p>"
    for card in dict.fromkeys(row.card for row in rows):
        own = newest([row for row in rows if row.card == card])
        yield f"<h2>{escape(card)}</h2>"
        yield from _kernels(own)
        yield from _audit(own)
        yield from _served(own)
        yield from _passes(own)
    yield from _study()
    yield from _failures(rows)
    told = [[getattr(row, name) for name in COLUMNS] for row in rows]
    yield f"<details><summary>all {len(rows)} rows</summary>{table(COLUMNS, told)}</details>"


def _pictures(made: Sequence[Figure]) -> Iterator[str]:
    from .plots import draw

    with tempfile.TemporaryDirectory() as folder:
        for figure in made:
            files = {file.stem.rpartition("-")[2]: file for file in draw(figure, Path(folder)) if file.suffix == ".svg"}
            texts = (base64.b64encode(files[theme].read_bytes()).decode() for theme in ("light", "dark"))
            light, dark = (f"data:image/svg+xml;base64,{text}" for text in texts)
            source = f"<source media='(prefers-color-scheme: dark)' srcset='{dark}'>"
            yield f"<picture>{source}<img alt='{escape(figure.title, quote=True)}' src='{light}'></picture>"


def _kernels(rows: Sequence[Row]) -> Iterator[str]:
    for name, model in MODELS.items():
        for what in ("linear", "product"):
            found = [curve for curve in curves(rows, list(model.linears.values()), what) if curve.speedups()]
            if found:
                shown = "whole linears" if what == "linear" else "products alone"
                yield f"<h3>{escape(name)}, {shown}: times as fast as the fastest dense one of the scheme, layers summed</h3>"
                yield _curves(found)
                yield f"<p>{escape(FORMULA)}. {escape(CAVEAT)}</p>"


def _curves(found: Sequence[Curve]) -> str:
    tokens, shares = sorted({m for curve in found for m in curve.speedups()}), efficiencies(found)
    lines = []
    for curve in found:
        gains, share = curve.speedups(), shares.get((curve.scheme, curve.pattern), {})
        lines.append([curve.scheme, curve.pattern, curve.bound, *(gains.get(m) for m in tokens), *(share.get(m) for m in tokens)])
    heads = [*(f"M = {m}" for m in tokens), *(f"efficiency, M = {m}" for m in tokens)]
    return table(["scheme", "pattern", "bound", *heads], lines)


def _audit(rows: Sequence[Row]) -> Iterator[str]:
    own = [row for row in rows if row.bench == "audit" and row.status == OK]
    if own:
        lost = losing(own)
        yield f"<h3>The plan against dense: {len(own)} cells, slower in {len(lost)}</h3>"
        columns = ("n", "k", "pattern", "scheme", "m", "route", "us", "rival", "ratio")
        yield table(columns, [[getattr(row, name) for name in columns] for row in own])


def _served(rows: Sequence[Row]) -> Iterator[str]:
    own = [row for row in rows if row.bench == "serve" and row.status == OK]
    if own:
        yield "<h3>Served: a step's time, that of its kernels, tokens a second, memory of weights</h3>"
        heads = ["model", "scheme", "pattern", "who", "phase", "tokens", "µs", "kernels µs", "tokens/s", "× dense", "GB", "J a token"]
        lines = [
            [*(row.model, row.scheme, row.pattern, row.route, row.what, row.m, row.us, row.kernels_us),
             *(row.m / row.us * 1e6 if row.us else None, row.ratio, row.gigabytes, row.joules)]
            for row in own
        ]  # fmt: skip
        yield table(heads, lines)


def _passes(rows: Sequence[Row]) -> Iterator[str]:
    own = [row for row in rows if row.bench == "lift" and row.status == OK]
    if own:
        yield "<h3>Passes over activations, of the time that their bytes take</h3>"
        lines = [[row.scheme, row.what, row.route, row.k, row.m, row.us, row.ratio] for row in own]
        yield table(["scheme", "pass", "pattern", "K", "M", "µs", "of the floor"], lines)


def _study() -> Iterator[str]:
    found = [loss for pattern in SHOWN if pattern != CONTROL for loss in losses(pattern)]
    if found:
        yield "<h2>What accuracy cost in our study: for these models, not yours</h2>"
        lines = [[loss.model, loss.pattern, loss.method, loss.perplexity, loss.dense_perplexity, loss.tasks] for loss in found]
        yield table(["model", "pattern", "method", "perplexity", "dense", "tasks, points"], lines)


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    found = Counter((row.card, row.status, row.scheme, row.route, row.why) for row in rows if row.status != OK)
    if found:
        yield "<h2>What did not run, or was not measured here</h2>"
        yield table(["card", "status", "scheme", "route", "why", "rows"], [[*key, count] for key, count in found.most_common()])


def table(columns: Sequence[str], lines: Cells) -> str:
    """An HTML table; columns that hold a text anywhere are set to the left."""
    texts = [any(isinstance(line[at], str) for line in lines) for at in range(len(columns))]
    kinds = [" class=text" if text else "" for text in texts]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
    body = "".join(f"<tr>{''.join(_cell(value, kind) for value, kind in zip(line, kinds, strict=True))}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object, kind: str) -> str:
    if value is None:
        return f"<td{kind} data-n=-1></td>"
    if isinstance(value, str):
        return f"<td{kind}>{escape(value)}</td>"
    text = f"{value:,.2f}" if isinstance(value, float) else f"{value}"
    return f"<td{kind} data-n={value}>{text}</td>"
