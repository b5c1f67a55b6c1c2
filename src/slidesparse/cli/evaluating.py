"""eval: perplexity, distance from a reference model, and tasks, run by transformers or vLLM."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from . import screen
from .produce import Json, Model, Trust, model_folder
from .run import DeviceOption, Memory, MemoryOption, checked_device

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluate.report import Report, TextScore
    from ..evaluate.scores import TaskScore

NEEDS_LOGITS = "KL divergence and top-1 agreement compare logits, which vLLM does not give: they need --runtime transformers."


class Runtime(StrEnum):
    """What can run a model."""

    transformers = "transformers"
    vllm = "vllm"


@dataclass(frozen=True)
class _Asked:
    """The command line, checked, and what has to be had before a model is loaded."""

    model: Path
    reference: Path | None
    text: Path | None
    tasks: Any
    context: int
    stride: int
    max_tokens: int | None
    limit: int | None
    shots: int | None
    batch: int | None
    device: str
    memory: Memory
    trust: bool

    @property
    def of_tasks(self) -> dict[str, Any]:
        return {"limit": self.limit, "num_fewshot": self.shots}


def eval_(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file.", show_default=False)] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval's names or task files, as arc_easy,mine.yaml.", show_default=False)] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Model to compare with, evaluated in the same way.", callback=model_folder, show_default=False),
    ] = None,
    runtime: Annotated[Runtime, typer.Option(help="What runs the models.")] = Runtime.transformers,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    stride: Annotated[int, typer.Option(min=1, help="Tokens by which the window moves; each token is scored once.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use only the first tokens of the text.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first items of each task.", show_default=False)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before a question; the task's own number when not given.", show_default=False)
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further task files.", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows or requests per forward pass; by memory when not given.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the report here, too: FILE.json or FILE.md.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it is there.")] = False,
    device: DeviceOption = "auto",
    memory: MemoryOption = Memory.fast,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Perplexity on a text, with context and stride stated, and scores on tasks; with a reference, how far from it."""
    if text is None and tasks is None:
        raise typer.BadParameter("nothing to evaluate on: give --text FILE, --tasks NAMES or both")
    if text is not None and stride > context:
        raise typer.BadParameter(f"--stride {stride} is larger than --context {context}: tokens between windows would not be scored")
    if runtime == Runtime.vllm and (device not in ("auto", "cuda") or memory != Memory.fast or batch_size is not None):
        raise typer.BadParameter("--device, --memory and --batch-size are for transformers: vLLM takes the first GPU and chooses itself")
    _check_output(output, overwrite)
    import torch

    from ..errors import EvaluationError, first_line

    with screen.stdout_on_stderr():
        _check_files(model, reference, text, runtime)
        found = _tasks(tasks, include_path)
        place = checked_device(device)
        asked = _Asked(
            model, reference, text, found, context, stride, max_tokens, limit, num_fewshot, batch_size, place, memory, trust_remote_code
        )
        try:
            report = (_by_vllm if runtime == Runtime.vllm else _by_transformers)(asked)
        except torch.OutOfMemoryError as error:
            raise EvaluationError(
                f"out of memory: give a smaller --batch-size or --context, or --memory lean ({first_line(error)})"
            ) from error
    _show(report, output, json)


def _check_output(output: Path | None, overwrite: bool) -> None:
    from ..errors import OutputExistsError
    from ..evaluate.report import FORMATS

    if output is None:
        return
    if output.suffix not in FORMATS:
        raise typer.BadParameter(f"--output {output} must end in {' or '.join(FORMATS)}")
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output} is there: name another file, or give --overwrite")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"--output {output}: there is no folder {output.parent}: make it, or name another file")


def _check_files(model: Path, reference: Path | None, text: Path | None, runtime: Runtime) -> None:
    """What can be wrong is found before a model is loaded, or hours of tasks are run."""
    from ..checkpoint import Checkpoint
    from ..evaluate import read_text

    if runtime == Runtime.vllm:
        from ..integrations import vllm_evaluation  # noqa: F401 - it says so where there is no vLLM

    if text is not None:
        read_text(text)
    for path in (model, reference):
        if path is not None:
            Checkpoint.open(path)


def _tasks(names: str | None, include: Path | None) -> Any:
    if names is None:
        return None
    from ..integrations import harness

    harness.hush()
    with screen.err.status("finding the tasks and their data"):
        return harness.find_tasks([name.strip() for name in names.split(",") if name.strip()], include=include)


def _by_transformers(asked: _Asked) -> Report:
    from ..evaluate import tokenize_file
    from ..evaluate.report import Report

    network, tokenizer = _load(asked.model, asked)
    other, text, scores, others = None, None, [], []
    if asked.text is not None:
        tokens = tokenize_file(tokenizer, asked.text, max_tokens=asked.max_tokens)
        if asked.reference is not None:
            other = _load(asked.reference, asked)
            _check_same(tokens, tokenize_file(other[1], asked.text, max_tokens=asked.max_tokens), asked)
        text = _text(asked, asked.text, network, other[0] if other else None, tokens)
    if asked.tasks is not None:
        scores = _score(asked, network, tokenizer)
        if asked.reference is not None:
            if other is None:
                del network
                _free()
                other = _load(asked.reference, asked)
            others = _score(asked, *other)
    return Report(asked.model, Runtime.transformers, asked.reference, text, scores, others, _versions(asked, "transformers", "torch"))


def _load(path: Path, asked: _Asked) -> tuple[Any, Any]:
    from ..evaluate import check_predicts
    from ..integrations.conversion import hide_progress_bars
    from ..integrations.transformers import load

    hide_progress_bars()  # the status line is ours
    with screen.err.status(f"loading {escape(str(path))}"):
        network, tokenizer = load(path, device=asked.device, memory=asked.memory, trust_remote_code=asked.trust)
    check_predicts(network, text=asked.text is not None)
    return network, tokenizer


def _text(asked: _Asked, path: Path, network: Any, other: Any, tokens: Tensor) -> TextScore:
    from ..evaluate import check_fits, divergence, perplexity, windows_per_pass
    from ..evaluate.report import TextScore

    for each in (network, other):
        if each is not None:
            check_fits(each, tokens, min(asked.context, tokens.numel()))
    config = network.config.get_text_config()
    batch = asked.batch or windows_per_pass(min(asked.context, tokens.numel()), config.vocab_size, network.device)
    windows = {"context": asked.context, "stride": asked.stride, "batch": batch}
    with screen.progress("evaluating", count=True) as progress:
        if other is None:
            return TextScore(path, perplexity(network, tokens, **windows, progress=progress))
        return TextScore.of(path, divergence(network, other, tokens, **windows, progress=progress))


def _score(asked: _Asked, network: Any, tokenizer: Any) -> list[TaskScore]:
    from ..integrations import harness

    return harness.evaluate_tasks(network, tokenizer, asked.tasks, batch_size=asked.batch, **asked.of_tasks)


def _by_vllm(asked: _Asked) -> Report:
    from ..evaluate import PerplexityResult
    from ..evaluate.divergence import ratio_of
    from ..evaluate.report import Report, TextScore
    from ..evaluate.windows import Moments

    read, scores = _one_by_vllm(asked.model, asked)
    text: TextScore | None = None
    others: list[TaskScore] = []
    notes: list[str] = []
    if read is not None:
        text = TextScore(read.path, PerplexityResult.of(Moments.of(read.losses), asked.context, asked.stride))
    if asked.reference is not None:
        other, others = _one_by_vllm(asked.reference, asked)
        if read is not None and text is not None and other is not None:
            _check_same(read.tokens, other.tokens, asked)
            reference = PerplexityResult.of(Moments.of(other.losses), asked.context, asked.stride)
            text = TextScore(read.path, text.model, reference, *ratio_of(Moments.of(read.losses - other.losses)))
            notes.append(NEEDS_LOGITS)
    versions = _versions(asked, "vllm", "torch")
    return Report(asked.model, Runtime.vllm, asked.reference, text, scores, others, versions, notes)


@dataclass(frozen=True)
class _Read:
    """A text as a model read it: its tokens, and the loss of each that was scored."""

    path: Path
    tokens: Tensor
    losses: Tensor


def _one_by_vllm(path: Path, asked: _Asked) -> tuple[_Read | None, list[TaskScore]]:
    """The text, and scores on the tasks, where there are such."""
    from ..evaluate import tokenize_file
    from ..integrations import vllm_evaluation as by_vllm

    read: _Read | None = None
    scores: list[TaskScore] = []
    with screen.err.status(f"loading {escape(str(path))}"):
        runner = by_vllm.open_runner(path) if asked.tasks is not None else None
        engine = runner.model if runner is not None else by_vllm.open_engine(path, context=asked.context)
    if asked.text is not None:
        tokens = tokenize_file(engine.get_tokenizer(), asked.text, max_tokens=asked.max_tokens)
        with screen.progress("evaluating", count=True) as progress:
            losses = by_vllm.text_losses(engine, tokens, context=asked.context, stride=asked.stride, progress=progress)
        read = _Read(asked.text, tokens, losses)
    if runner is not None:
        from ..integrations import harness

        scores = harness.run_tasks(runner, asked.tasks, **asked.of_tasks)
    by_vllm.close(engine)
    return read, scores


def _check_same(tokens: Tensor, others: Tensor, asked: _Asked) -> None:
    from ..errors import EvaluationError

    if tokens.tolist() != others.tolist():
        raise EvaluationError(f"{asked.model} and {asked.reference} cut {asked.text} into different tokens: they need the same tokenizer")


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _versions(asked: _Asked, *names: str) -> dict[str, str]:
    wanted = ["slidesparse", *names, *(["lm_eval"] if asked.tasks is not None else [])]
    return {name: import_module(name).__version__ for name in wanted}


def _show(report: Report, output: Path | None, json: bool) -> None:
    from ..checkpoint.staging import write_text
    from ..evaluate.report import as_json, as_markdown, task_rows, text_rows

    if output is not None:
        text = as_markdown(report) if output.suffix == ".md" else screen.json_text(as_json(report)) + "\n"
        write_text(output, text)
    if json:
        screen.print_json(as_json(report))
        return
    if report.text is not None:
        score = report.text.model
        windows = f"({score.tokens} tokens scored, context {score.context}, stride {score.stride})"
        screen.out.print(f"perplexity {score.perplexity:.4f} ± {score.perplexity_stderr:.4f}  {windows}")
        for name, value, stderr in text_rows(report.text)[1:]:
            screen.out.print(f"{name} {value} ± {stderr}")
    if report.tasks:
        header, rows = task_rows(report)
        columns = (name if name in ("task", "metric") else f">{name}" for name in header)
        table = screen.table(*columns, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        screen.out.print(table)
    for note in report.notes:
        screen.say(note)
