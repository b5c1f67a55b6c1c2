"""tune, and the tables of a plan that inspect shows."""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..pattern import Pattern
from . import screen
from .produce import Json, _pattern

if TYPE_CHECKING:
    from ..gemm import Plan
    from ..gemm.tuning import Layer

_SHAPE = re.compile(r"(\d+)[x×,](\d+)")


class Tuned(StrEnum):
    """Schemes whose linears are measured."""

    int8 = "int8"
    fp8 = "fp8"
    bf16 = "bf16"
    fp16 = "fp16"


def tune(
    model: Annotated[Path | None, typer.Argument(help="Checkpoint whose linear layers are measured.", show_default=False)] = None,
    shape: Annotated[list[str] | None, typer.Option(help="NxK of one more layer; may be repeated.", show_default=False)] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Also q, k, v and gate, up as one layer each, as serving engines run.")] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="Layers as vLLM holds them, its own kernels among the dense routes.")] = False,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="With --vllm: layers as each of so many ranks holds them.")] = 1,
    pattern: Annotated[
        Pattern | None, typer.Option(parser=_pattern, metavar="KEPT:GROUP", help="For layers that are dense yet.", show_default="6:8")
    ] = None,
    scheme: Annotated[Tuned | None, typer.Option(help="For layers that are dense yet.", show_default="int8")] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, as 16,256,4096.", show_default="1 … 65536")] = None,
    out: Annotated[Path | None, typer.Option(help="Plan to write or to continue.", show_default="your plan for this GPU")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the plan has already, too.")] = False,
    json: Json = False,
) -> None:
    """Measure which route runs each layer fastest on this GPU; dense wins every tie. Goes on where it was interrupted."""
    import torch

    from ..gemm import user_plan_path
    from ..gemm.tuning import tune as api_tune

    if tensor_parallel > 1 and not vllm:
        raise typer.BadParameter("--tensor-parallel goes with --vllm")
    name = None if scheme is None else scheme.value
    layers, swiglu = _shapes(shape or [], pattern, name), frozenset()
    if model is not None:
        found = model_layers(model, pattern, name)
        layers = [*(served(found, tensor_parallel) if vllm else distinct(found, merged)), *layers]
        swiglu = behind_swiglu(model, found, tensor_parallel) if vllm else swiglu
    if not layers:
        raise typer.BadParameter("nothing to measure: name a model or give --shape NxK")
    ms = None if tokens is None else _tokens(tokens)
    if not torch.cuda.is_available():
        raise ValueError("tune measures on a GPU, and torch finds none here: see `slidesparse doctor`")
    if vllm:
        offer_vllm()
    with screen.progress("tuning", count=True) as progress:
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


def print_plan(plan: Plan, layers: list[Layer], vllm: bool = False, swiglu: Collection[Layer] = ()) -> None:
    """A table per layer shape: who runs how many tokens, against the best dense route; see `plan_rows`."""
    from ..gemm import key_of
    from ..gemm.handover import STEP

    for layer in dict.fromkeys(layers):
        key = key_of(layer.problem)
        elsewhere = _elsewhere(plan, layer)
        why, chooses = _served(plan, layer, swiglu) if vllm else (None, plan)
        first = None if why else chooses.pays_from(key, elsewhere, sums=vllm and layer.scheme.dynamic)
        verdict = "not measured: dense runs" if key not in plan.cells else "dense runs" if first is None else f"pays from M = {first}"
        screen.out.print(f"[bold]{layer.n} × {layer.k}[/]  {layer.pattern} {layer.scheme.name}: {verdict}")
        rows = plan_rows(plan, [layer], vllm, swiglu)
        if not rows:
            continue
        table = Table(box=None, header_style="bold")
        for name in ("M", "best dense", "µs", "fast runs", "µs", "× dense", "best other", "µs", "lean runs", "µs", "× dense"):
            table.add_column(name, justify="left" if name in ("best dense", "fast runs", "best other", "lean runs") else "right")
        for row in rows:
            cells = [str(row["m"])]
            for part in ("dense", "fast", "other", "lean"):
                cells += [escape(row[part] or "-"), _time(row[f"{part}_us"])]
                if part in ("fast", "lean"):
                    cells.append("-" if row[f"{part}_us"] is None else f"{row['dense_us'] / row[f'{part}_us']:.2f}×")
            table.add_row(*cells)
        screen.out.print(table)
        if elsewhere:
            names = escape(", ".join(sorted(elsewhere)))
            screen.out.print(f"also timed, but not to be had here without --vllm: {names}", style="dim")
        if vllm:
            told = _ours(layer, rows, swiglu) if why is None else f"its own kernels: {why}"
            screen.out.print(f"in vLLM, with up to {STEP} tokens in a step: {told}")


def _ours(layer: Layer, rows: list[dict], swiglu: Collection[Layer]) -> str:
    """How vLLM would run a layer of ours with its default settings."""
    from ..gemm.handover import STEP

    runs = [(row["fast"] or "dense").startswith("dense") for row in rows if row["m"] <= STEP]
    told = "ours, with SiLU in the pass that quantises" if layer in swiglu else "ours"
    if all(runs):
        return f"{told}, on dense kernels"
    return f"{told}, with a dense copy, too" if any(runs) else told


def _elsewhere(plan: Plan, layer: Layer) -> set[str]:
    """Routes of other libraries that the plan has timed and this process does not have."""
    from ..gemm import key_of
    from ..gemm.routes import is_known

    return {route for route in plan.routes(key_of(layer.problem)) if not is_known(route)}


def plan_rows(plan: Plan, layers: list[Layer], vllm: bool = False, swiglu: Collection[Layer] = ()) -> list[dict]:
    """What `print_plan` shows, one entry per layer shape and number of tokens; ``other`` is the best route that is not dense.

    Whole linears; with ``vllm`` 8-bit layers without token scales and bias, which its compiler fuses into what follows (of dense routes the
    whole linear where that is quicker), and ``given_back``: why vLLM's server with its default settings would run the layer on its own
    kernels, None if it would not, when ``fast`` is what it would run. In front of ``swiglu`` layers stands SwiGLU.
    """
    from ..gemm import key_of

    rows = []
    for layer in dict.fromkeys(layers):
        key, sums, elsewhere = key_of(layer.problem), vllm and layer.scheme.dynamic, _elsewhere(plan, layer)
        why, chooses = _served(plan, layer, swiglu) if vllm else (None, plan)
        for m, cell in plan.table(key, sums=sums).items():
            times = cell.times(sums)
            other = min(cell.others(sums=sums), key=lambda name: times[name].p50, default=None)
            runs = {"fast": chooses.route(key, m, "fast", elsewhere, sums=sums), "lean": plan.route(key, m, "lean", elsewhere, sums=sums)}
            picked = runs | {"other": other}
            row: dict[str, object] = {"n": layer.n, "k": layer.k, "pattern": str(layer.pattern), "scheme": layer.scheme.name, "m": m}
            if vllm:
                row["given_back"] = why
            for part, name in picked.items():
                row |= {part: name, f"{part}_us": None if name is None else times[name].p50}
            dense = cell.dense(elsewhere, sums=sums)
            if dense is not None:
                rows.append(row | {"dense": dense[0], "dense_us": dense[1].p50})
    return rows


def _served(plan: Plan, layer: Layer, swiglu: Collection[Layer]) -> tuple[str | None, Plan]:
    """Why vLLM's server with its default settings runs a layer on its own kernels, None if it does not, and the plan that chooses."""
    from ..gemm.handover import STEP, decide

    without = _elsewhere(plan, layer)
    why, ours = decide(plan, layer.problem, sums=layer.scheme.dynamic, without=without, most=STEP, swiglu=layer in swiglu)
    return why, ours or plan


def model_layers(model: Path, pattern: Pattern | None, scheme: str | None) -> dict[str, Layer]:
    """The linear layers of a checkpoint that plans know (not nvfp4), by name; pattern and scheme where it does not say."""
    from ..checkpoint import inspect as api_inspect
    from ..format import SCHEMES, scheme_named
    from ..gemm.tuning import Layer
    from ..pattern import Pattern

    found: dict[str, Layer] = {}
    for layer in api_inspect(model, scan=False).layers:
        stored = layer.form == "packed"
        if stored and layer.scheme not in list(Tuned):
            continue
        told = layer.scheme in SCHEMES and (stored or (scheme is None and SCHEMES[layer.scheme].dynamic))
        own = layer.scheme if told else scheme or "int8"
        text = layer.pattern if stored and layer.pattern else str(pattern or layer.pattern or "6:8")
        found[layer.name] = Layer(layer.n, layer.k, Pattern.parse(text), scheme_named(own))
    return found


def distinct(layers: dict[str, Layer], merged: bool) -> list[Layer]:
    """The distinct layers, and if asked those that serving engines merge."""
    from ..gemm.tuning import merged_layers

    return list(dict.fromkeys([*layers.values(), *(merged_layers(layers).values() if merged else ())]))


def served(layers: dict[str, Layer], ranks: int) -> list[Layer]:
    """The distinct layers that each of vLLM's ranks holds."""
    from ..gemm.tuning import merged_layers, rank_layers

    return rank_layers(merged_layers(layers), ranks)


def behind_swiglu(model: Path, layers: dict[str, Layer], ranks: int) -> frozenset[Layer]:
    """Those of `served`, 8 bits in a bfloat16 model, whose input is silu(gate) · up; on one rank: sums over several come in between."""
    from ..checkpoint import Checkpoint
    from ..gemm.handover import follows_swiglu

    config = Checkpoint.open(model).config
    text = config.get("text_config") or config
    activation = text.get("hidden_act") if (text.get("dtype") or text.get("torch_dtype")) == "bfloat16" else None
    alone = {name: layer for name, layer in layers.items() if ranks == 1 and layer.scheme.dynamic}
    return frozenset(served({name: layer for name, layer in alone.items() if follows_swiglu(name, activation)}, ranks))


def _shapes(shapes: list[str], pattern: Pattern | None, scheme: str | None) -> list[Layer]:
    from ..format import scheme_named
    from ..gemm.tuning import Layer
    from ..pattern import Pattern

    layers = []
    for text in shapes:
        match = _SHAPE.fullmatch(text.strip())
        if match is None or "0" in match.groups():
            raise typer.BadParameter(f"--shape {text!r}: write NxK, for example 4096x14336")
        layers.append(Layer(int(match[1]), int(match[2]), Pattern.parse(pattern or "6:8"), scheme_named(scheme or "int8")))
    return layers


def _tokens(text: str) -> list[int]:
    try:
        ms = [int(part) for part in text.split(",")]
    except ValueError:
        ms = [0]
    if any(m < 1 for m in ms):
        raise typer.BadParameter(f"--tokens {text!r}: write positive numbers, for example 16,256,4096")
    return sorted(set(ms))


def _time(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"
