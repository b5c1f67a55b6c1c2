"""bench kernel, lift, audit, serve: benchmarks that write rows of one schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import screen
from .produce import Json
from .tuning import _tokens, shapes_named

if TYPE_CHECKING:
    from ..bench.rows import Row, Rows
    from ..bench.speedups import Curve

app = typer.Typer(
    name="bench",
    help="Measure kernels, passes, plans and engines on this machine. Rows of one schema go to a CSV file; a stopped run goes on.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


class Engine(StrEnum):
    """Who runs models."""

    vllm = "vllm"
    transformers = "transformers"


Commit = Annotated[str | None, typer.Option(help="What the rows call this code.", show_default="the checkout's commit, or the version")]
Shapes = Annotated[list[str] | None, typer.Option("--shape", help="NxK of one more layer; may be repeated.", show_default=False)]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Layers of this model of the list, or square; may be repeated.", show_default="all, and square"),
]
Rivals = Annotated[bool, typer.Option("--rivals/--no-rivals", help="Time kernels of vLLM, torchao and torch where they can be imported.")]
_FOLDER = Path("slidesparse-bench")
_AS_PLANNED = "as the plan has it={}"
_TITLES = {
    "linear": "whole linears: times as fast as the fastest dense one of the scheme, layers summed",
    "product": "products alone, with scales where the product applies them",
}
_PATTERNS = "2:4,4:6,6:8,8:10,10:12,12:14,14:16,control"


@app.command()
def kernel(
    out: Annotated[Path, typer.Option(help="Rows to write or to continue.")] = _FOLDER / "kernel.csv",
    model: Models = None,
    shape: Shapes = None,
    schemes: Annotated[str, typer.Option(help="Schemes, as int8,fp8,bf16,fp16,fp4.")] = "int8,fp8,bf16,fp16,fp4",
    patterns: Annotated[str, typer.Option(help="Patterns; control is 2:4 of twice the width, γ = 2.")] = _PATTERNS,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = "1,16,64,256,1024,4096,16384",
    rivals: Rivals = True,
    every: Annotated[bool, typer.Option("--every", help="A row for every variant of a kernel, not for the fastest alone.")] = False,
    minutes: screen.Minutes = None,
    commit: Commit = None,
    json: Json = False,
) -> None:
    """Whole linears and products alone, every kernel against the fastest dense one, held against the oracle in the same run.

    All defaults together are some thousand cells of about a second each on a GPU: name what you want to know.
    """
    from ..bench import kernel as bench
    from ..bench.rivals import offer
    from ..bench.speedups import curves

    asked = _shapes(model, shape)
    every_shape = [each for shapes in asked.values() for each in shapes]
    cells = bench.works(every_shape, _listed(schemes, bench.SCHEME_NAMES), _listed(patterns, None), _tokens(tokens))
    table, here = _opened(out, commit)
    before = len(table.rows)
    with screen.measuring("measuring", minutes) as measured:
        if not table.has(replace(here, bench="kernel")):
            for row in [bench.roof(here), *(offer(replace(here, bench="kernel", what="linear")) if rivals else ())]:
                table.add(row)
        elif rivals:
            offer(here)
        bench.run(cells, table, here, every=every, progress=measured.progress)
    if json:
        screen.print_json({"out": out, "rows": [vars(row) for row in table.rows]})
        return measured.end()
    wanted = {work.row(here).cell for work in cells}
    rows = [row for row in table.rows if row.cell in wanted]
    for name, shapes in asked.items():
        for what in ("linear", "product"):
            _print_curves(curves(rows, shapes, what), f"{name}, {_TITLES[what]}")
    _told(table, before, rows)
    measured.end()


@app.command()
def lift(
    out: Annotated[Path, typer.Option(help="Rows to write or to continue.")] = _FOLDER / "lift.csv",
    schemes: Annotated[str, typer.Option(help="Schemes of the outputs.")] = "int8,fp8,bf16",
    patterns: Annotated[str, typer.Option(help="Patterns.")] = "2:4,4:6,6:8,8:10,14:16",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = "64,1024,4096,16384",
    widths: Annotated[str, typer.Option(help="Widths K.")] = "3584,18944",
    minutes: screen.Minutes = None,
    commit: Commit = None,
    json: Json = False,
) -> None:
    """The passes over activations: quantise, quantise + lift, lift, alone and fused, against the time that their bytes take."""
    from ..bench import lift as bench

    table, here = _opened(out, commit)
    before = len(table.rows)
    names, kinds = _listed(schemes, bench.SCHEME_NAMES), _listed(patterns, None)
    with screen.measuring("measuring", minutes) as measured:
        asked = {"tokens": _tokens(tokens), "widths": _tokens(widths, "--widths")}
        bench.run(table, here, schemes=names, patterns=kinds, **asked, progress=measured.progress)
    if json:
        screen.print_json({"out": out, "rows": [vars(row) for row in table.rows]})
        return measured.end()
    rows = [row for row in table.rows if row.bench == "lift"]
    shown = screen.table("scheme", "pass", "pattern", ">K", ">M", ">µs", ">of the floor")
    for row in rows:
        if row.us is not None:
            share = "-" if row.ratio is None else f"{row.ratio:.2f}"
            shown.add_row(row.scheme, row.what, row.route, str(row.k), str(row.m), f"{row.us:.1f}", share)
    screen.out.print(shown)
    _told(table, before, rows)
    measured.end()


@app.command()
def audit(
    out: Annotated[Path, typer.Option(help="Rows to write or to continue.")] = _FOLDER / "audit.csv",
    plan_file: Annotated[Path | None, typer.Option(help="This plan instead of the one in force.", show_default=False)] = None,
    model: Models = None,
    shape: Shapes = None,
    schemes: Annotated[str, typer.Option(help="Schemes of the plan's layers.")] = "int8,fp8,bf16,fp16",
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens.", show_default="all of the plan")] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="Only cells in which the plan does not run dense weights.")] = False,
    rivals: Rivals = True,
    minutes: screen.Minutes = None,
    commit: Commit = None,
    json: Json = False,
) -> None:
    """Is the plan in force anywhere slower than dense on this card? Exit code 3 if so.

    What the plan runs is timed beside the fastest dense kernels, in the same run.
    """
    from ..bench import audit as bench
    from ..bench.rivals import offer
    from ..gemm import Plan, active_plan

    asked = {each for shapes in _shapes(model, shape).values() for each in shapes} if model or shape else set()
    table, here = _opened(out, commit)
    if rivals:
        offer(here)
    plan = Plan.load(plan_file) if plan_file else active_plan().plan
    if plan is None:
        raise ValueError("there is no plan in force here: run `slidesparse tune` on a GPU, or give --plan-file")
    names, ms = _listed(schemes, ("int8", "fp8", "bf16", "fp16")), _tokens(tokens) if tokens else ()
    before, tasks = len(table.rows), bench.tasks(plan, here, shapes=asked, schemes=names, tokens=ms, sparse_only=sparse)
    with screen.measuring("measuring", minutes) as measured:
        bench.run(plan, tasks, table, measured.progress)
    rows = bench.standing(tasks, table)
    lost = bench.losing(rows)
    if json:
        screen.print_json({"out": out, "rows": [vars(row) for row in rows], "losing": [vars(row) for row in lost]})
    else:
        timed = [row for row in rows if row.ratio is not None]
        screen.say(f"{len(timed)} cells timed; in {len(lost)} the plan's route takes over 2 % longer than the fastest dense one")
        shown = screen.table("N × K", "pattern", "scheme", ">M", "runs", ">µs", "fastest dense", ">dense ÷ runs")
        for row in sorted(lost, key=lambda each: each.ratio or 0):
            size, ratio = f"{row.n} × {row.k}", f"{row.ratio:.2f}×"
            shown.add_row(size, row.pattern, row.scheme, str(row.m), row.route, f"{row.us:.1f}", row.rival, ratio)
        if lost:
            screen.out.print(shown)
        _told(table, before, rows)
    measured.end()
    if lost:
        raise typer.Exit(3)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL|DIR", help="A model of the list, with random weights, or a folder of dense ones.")],
    work: Annotated[Path, typer.Argument(metavar="WORKDIR", help="Where checkpoints and logs go; what is there is used.")],
    engine: Annotated[Engine, typer.Option(help="Who runs the model.")] = Engine.vllm,
    out: Annotated[Path, typer.Option(help="Rows to write or to continue.")] = _FOLDER / "serve.csv",
    schemes: Annotated[str, typer.Option(help="Schemes.")] = "fp8",
    patterns: Annotated[str, typer.Option(help="Patterns.")] = "6:8",
    prefill: Annotated[str, typer.Option(help="Tokens of prompts in one step.")] = "512,1024,2048,4096,8192,16384,32768",
    decode: Annotated[str, typer.Option(help="Requests of a decoding batch.")] = "1,16,64,128,256,512",
    packed: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", help="A packed engine with these settings; may be repeated.", show_default=_AS_PLANNED),
    ] = None,
    graphs: Annotated[str | None, typer.Option(help="Numbers of tokens of vLLM's CUDA graphs.", show_default="its own")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Without compilation and CUDA graphs.")] = False,
    minutes: screen.Minutes = None,
    commit: Commit = None,
    json: Json = False,
) -> None:
    """A packed model against its dense one in vLLM or transformers: prefill and decoding, kernels' time, memory, energy a token.

    In vLLM both hold the same masked weights and take turns on one GPU; in transformers dense is bfloat16. Exit code 1 if no engine ran.
    """
    from ..bench import serve as bench

    names, kinds = _listed(schemes, ("int8", "fp8", "bf16", "fp16")), _listed(patterns, None)
    settings, captured = _settings(packed), _tokens(graphs) if graphs else ()
    with screen.options_at_fault():
        asked = bench.Asked(
            engine.value, _served_model(model), work, names, kinds, _tokens(prefill), _tokens(decode), settings, captured, eager
        )
    if engine == Engine.vllm and (lacking := _lacks_vllm()):
        raise ValueError(f"bench serve measures vLLM, and {lacking}")
    table, here = _opened(out, commit)
    before = len(table.rows)
    with screen.measuring("measuring", minutes) as measured:
        bench.run(asked, table, here, measured.progress)
    rows, new = [row for row in table.rows if row.bench == "serve"], table.rows[before:]
    if json:
        screen.print_json({"out": out, "rows": [vars(row) for row in rows]})
    else:
        _print_served(rows)
        _told(table, before, rows)
    measured.end()
    if new and all(row.us is None for row in new):
        raise typer.Exit(1)


def _print_served(rows: Sequence[Row]) -> None:
    numbers_of = (">ms", ">kernels ms", ">tokens/s", ">× dense", ">GB", ">J a token")
    shown = screen.table("model", "scheme", "pattern", "phase", ">tokens", "who", *numbers_of)
    for row in rows:
        if row.us is not None:
            numbers = (row.us / 1e3, None if row.kernels_us is None else row.kernels_us / 1e3, row.m / row.us * 1e6)
            cells = ["-" if value is None else f"{value:,.2f}" for value in (*numbers, row.ratio, row.gigabytes, row.joules)]
            shown.add_row(row.model, row.scheme, row.pattern, row.what, str(row.m), row.route, *cells)
    screen.out.print(shown)


def _lacks_vllm() -> str | None:
    """What its engines lack here; checkpoints of many gigabytes would be written before they say so."""
    from importlib.util import find_spec

    import torch

    if find_spec("vllm") is None:
        return "vllm is not installed: pip install 'slidesparse[vllm]', or give --engine transformers"
    return None if torch.cuda.is_available() else "torch finds no GPU here: see `slidesparse doctor`, or give --engine transformers"


def _served_model(model: str) -> str:
    """A model that can be served: of the list, or a folder."""
    from ..bench.serve import SERVED

    if model not in SERVED and not (Path(model) / "config.json").is_file():
        raise typer.BadParameter(f"{model!r} is no folder with config.json, and none of {', '.join(SERVED)}")
    return model


def _settings(packed: Sequence[str] | None) -> dict[str, dict[str, object]]:
    import json

    found: dict[str, dict[str, object]] = {}
    for text in packed or [_AS_PLANNED]:
        name, _, settings = text.partition("=")
        try:
            found[name] = dict(json.loads(settings))
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(f'--packed {text!r}: write NAME=JSON, for example lean={{"memory": "lean"}}') from error
    return found


def _opened(out: Path, commit: str | None) -> tuple[Rows, Row]:
    from ..bench.rows import Rows, here

    return Rows(out), here(commit)


def _shapes(models: Sequence[str] | None, shapes: Sequence[str] | None) -> dict[str, list[tuple[int, int]]]:
    """The shapes asked for, by model; those given by hand are each their own."""
    from ..bench.models import MODELS, shapes_of

    names = models if models else [] if shapes else [*MODELS, "square"]
    with screen.options_at_fault():
        found = {name: shapes_of(name) for name in names}
    return found | {f"{n} × {k}": [(n, k)] for n, k in shapes_named(shapes or ())}


def _listed(text: str, known: Sequence[str] | None) -> list[str]:
    """The names of a list, each of which must be known, or else be a pattern."""
    from ..bench.kernel import CONTROL
    from ..pattern import Pattern

    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    with screen.options_at_fault():
        for name in names:
            if known is not None and name not in known:
                raise ValueError(f"{name!r}: choose from {', '.join(known)}")
            if known is None and name != CONTROL:
                Pattern.parse(name)
    return names


def _print_curves(found: Sequence[Curve], title: str) -> None:
    from ..bench.speedups import CAVEAT, FORMULA, efficiencies

    kept = [curve for curve in found if curve.speedups()]
    if not kept:
        return
    tokens = sorted({m for curve in kept for m in curve.speedups()})
    shares = efficiencies(kept)
    screen.out.print(f"\n[bold]{title}[/]; behind it efficiency against 2:4")
    table = screen.table("scheme", "pattern", ">bound", *(f">M = {m}" for m in tokens))
    for curve in kept:
        gains, share = curve.speedups(), shares.get((curve.scheme, curve.pattern), {})
        cells: list[str] = [_gain(gains.get(m), share.get(m)) for m in tokens]
        table.add_row(curve.scheme, curve.pattern, f"{curve.bound:.2f}×", *cells)
    screen.out.print(table)
    screen.say(f"{FORMULA}. {CAVEAT}")


def _gain(gain: float | None, share: float | None) -> str:
    if gain is None:
        return "-"
    return f"{gain:.2f}×" + ("" if share is None else f" ({100 * share:.0f} %)")


def _told(table: Rows, before: int, rows: Sequence[Row]) -> None:
    """What was written, and what did not run, by reason."""
    reasons: dict[str, int] = {}
    for row in rows:
        if row.status != "ok":
            reasons[f"{row.status}: {row.why}"] = reasons.get(f"{row.status}: {row.why}", 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1])[:8]:
        screen.out.print(f"{count} rows {reason}", style="dim", markup=False)
    screen.say(f"{len(table.rows) - before} new rows, {len(table.rows)} in all, in {table.path}")
