"""prune, quantize, pack, convert, import: the commands that write checkpoints."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..pattern import Pattern
from . import screen

if TYPE_CHECKING:
    from ..checkpoint import PruningReport, Recipe


class Scheme(StrEnum):
    """Names of `slidesparse.format.SCHEMES`, here so that --help needs no torch."""

    int8 = "int8"
    fp8 = "fp8"
    bf16 = "bf16"
    fp16 = "fp16"
    nvfp4 = "nvfp4"


class Form(StrEnum):
    """Stored forms."""

    packed = "packed"
    dense = "dense"


class ImportType(StrEnum):
    """Types of an imported model's tensors."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Method(StrEnum):
    """Names of `slidesparse.pruning.METHODS`, and the best of them."""

    auto = "auto"
    admm = "admm"
    sparsegpt = "sparsegpt"
    wanda = "wanda"
    magnitude = "magnitude"
    random = "random"


def _pattern(text: str) -> Pattern:
    try:
        return Pattern.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"{name!r}: choose auto, cpu, cuda or cuda:N")
    return name


def model_folder(model: Path | None) -> Path | None:
    """The folder itself, or that of the hub's model of this name."""
    if model is None or model.exists():
        return model
    from ..integrations.hub import model_folder as find

    return find(model)


_MODEL = "Folder with config.json and safetensors, or a name on the Hugging Face hub: org/name or org/name@revision."
Model = Annotated[Path, typer.Argument(help=_MODEL, callback=model_folder, show_default=False)]
Source = Annotated[Path, typer.Argument(help=_MODEL, show_default=False)]
"""A model that is fetched when nothing else is wrong with the command line."""
Out = Annotated[Path, typer.Argument(help="Directory to create.", show_default=False)]
PatternOption = Annotated[
    Pattern, typer.Option("--pattern", "-p", parser=_pattern, metavar="KEPT:GROUP", help="At most KEPT of GROUP weights kept.")
]
Overrides = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help='JSON with other patterns of single layers: {"*.down_proj": "8:10"}.', show_default=False),
]
Ignore = Annotated[
    list[str] | None, typer.Option(help="Leave these layers alone: name, glob, or re:REGEX; may be repeated.", show_default=False)
]
Only = Annotated[list[str] | None, typer.Option(help="Convert only these layers; may be repeated.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.", callback=screen.json_alone)]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that the model brings, where transformers has no class for it.")
]
MethodOption = Annotated[
    Method,
    typer.Option(
        help="How the weights that go are chosen. All but magnitude and random run the model on calibration text, through transformers; "
        "auto is admm with reconstruction on a GPU, and magnitude without transformers."
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE|NAME",
        help="Text, JSON lines, token ids (.npy) or a data set's name; the built-in text when not given.",
        show_default=False,
    ),
]
StatisticsOption = Annotated[
    Path | None,
    typer.Option(
        "--statistics",
        metavar="FILE",
        help="The calibration_norms.npz that a calibrated pruning of the model left: wanda prunes from it, without running the model.",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration samples, where the text holds as many.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens of each calibration sample.")]
Reconstruct = Annotated[
    int | None,
    typer.Option(min=0, help="Steps that fit each pruned block to the dense model's output; auto takes 300 on a GPU.", show_default=False),
]
Device = Annotated[str, typer.Option(callback=_device, help="Where to compute: auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Of random pruning, and of the choice of calibration samples.")]


def prune(
    model: Source,
    out: Out,
    pattern: PatternOption = "6:8",  # type: ignore[assignment]
    method: MethodOption = Method.auto,
    calibration: CalibrationOption = None,
    samples: Samples = 128,
    length: Length = 2048,
    statistics: StatisticsOption = None,
    reconstruct: Reconstruct = None,
    overrides: Overrides = None,
    ignore: Ignore = None,
    only: Only = None,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Zero weights until every layer obeys the pattern; writes a dense checkpoint any engine loads."""
    from ..checkpoint import Calibration, Recipe

    with screen.options_at_fault():
        recipe = Recipe(
            pattern,
            method.value,
            form="dense",
            ignore=tuple(ignore or ()),
            only=tuple(only or ()),
            seed=seed,
            overrides=_read(overrides),
            calibration=Calibration(calibration, samples, length),
            reconstruction_steps=reconstruct,
            statistics=statistics,
        )
    _run("pruning", model, out, recipe, device, overwrite, trust_remote_code, json)


def quantize(
    model: Source,
    out: Out,
    scheme: Annotated[Scheme, typer.Option(help="Type of the weights.")] = Scheme.int8,
    ignore: Ignore = None,
    only: Only = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Quantise weights; writes a dense checkpoint (W8A8: compressed-tensors; activations dynamic per token)."""
    from ..checkpoint import Recipe

    with screen.options_at_fault():
        recipe = Recipe(scheme=scheme.value, form="dense", ignore=tuple(ignore or ()), only=tuple(only or ()), obey=False)
    _run("quantising", model, out, recipe, device, overwrite, trust_remote_code, json)


def pack(
    model: Source,
    out: Out,
    format: Annotated[Form, typer.Option(help="packed: values and keep-bits; dense: the portable twin.")] = Form.packed,
    pattern: Annotated[
        Pattern | None, typer.Option("--pattern", "-p", parser=_pattern, metavar="KEPT:GROUP", help="Detected when not given.")
    ] = None,
    overrides: Overrides = None,
    ignore: Ignore = None,
    only: Only = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Pack weights that obey a pattern already; refuses, naming the first group, when they do not."""
    from ..checkpoint import Recipe

    with screen.options_at_fault():
        recipe = Recipe(pattern, form=format.value, ignore=tuple(ignore or ()), only=tuple(only or ()), overrides=_read(overrides))
    _run("packing", model, out, recipe, device, overwrite, trust_remote_code, json)


def convert(
    model: Source,
    out: Out,
    pattern: PatternOption = "6:8",  # type: ignore[assignment]
    scheme: Annotated[Scheme | None, typer.Option(help="Type of the weights; as they are when not given.")] = None,
    method: MethodOption = Method.auto,
    calibration: CalibrationOption = None,
    samples: Samples = 128,
    length: Length = 2048,
    statistics: StatisticsOption = None,
    reconstruct: Reconstruct = None,
    format: Annotated[Form, typer.Option(help="packed: values and keep-bits; dense: the portable twin.")] = Form.packed,
    overrides: Overrides = None,
    ignore: Ignore = None,
    only: Only = None,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Prune, quantise and pack in one go."""
    from ..checkpoint import Calibration, Recipe

    with screen.options_at_fault():
        recipe = Recipe(
            pattern,
            method.value,
            scheme.value if scheme else None,
            format.value,
            tuple(ignore or ()),
            tuple(only or ()),
            seed=seed,
            overrides=_read(overrides),
            calibration=Calibration(calibration, samples, length),
            reconstruction_steps=reconstruct,
            statistics=statistics,
        )
    _run("converting", model, out, recipe, device, overwrite, trust_remote_code, json)


def import_(
    gguf: Annotated[Path, typer.Argument(help="A .gguf file.", show_default=False)],
    out: Out,
    dtype: Annotated[
        ImportType | None,
        typer.Option(help="Type of all tensors; by default the file's own, bf16 for quantised ones.", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a GGUF file into a dense checkpoint (weights are dequantised; needs the gguf extra)."""
    from ..integrations.conversion import hide_progress_bars
    from ..integrations.gguf import import_gguf

    hide_progress_bars()
    with screen.err.status(f"importing {escape(str(gguf))}"):
        import_gguf(gguf, out, dtype and dtype.value, overwrite=overwrite)
    screen.say(f"wrote {out}")


def _read(overrides: Path | None) -> dict[str, Pattern]:
    from ..checkpoint import read_overrides

    return {} if overrides is None else read_overrides(overrides)


def _run(title: str, model: Path, out: Path, recipe: Recipe, device: str, overwrite: bool, trust: bool, as_json: bool) -> None:
    from ..checkpoint.staging import refuse_existing
    from ..integrations.conversion import convert as api_convert
    from ..integrations.conversion import hide_progress_bars

    if not model.exists():
        refuse_existing(out, overwrite)  # before a model is fetched
        model = model_folder(model) or model
    if recipe.calibrated:
        hide_progress_bars()
    with screen.stdout_on_stderr(), screen.progress(title) as progress:
        report = api_convert(model, out, recipe, device=device, overwrite=overwrite, progress=progress, trust_remote_code=trust)
    if as_json:
        screen.print_json(report)
        return
    layers_in, layers_out = (sum(getattr(layer, side) for layer in report.layers) for side in ("bytes_in", "bytes_out"))
    patterns = ", ".join(sorted({layer.pattern for layer in report.layers}))
    schemes = ", ".join(sorted({layer.scheme for layer in report.layers}))
    screen.say(f"wrote {report.out}")
    screen.say(f"  {len(report.layers)} layers, pattern {patterns}, {schemes}: {screen.size(layers_in)} → {screen.size(layers_out)}")
    screen.say(f"  whole checkpoint: {screen.size(report.bytes_in)} → {screen.size(report.bytes_out)}")
    for what, names in (
        ("left as they were", report.kept_dense),
        ("weights in other files were left out", report.left_out),
        ("the model's class has no place for", report.unplaced),
        ("the model's class asks for, and does not find", report.missing),
    ):
        if names:
            screen.say(f"  {what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}")
    if report.pruning is not None:
        _tell(report.pruning)
    if report.resumed_shards:
        screen.say(f"  resumed: {report.resumed_shards} shards were there from an interrupted run")


def _tell(pruning: PruningReport) -> None:
    """How a calibrated method went, in a few lines; the rest is in the report beside the weights."""
    errors = [layer["error"] for layer in pruning.layers.values()]
    screen.say(f"  pruned by {pruning.method}; {pruning.calibration}")
    screen.say(f"  output error of the layers: {sum(errors) / max(len(errors), 1):.2%} on average, {max(errors, default=0.0):.2%} at most")
    fitted = [block for block in pruning.blocks if "error_after" in block]
    if fitted:
        before, after = (sum(block[f"error_{when}"] for block in fitted) / len(fitted) for when in ("before", "after"))
        screen.say(f"  output error of the blocks, on samples held out: {before:.2%} before reconstruction, {after:.2%} after")
    for last in (block for block in pruning.blocks if "divergence_after" in block):
        before, after = last["divergence_before"], last["divergence_after"]
        screen.say(f"  KL divergence of the logits, on the same: {before:.4f} nats before the last block was fitted, {after:.4f} after")
