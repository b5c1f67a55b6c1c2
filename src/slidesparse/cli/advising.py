"""advise: what pruning would gain on a card, from measurements there or on cards that come with the package."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from . import screen
from .produce import Json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..bench.advice import Advice, Option, Speed
    from ..gemm import Plan


class Card(StrEnum):
    """Cards whose measurements come with the package."""

    h100 = "h100"
    h200 = "h200"


_USUAL = ("2:4", "4:6", "6:8", "8:10")
"""Patterns that are shown in any case."""
_PLANS = {"h100": "nvidia-h100-80gb-hbm3", "h200": "nvidia-h200"}


def advise(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|SHAPE",
            help="A folder, with weights or with config.json alone; a config.json; a name on the Hugging Face hub, of which config.json is "
            "fetched; a model of `bench`, such as Qwen2.5-7B; or one layer, NxK.",
            show_default=False,
        ),
    ],
    card: Annotated[
        Card | None,
        typer.Option(help="Ask about this card, measured before, instead of the one here.", show_default="the one here, else h200"),
    ] = None,
    vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="vLLM's dense kernels are rivals where vLLM is installed.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Measure what your plan has already, too.")] = False,
    minutes: Annotated[float, typer.Option(min=0, help="Begin no measurement after so many; a model fills in what is lacking.")] = 4,
    everything: Annotated[bool, typer.Option("--all", help="Every pattern and number of tokens, in a wide table.")] = False,
    json: Json = False,
) -> None:
    """What would pruning gain on this card? Bytes, speed, what accuracy costs, and one sentence of recommendation.

    With a GPU the linear layers are measured, merged as serving engines hold them: int8, fp8 and bf16, at 2:4 and 6:8, for 1, 16, 64, 1024
    and 4096 tokens. That takes about two minutes. Your plan keeps the times, and another run adds those that are lacking. Without a GPU
    the times of a card that come with the package tell. Other patterns follow by a model. No pruned weights are needed, and none of the
    model's own.
    """
    import torch

    from ..bench.advice import advise as api_advise
    from ..bench.targets import target_of

    asked, measured = target_of(target), None
    if card is None and torch.cuda.is_available():
        if vllm and find_spec("vllm") is not None:
            from .tuning import offer_vllm

            offer_vllm()
        plan, measured = _measured(asked.shapes, again, minutes)
        origin = "measured here"
    else:
        plan = _shipped(card or Card.h200)
        origin = f"measured on {plan.date} on another machine with that card; times come with the package"
    notes = [*asked.notes, *([f"Measuring {measured.told}."] if measured and measured.told else [])]
    advice = api_advise(target, asked.shapes, plan, origin, notes=notes)
    if json:
        screen.print_json(advice)
    else:
        _print(advice, everything)
    if measured:
        measured.end()


def _measured(shapes: Iterable[tuple[int, int]], again: bool, minutes: float) -> tuple[Plan, screen.Measuring]:
    """Your plan, with what could be measured for these layers in the time."""
    from ..bench.advice import SCHEME_NAMES, TOKENS, TUNED
    from ..format import SCHEMES
    from ..gemm import Plan, user_plan_path
    from ..gemm.machine import this_machine
    from ..gemm.tune import LinearShape, tune
    from ..ops import capability
    from ..pattern import Pattern

    schemes = [name for name in SCHEME_NAMES if name != "fp8" or capability() >= (8, 9)]
    layers = [LinearShape(n, k, Pattern.parse(text), SCHEMES[name]) for name in schemes for text in TUNED for n, k in shapes]
    with screen.measuring("measuring", minutes) as run:
        return tune(layers, ms=TOKENS, again=again, brief=True, progress=run.progress), run
    own = user_plan_path()
    return Plan.load(own, brief=True) if own.exists() else Plan(this_machine()), run


def _shipped(card: Card) -> Plan:
    from ..gemm.plans import shipped_plan

    return shipped_plan(_PLANS[card.value])


def _print(advice: Advice, everything: bool) -> None:
    layers = ", ".join(f"{shape}{f' ({count} times)' if count > 1 else ''}" for shape, count in advice.layers.items())
    screen.out.print(f"[bold]{escape(advice.target)}[/] on [bold]{escape(advice.card)}[/], {escape(advice.origin)}")
    screen.say(f"linear layers, N × K: {layers}")
    screen.out.print(f"\n[bold]{escape(advice.recommendation)}[/]\n")
    if advice.options:
        tokens = sorted({speed.m for option in (*advice.dense, *advice.options) for speed in option.speeds})
        _print_dense(advice.dense, tokens)
        screen.say("\non sparse tensor cores: times as fast as the best dense weights of 8 bits and of 16 bits")
        (_print_all if everything else _print_ranges)(advice.options, tokens)
        screen.say("from: the tokens in a step from which on it is over 2 % faster than the best dense weights of as many bits")
        _print_study(advice.options)
    for note in advice.notes:
        screen.say(f"· {note}")


def _print_ranges(options: list[Option], tokens: list[int]) -> None:
    """A line for each option of the usual patterns, 80 columns wide: least and most gains in decode and in prefill."""
    from ..bench.estimate import phase

    numbers = {name: [str(m) for m in tokens if phase(m) == name] for name in ("decode", "prefill")}
    screen.say(", ".join(f"{name}: {', '.join(ms)} tokens" for name, ms in numbers.items() if ms) + "; --all shows each, and more patterns")
    heads = [f">{name}\n/ {bits} bits" for bits in (8, 16) for name in numbers]
    table = screen.table("pattern", "scheme", ">memory", *heads, ">from")
    for option in options:
        if option.pattern in _USUAL:
            ranges = [option.ranges(bits).get(name) for bits in (8, 16) for name in numbers]
            mark = "~" if any(map(_mark, option.speeds)) else ""
            memory = screen.size(option.resident_bytes)
            table.add_row(f"{mark}{option.pattern}", option.scheme, memory, *map(_range, ranges), _from(option))
    screen.out.print(table)


def _range(gains: tuple[float, float] | None) -> str:
    if gains is None:
        return "-"
    least, most = (f"{gain:.2f}" for gain in gains)
    return least if least == most else f"{least}–{most}"


def _print_all(options: list[Option], tokens: list[int]) -> None:
    table = screen.table("pattern", "scheme", ">on disk", ">in memory", *(_tokens(m) for m in tokens), ">from")
    for option in options:
        speeds = {speed.m: speed for speed in option.speeds}
        sizes = (screen.size(option.stored_bytes), screen.size(option.resident_bytes))
        table.add_row(option.pattern, option.scheme, *sizes, *(_against(speeds.get(m)) for m in tokens), _from(option))
    screen.out.print(table)


def _from(option: Option) -> str:
    return "never" if option.pays_from is None else str(option.pays_from)


def _print_dense(dense: list[Option], tokens: list[int]) -> None:
    screen.say("dense weights: tokens a second through these layers")
    table = screen.table("scheme", ">bytes", *(_tokens(m) for m in tokens))
    for option in dense:
        speeds: Mapping[int, Speed] = {speed.m: speed for speed in option.speeds}
        rates = [f"{_mark(speeds[m])}{speeds[m].tokens_per_second:,.0f}" if m in speeds else "-" for m in tokens]
        table.add_row(option.scheme, screen.size(option.stored_bytes), *rates)
    screen.out.print(table)


def _print_study(options: list[Option]) -> None:
    from ..bench.accuracy import rounded

    losses = list(dict.fromkeys(loss for option in options for loss in option.study))
    if not losses:
        return
    screen.say("\nwhat accuracy cost in our study, best method, bf16: for these models, not yours")
    table = screen.table("model", "pattern", "method", ">perplexity", ">dense", ">tasks, points")
    for loss in losses:
        tasks = "-" if loss.tasks is None else f"{loss.tasks:+.1f} ± {loss.tasks_error:.1f}"
        table.add_row(loss.model, loss.pattern, loss.method, rounded(loss.perplexity), rounded(loss.dense_perplexity), tasks)
    screen.out.print(table)


def _tokens(m: int) -> str:
    from ..bench.estimate import phase

    return f">{phase(m)} {m}"


def _against(speed: Speed | None) -> str:
    if speed is None:
        return "-"
    both = ("-" if gain is None else f"{gain:.2f}" for gain in (speed.against_8_bits, speed.against_16_bits))
    return f"{_mark(speed)}{' / '.join(both)}"


def _mark(speed: Speed) -> str:
    """A tilde in front of what a model says."""
    return "~" if speed.source == "model" else ""
