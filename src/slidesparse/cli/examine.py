"""inspect, verify, doctor: the commands that look and tell."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..pattern import Pattern
from . import screen, tuning
from .produce import Json, Model, Trust, _pattern, model_folder

_SHOWN = 12


def inspect(
    model: Model,
    quick: Annotated[bool, typer.Option("--quick", help="Headers only: do not read the weights.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer instead of one line per kind.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Show instead who runs which layer, and from how many tokens it pays.")] = False,
    plan_file: Annotated[Path | None, typer.Option(help="Show this plan instead of the one in force.", show_default=False)] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="With a plan: layers as vLLM holds them, and its kernels.")] = False,
    json: Json = False,
) -> None:
    """Pattern, scheme, per-layer shapes, bytes against dense, and what violates the pattern."""
    from ..checkpoint import inspect as api_inspect

    if plan or plan_file is not None:
        if vllm:
            tuning.offer_vllm()
        _inspect_plan(model, plan_file, vllm, json)
        return
    if vllm:
        raise typer.BadParameter("--vllm goes with --plan or --plan-file")
    with screen.progress("inspecting") as progress:
        found = api_inspect(model, scan=not quick, progress=progress)
    if json:
        screen.print_json(found)
    else:
        screen.out.print(f"[bold]{escape(str(found.path))}[/]  {escape(found.architecture)}")
        pattern = found.pattern or ("not scanned" if quick else "none shared by all layers")
        screen.out.print(f"{found.kind}, pattern {pattern}, {found.scheme}, {screen.size(found.nbytes)} in all")
        if found.dense_layer_bytes:
            ratio = found.layer_bytes / found.dense_layer_bytes
            screen.out.print(f"{len(found.layers)} linear layers: {screen.size(found.layer_bytes)}, {ratio:.3f} of dense in the same type")
        screen.out.print(_layer_table(found.layers, layers))
        for row in found.problems[:_SHOWN]:
            screen.out.print(f"[red]violated[/] {escape(row.name)}: {escape(row.problem or '')}")
    if found.problems:
        raise typer.Exit(3)


def _inspect_plan(model: Path, file: Path | None, vllm: bool, json: bool) -> None:
    from ..gemm import Plan, active_plan
    from ..integrations.engine import shapes

    if file is None:
        active = active_plan()
        plan, sources = active.plan, active.sources
    else:
        plan, sources = Plan.load(file), (str(file),)
    found = shapes.checkpoint_layers(model)
    layers = shapes.served_layers(found) if vllm else tuning.distinct(found, merged=True)
    swiglu = shapes.layers_behind_swiglu(model, found) if vllm else frozenset()
    if json:
        screen.print_json({"sources": sources, "layers": [] if plan is None else tuning.plan_rows(plan, layers, vllm, swiglu)})
        return
    for source in sources:
        screen.say(source)
    if plan is None:
        screen.say("nothing measured is in force here: dense runs; name a plan with --plan-file, or run `slidesparse tune` on a GPU")
    else:
        screen.say(f"measured on {plan.machine.gpu}, {plan.date}")
        tuning.print_plan(plan, layers, vllm, swiglu)


def _layer_table(rows: list[Any], every: bool) -> Table:
    table = screen.table("layer", ">N", ">K", "type", "pattern", ">bytes", ">of dense", overflow="fold")
    for column in table.columns[1:]:
        column.no_wrap = True
    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        kind = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
        key = row.name if every else kind
        kinds.setdefault((key, row.n, row.k, row.scheme, row.pattern), []).append(row)
    for (name, n, k, scheme, pattern), same in kinds.items():
        nbytes, dense = sum(row.nbytes for row in same), sum(row.dense_nbytes for row in same)
        label = name if every or len(same) == 1 else f"{name} ×{len(same)}"
        table.add_row(escape(label), str(n), str(k), scheme, pattern or "–", screen.size(nbytes), f"{nbytes / max(dense, 1):.3f}")
    return table


def verify(
    model: Model,
    against: Annotated[
        Path | None, typer.Option(help="Masked or original checkpoint whose weights must be these under the mask.", callback=model_folder)
    ] = None,
    pattern: Annotated[
        Pattern | None,
        typer.Option("--pattern", "-p", parser=_pattern, metavar="KEPT:GROUP", help="Ask for this one, whatever the checkpoint claims."),
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Every group obeys the pattern, restore and pack are inverse, W·x == slide(W)·lift(x); exit code 3 when not."""
    from ..integrations.conversion import verify as api_verify

    with screen.stdout_on_stderr(), screen.progress("verifying") as progress:
        report = api_verify(model, against, pattern=pattern, progress=progress, trust_remote_code=trust_remote_code)
    if json:
        screen.print_json(dataclasses.asdict(report) | {"ok": report.ok})
    else:
        good = sum(layer.ok for layer in report.layers)
        rows = sum(layer.rows for layer in report.layers)
        mark = "[green]ok[/]" if report.ok else "[red]FAILED[/]"
        same = "" if against is None else f", and are those of {escape(str(against))}"
        summary = f"{good} of {len(report.layers)} layers ({rows} rows) obey, restore bitwise and slide exactly{same}"
        screen.out.print(f"{mark}  {escape(str(report.path))}: {summary}")
        for layer in [layer for layer in report.layers if not layer.ok][:_SHOWN]:
            screen.out.print(f"  [red]{escape(layer.name)}[/]: {escape(layer.reason)}")
        if (more := len(report.layers) - good - _SHOWN) > 0:
            screen.out.print(f"  … and {more} more")
        for told in report.contradictions[:_SHOWN]:
            screen.out.print(f"  {escape(told)}")
        for name in report.other_tensors[:_SHOWN]:
            screen.out.print(f"  [red]{escape(name)}[/] differs from {escape(str(against))}")
        negative, masked = (sum(getattr(layer, name) for layer in report.layers) for name in ("negative_zeros", "masked_away"))
        if negative:
            screen.out.print(f"  {negative} weights are -0.0; they count as zeros and are stored as +0.0")
        if masked:
            screen.out.print(f"  the mask removes {masked} non-zero weights of {escape(str(against))}")
    if not report.ok:
        raise typer.Exit(3)


def doctor(json: Json = False) -> None:
    """What this machine can run, and why not."""
    from ..doctor import diagnose

    findings = diagnose()
    if json:
        screen.print_json([dataclasses.asdict(finding) for finding in findings])
        return
    table = screen.table("", "what", "found", "means")
    for finding in findings:
        table.add_row("[green]✓[/]" if finding.ok else "[yellow]–[/]", finding.what, escape(finding.found), escape(finding.means))
    screen.out.print(table)
