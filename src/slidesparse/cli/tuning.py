"""tune, and the tables of a plan that inspect shows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..bench.models import Shape, shape_of
from ..pattern import Pattern
from . import screen
from .produce import Json, _pattern, model_folder

if TYPE_CHECKING:
    from ..gemm import Plan
    from ..gemm.tune import LinearShape
    from ..integrations.engine.policy import Decision


class Tuned(StrEnum):
    """Schemes whose linears are measured."""

    int8 = "int8"
    fp8 = "fp8"
    bf16 = "bf16"
    fp16 = "fp16"


def tune(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint whose linear layers are measured.", callback=model_folder, show_default=False)
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="NxK of one more layer; may be repeated.", show_default=False)] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Also q, k, v and gate, up as one layer each, as serving engines run.")] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="Layers as vLLM holds them, its own kernels among the dense routes.")] = False,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="With --vllm: layers as each of so many ranks holds them.")] = 1,
    pattern: Annotated[
        Pattern | None, typer.Option(parser=_pattern, metavar="KEPT:GROUP", help="For layers that are dense yet.", show_default="6:8")
    ] = None,
    scheme: Annotated[Tuned | None, typer.Option(help="For layers that are dense yet.", show_default="int8")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens, as 16,256,4096.", show_default="1 … 65536 for 6:8, else six of them")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Plan to write or to continue.", show_default="your plan for this GPU")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the plan has already, too.")] = False,
    json: Json = False,
) -> None:
    """Measure which route runs each layer fastest on this GPU. Goes on where it was interrupted."""
    import torch

    from ..format import scheme_named
    from ..gemm import user_plan_path
    from ..gemm.tune import LinearShape
    from ..gemm.tune import tune as api_tune
    from ..integrations.engine import shapes

    if tensor_parallel > 1 and not vllm:
        raise typer.BadParameter("--tensor-parallel goes with --vllm")
    if model is not None and shape_of(str(model)) and not model.exists():
        raise typer.BadParameter(f"{model} is a layer's shape: give --shape {model}")
    name = None if scheme is None else scheme.value
    kind = scheme_named(name or "int8")
    layers = [LinearShape(n, k, pattern or Pattern(6, 8), kind) for n, k in shapes_named(shape or [])]
    swiglu: frozenset[LinearShape] = frozenset()
    if model is not None:
        found = shapes.checkpoint_layers(model, pattern, name)
        layers = [*(shapes.served_layers(found, tensor_parallel) if vllm else distinct(found, merged)), *layers]
        swiglu = shapes.layers_behind_swiglu(model, found, tensor_parallel) if vllm else swiglu
    if not layers:
        raise typer.BadParameter("nothing to measure: name a model or give --shape NxK")
    ms = None if tokens is None else _tokens(tokens)
    if not torch.cuda.is_available():
        raise ValueError("tune measures on a GPU, and torch finds none here: see `slidesparse doctor`")
    if vllm:
        offer_vllm()
    with screen.progress("tuning", count=True) as progress, screen.stoppable():
        plan = api_tune(layers, out, ms=ms, again=again, progress=progress)
    path = out or user_plan_path()
    if json:
        screen.print_json({"plan": path, "layers": plan_rows(plan, layers, vllm, swiglu)})
        return
    print_plan(plan, layers, vllm, swiglu)
    screen.say(f"plan written to {path}")


def offer_vllm() -> None:
    """Let vLLM's dense kernels take part.

    Raises:
        UnsupportedError: vLLM is not installed.
    """
    from ..errors import UnsupportedError

    try:
        from ..integrations.vllm import register
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"--vllm needs vLLM ({error}): pip install 'slidesparse[vllm]'") from error
    register()


def print_plan(plan: Plan, layers: list[LinearShape], vllm: bool = False, swiglu: Collection[LinearShape] = ()) -> None:
    """A table per layer shape: who runs how many tokens, against the best dense route; see `plan_rows`."""
    from ..gemm.explain import elsewhere, summary

    for layer in dict.fromkeys(layers):
        decision = _decided(plan, layer, swiglu) if vllm else None
        told = summary(plan, layer.problem) if decision is None else _served(decision)
        screen.out.print(f"[bold]{layer.n} × {layer.k}[/]  {layer.pattern} {layer.scheme.name}: {escape(told)}")
        rows = plan_rows(plan, [layer], vllm, swiglu)
        if not rows:
            continue
        fast, lean = ("fast runs", ">µs", ">× dense"), ("lean runs", ">µs", ">× dense")
        table = screen.table(">M", "best dense", ">µs", *fast, "best other", ">µs", *lean)
        for row in rows:
            cells = [str(row["m"])]
            for part in ("dense", "fast", "other", "lean"):
                cells += [escape(row[part] or "-"), _time(row[f"{part}_us"])]
                if part in ("fast", "lean"):
                    cells.append("-" if row[f"{part}_us"] is None else f"{row['dense_us'] / row[f'{part}_us']:.2f}×")
            table.add_row(*cells)
        screen.out.print(table)
        if names := ", ".join(sorted(map(str, elsewhere(plan, layer.problem)))):
            screen.out.print(f"also timed, but not to be had here without --vllm: {escape(names)}", style="dim")


def _served(decision: Decision) -> str:
    """How vLLM would run a layer with its default settings."""
    from ..integrations.vllm_facts import STEP

    told = f"vLLM's own kernels, {decision.why}" if decision.why else f"ours, keeps {' and '.join(decision.layouts)}"
    return f"in vLLM, with up to {STEP} tokens in a step: {told}"


def plan_rows(plan: Plan, layers: list[LinearShape], vllm: bool = False, swiglu: Collection[LinearShape] = ()) -> list[dict[str, Any]]:
    """What `print_plan` shows, one entry per layer shape and number of tokens, see `gemm.explain.plan_rows`.

    With ``vllm`` also ``given_back``: why vLLM's server with its default settings would run the layer on its own kernels, None if it would
    not. In front of ``swiglu`` layers stands SwiGLU.
    """
    from ..gemm import explain

    rows = []
    for layer in dict.fromkeys(layers):
        decision = _decided(plan, layer, swiglu) if vllm else None
        given_back = {} if decision is None else {"given_back": decision.why}
        rows += [row | given_back for row in explain.plan_rows(plan, layer.problem, fast=None if decision is None else decision.plan)]
    return rows


def _decided(plan: Plan, layer: LinearShape, swiglu: Collection[LinearShape]) -> Decision:
    """What vLLM's server with its default settings decides."""
    from ..gemm.explain import elsewhere
    from ..integrations.engine.policy import decide
    from ..integrations.vllm_facts import STEP, facts

    known = facts(layer.problem, most=STEP, swiglu=layer in swiglu)
    return decide(layer.problem, plan, known, elsewhere(plan, layer.problem))


def distinct(layers: dict[str, LinearShape], merged: bool) -> list[LinearShape]:
    """The distinct layers, and if asked those that serving engines merge."""
    from ..integrations.engine.shapes import merged_layers

    return list(dict.fromkeys([*layers.values(), *(merged_layers(layers).values() if merged else ())]))


def shapes_named(texts: Iterable[str]) -> list[Shape]:
    """What ``--shape`` names."""
    shapes = []
    for text in texts:
        shape = shape_of(text)
        if shape is None:
            raise typer.BadParameter(f"--shape {text!r}: write NxK, for example 4096x14336")
        shapes.append(shape)
    return shapes


def _tokens(text: str, option: str = "--tokens") -> list[int]:
    try:
        ms = [int(part) for part in text.split(",")]
    except ValueError:
        ms = [0]
    if any(m < 1 for m in ms):
        raise typer.BadParameter(f"{option} {text!r}: write positive numbers, for example 16,256,4096")
    return sorted(set(ms))


def _time(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"
