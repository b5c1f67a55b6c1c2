"""Every table of the documents that stands between markers, written from data: ``make tables``; with ``--check`` nothing is written.

A table stands between ``<!-- tables: NAME begin -->`` and ``<!-- tables: NAME end -->``; without a name it is the accuracy study's. Names:

    trade                          what a pattern costs and gains, the README's
    linears-CARD-6-8               a shipped plan's times of Qwen2.5-7B's layers, summed; CARD is h100 or h200
    linears-CARD-others            other patterns and models
    linears-h200-sm90              the kernel for compute capability 9.0 in that plan
    serving-CARD-prefill, -decode  packed models in vLLM against its own dense ones, kernels' time in brackets
    kernels-CARD                   `slidesparse bench kernel`: whole linears against the fastest dense ones

The summary of the study that comes with the package is written, too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from accuracy.tables import markdown, read, tables_of
from plan_tables import others, six_of_eight, sm90
from slidesparse.bench import accuracy, rows
from slidesparse.bench.models import MODELS
from slidesparse.bench.rows import Row
from slidesparse.bench.speedups import curves, efficiencies

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STUDY = RESULTS / "accuracy" / "results.csv"
SUMMARY = ROOT / "src" / "slidesparse" / "bench" / accuracy.FILE
MARKED = re.compile(r"<!-- tables: (?:(?P<name>\S+) )?begin -->\n(?P<old>.*?)<!-- tables: (?:(?P<last>\S+) )?end -->", re.DOTALL)
CARDS = {"h100": "nvidia-h100-80gb-hbm3", "h200": "nvidia-h200"}
GRAPHS = "CUDA graphs to 2048"
NOTHING = "–"
IN_VLLM = "in vLLM 0.26, against its dense model of the same 8 bits"
Dense = dict[tuple[str, int, str], Row]
Cells = dict[tuple[str, str, str], dict[tuple[str, str], dict[str, str]]]
"""The study's rows of a model, by method, pattern and scheme, then by stage and metric."""
ORDER = ("8:10", "6:8", "4:6", "2:4")
SHOWN = (("prefill", 4096), ("decode", 64))
"""Points of engines in the table of the trade."""


def documents() -> Iterator[Path]:
    """Those that may hold tables."""
    yield from (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def table_named(name: str) -> str:
    """The table of a marker.

    Raises:
        KeyError: no table has this name.
    """
    makers: dict[str, Callable[[], str]] = {"": study, "trade": trade, "linears-h200-sm90": partial(sm90, CARDS["h200"])}
    for card in CARDS:
        makers |= {
            f"linears-{card}-6-8": partial(six_of_eight, CARDS[card]), f"linears-{card}-others": partial(others, CARDS[card]),
            f"serving-{card}-prefill": partial(served, card, "prefill"), f"serving-{card}-decode": partial(served, card, "decode"),
            f"kernels-{card}": partial(measured, card),
        }  # fmt: skip
    return makers[name]()


def study() -> str:
    """Tables of the accuracy study."""
    return tables_of(read(STUDY))


def trade() -> str:
    """Losses and speeds of one model where both were measured; losses of SmolLM2; bytes and speed of the 7B shape."""
    studied, served_rows = read(STUDY), serve_rows("h200")
    title = "losses of the real weights, bytes and speed of random ones"
    groups = [
        (f"**{shape}: {title}, {IN_VLLM}**", served_lines(served_rows, shape, studied[study]))
        for study, name in accuracy.NAMES.items()
        for shape in MODELS
        if name.startswith(shape) and study in studied
    ]
    groups += [
        ("**SmolLM2-135M, real weights, bf16, `--method auto`, in transformers**", list(lost_lines(studied["smollm2"]))),
        (f"**Qwen2.5-7B's shape, random weights, {IN_VLLM}**", served_lines(served_rows, "Qwen2.5-7B", {})),
    ]
    heads = ["pattern", "4 tasks, points", "perplexity", "bytes, of dense", "prefill, 4096 tokens", "decode, 64 requests"]
    return markdown(heads, [line for title, lines in groups if lines for line in ([title, *[""] * (len(heads) - 1)], *lines)])


def lost_lines(cells: Cells) -> Iterator[list[str]]:
    """What the study found of a model in 16 bits."""
    for pattern in ORDER:
        found = cells.get(("auto", pattern, "bf16"), {})
        stored, dense = (float(found["convert", metric]["value"]) for metric in ("bytes", "bytes_dense"))
        yield [pattern, *losses(cells, pattern, "bf16"), f"{stored / dense:.2f}", NOTHING, NOTHING]


def served_lines(every: Sequence[Row], model: str, cells: Cells) -> list[list[str]]:
    """Engines of a model's shape, with what the study found of the pattern in this scheme."""
    own, lines = [row for row in every if row.model == model and row.scheme in ("fp8", "int8")], []
    for pattern in ORDER:
        for scheme in ("fp8", "int8"):
            mine = [row for row in own if (row.pattern, row.scheme) == (pattern, scheme) and row.route != row.rival]
            mine = [row for row in mine if GRAPHS in row.route] or mine
            if mine:
                dense = dense_of(own, mine)
                speeds = [next((_kernels_first(row, dense) for row in mine if (row.what, row.m) == at), NOTHING) for at in SHOWN]
                size = mine[0].gigabytes / next(iter(dense.values())).gigabytes
                lines.append([f"{pattern} {scheme}", *losses(cells, pattern, scheme), f"{size:.2f}", *speeds])
    return lines


def losses(cells: Cells, pattern: str, scheme: str) -> list[str]:
    """Points on four tasks and perplexity, against dense bf16, by `auto`; where the scheme was not run those of bf16, which are named."""
    found = cells.get(("auto", pattern, scheme), {}) or cells.get(("auto", pattern, "bf16"), {})
    named = "" if ("auto", pattern, scheme) in cells else " in bf16"
    tasks, text = found.get(("mean", "mean_of_4")), found.get(("text", "perplexity"))
    dense = cells.get(("dense", "-", "bf16"), {}).get(("text", "perplexity"))
    points = f"{100 * float(tasks['difference']):+.1f} ± {100 * float(tasks['difference_stderr']):.1f}{named}" if tasks else NOTHING
    return [points, f"{100 * (float(text['value']) / float(dense['value']) - 1):+.1f} %{named}" if text and dense else NOTHING]


def serve_rows(card: str) -> list[Row]:
    """Every row, those that a later run has replaced left out."""
    every = rows.read(RESULTS / f"{card}_serve.csv")
    kept = [row for row in rows.newest(every) if row.route != row.rival]
    return [*kept, *(row for row in every if row.route == row.rival)]


def _kind(row: Row) -> tuple[str, str, str]:
    return row.model, row.pattern, row.scheme


def dense_of(own: Sequence[Row], mine: Sequence[Row]) -> Dense:
    """Dense engines of one kind of model with the settings that these rows' rivals had."""
    found = [row for row in own if row.route == mine[0].rival and _kind(row) == _kind(mine[0])]
    return {(row.what, row.m, row.commit): row for row in found}


def over(row: Row, dense: Dense) -> float:
    """The dense engine's time in the same run over this one's."""
    return dense[row.what, row.m, row.commit].us / row.us


def served(card: str, phase: str) -> str:
    """Throughput over vLLM's own dense model's, and in brackets the time of its kernels over ours."""
    own, lines = serve_rows(card), []
    tokens = sorted({row.m for row in own if row.what == phase})
    models = list(dict.fromkeys(row.model for row in own))
    engines = dict.fromkeys((_kind(row), row.route) for row in own if row.route != row.rival)
    for kind, route in sorted(engines, key=lambda each: (models.index(each[0][0]), ORDER.index(each[0][1]), each[0][2], each[1])):
        mine = [row for row in own if _kind(row) == kind and row.route == route]
        dense = dense_of(own, mine)
        same = ", nothing ours" if all(row.error == 0 for row in mine) else ""
        cells = [next((_cell(row, dense) for row in mine if (row.what, row.m) == (phase, m)), "") for m in tokens]
        if any(cells):
            size = [f"{mine[0].gigabytes:.2f} against {next(iter(dense.values())).gigabytes:.2f}"] if phase == "prefill" else []
            model, pattern, scheme = kind
            lines.append([f"{model}, {pattern} {scheme}{route.removeprefix('packed: as the plan has it')}{same}", *cells, *size])
    heads = ["prefill" if phase == "prefill" else "decoding", *map(str, tokens)]
    return markdown([*heads, *(["GB of weights"] if phase == "prefill" else [])], lines)


def _by_kernels(row: Row, dense: Dense) -> float | None:
    """The dense engine's kernels' time over this one's, where both were measured."""
    theirs = dense[row.what, row.m, row.commit].kernels_us
    return theirs / row.kernels_us if theirs and row.kernels_us else None


def _cell(row: Row, dense: Dense) -> str:
    """By the wall's time, and in brackets by kernels'."""
    kernels = _by_kernels(row, dense)
    return f"{over(row, dense):.2f}×" + (f" ({kernels:.2f})" if kernels else "")


def _kernels_first(row: Row, dense: Dense) -> str:
    """By kernels' time, which a busy host does not change, and in brackets by the wall's."""
    kernels = _by_kernels(row, dense)
    return (f"{kernels:.2f}× " if kernels else "") + f"(wall {over(row, dense):.2f}×)"


def measured(card: str) -> str:
    """Speed-ups of a model's layers summed, and in brackets efficiency against 2:4."""
    own = rows.newest(rows.read(RESULTS / f"{card}_kernel.csv"))
    lines, tokens = [], sorted({row.m for row in own if row.what == "linear"})
    for name, model in MODELS.items():
        found = [curve for curve in curves(own, list(model.linears.values())) if curve.speedups()]
        shares = efficiencies(found)
        for curve in found:
            gains, share = curve.speedups(), shares.get((curve.scheme, curve.pattern), {})
            cells = [f"{gains[m]:.2f}×" + (f" ({100 * share[m]:.0f} %)" if m in share else "") if m in gains else "" for m in tokens]
            lines.append([f"{name}, {curve.pattern} {curve.scheme}", f"{curve.bound:.2f}×", *cells])
    return markdown(["whole linears", "bound", *(f"M = {m}" for m in tokens)], lines)


def written(text: str, where: str) -> str:
    """The document with its tables made anew."""

    def replaced(match: re.Match[str]) -> str:
        name = match["name"] or ""
        if (match["last"] or "") != name:
            sys.exit(f"{where}: table {name!r} ends as {match['last']!r}")
        try:
            table = table_named(name)
        except KeyError:
            sys.exit(f"{where}: no table is called {name!r}; benchmarks/document_tables.py says which there are")
        label = f"{name} " if name else ""
        return f"<!-- tables: {label}begin -->\n\n{table}\n<!-- tables: {label}end -->"

    made, count = MARKED.subn(replaced, text)
    if count != len(re.findall(r"<!-- tables: .*begin -->", text)):
        sys.exit(f"{where}: a table begins and does not end")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    asked = parser.parse_args()
    stale = []
    made = {path: written(path.read_text(encoding="utf-8"), path.name) for path in documents()} | {SUMMARY: accuracy.written(STUDY)}
    for path, text in made.items():
        if path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not asked.check:
                path.write_text(text, encoding="utf-8")
    if stale and asked.check:
        sys.exit(f"not what the data say: {', '.join(stale)}; run make tables")
    print(f"{len(stale)} written: {', '.join(stale)}" if stale else "every table is what the data say")


if __name__ == "__main__":
    main()
