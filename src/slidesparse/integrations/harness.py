"""Tasks through lm-eval: its names, its task files, its prompts and metrics, with our packed models."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, WARNING, LogRecord, getLogger
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import TemplateError
from yaml import YAMLError

from ..errors import EvaluationError, UnsupportedError, first_line
from ..evaluate import windows_per_pass
from ..evaluate.scores import TaskScore, items_of_mean

try:
    import lm_eval
    from datasets import disable_progress_bars
    from datasets.exceptions import DatasetsError
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UnsupportedError(f"tasks need lm-eval, which cannot be imported ({error}): pip install 'slidesparse[eval]'") from error

VERSION = lm_eval.__version__
SEED = 1234
"""Of the shots that a task draws at random; lm-eval's own default."""
RESAMPLES = 1000
"""For standard errors that lm-eval can only bootstrap."""
CPU_BATCH = 8
LARGEST_BATCH = 256
GENERATING_BATCH = 32
"""Sequences that a GPU continues at a time."""
_FILES = (".yaml", ".yml")
_UNUSABLE = (
    ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, AssertionError, SyntaxError, YAMLError, TemplateError,
)  # fmt: skip
"""What lm-eval lets through where a task file is at fault."""


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready for any number of models."""

    loaded: Any


def find_tasks(names: Sequence[str], *, include: Path | None = None) -> Tasks:
    """Tasks by lm-eval's names, globs of names, or task files (``*.yaml``), and their data.

    Args:
        include: a folder of further task files, whose names come before lm-eval's own.

    Raises:
        EvaluationError: an unknown name, a file that is no task, or data that cannot be had.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise EvaluationError("no task is named")
    if include is not None and not include.is_dir():
        raise EvaluationError(f"{include} is no folder of task files")
    with _linked([Path(name) for name in names if name.endswith(_FILES)]) as links:
        manager = _manager(names, include, links)
        of_file = {str(entry.yaml_path): name for name, entry in manager.task_index.items()}
        found: list[Any] = []
        for name in names:
            if name in links and str(links[name]) not in of_file:
                raise EvaluationError(f"{name} is no task file of lm-eval: it needs a name of its own under task or group")
            wanted = [of_file[str(links[name])]] if name in links else manager.match_tasks([name])
            if not wanted:
                raise EvaluationError(f"task {name} is unknown{_nearest(name, manager.all_tasks)}")
            for task in wanted:
                found += _load(manager, task)
        try:
            return Tasks(manager.load(found))
        except ValueError as error:
            raise EvaluationError(f"the same task is named twice: {error}") from error


@contextmanager
def _linked(files: list[Path]) -> Iterator[dict[str, Path]]:
    """Task files by the names they were given, in a folder of their own: lm-eval takes groups from folders only."""
    with TemporaryDirectory(prefix="slidesparse-tasks-") as folder:
        links = {}
        for i, file in enumerate(files):
            if not file.is_file():
                raise EvaluationError(f"there is no task file {file}")
            links[str(file)] = Path(folder).resolve() / f"{i}.yaml"
            links[str(file)].symlink_to(file.resolve())
        yield links


def _manager(names: Sequence[str], include: Path | None, links: dict[str, Path]) -> TaskManager:
    """An index of tasks; that of lm-eval's own takes seconds, and is left out where the files given say all themselves."""
    folders = [str(path) for path in dict.fromkeys([include, *(link.parent for link in links.values())]) if path is not None]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if all(name in links or name in manager.task_index for name in names) and _say_all(manager.task_index):
        return manager
    return TaskManager(include_path=folders)


def _say_all(index: dict[str, Any]) -> bool:
    """Whether every group is made of tasks that are in the index, or described where they are named."""
    for entry in index.values():
        config = entry.cfg or {}
        members = config.get("task") if "group" in config else None
        for member in [members] if isinstance(members, str) else members or ():
            described = isinstance(member, dict) and "dataset_path" in config | member
            if not described and (member["task"] if isinstance(member, dict) and "task" in member else str(member)) not in index:
                return False
    return True


def _load(manager: TaskManager, name: str) -> list[Any]:
    """The task, or the group with its tasks, and their data."""
    try:
        loaded = manager.load([name])
    except (OSError, DatasetsError) as error:
        raise EvaluationError(f"task {name}: its data cannot be read or fetched ({first_line(error)})") from error
    except _UNUSABLE as error:
        raise EvaluationError(f"task {name}: lm-eval cannot set it up ({first_line(error)})") from error
    groups = loaded.get("groups", {})
    inner = {child for children in loaded.get("group_map", {}).values() for child in children}
    return [item for key, item in (groups | loaded["tasks"]).items() if key not in inner]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; near it: {', '.join(near)}" if near else " to lm-eval, and no file ends in it"


class Runner(HFLM):
    """lm-eval's runner of transformers, whose automatic batches follow from lengths.

    lm-eval finds batches by running out of memory, and tries the longest sequence that the model has positions for before it generates.
    """

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if not requests:
            return GENERATING_BATCH
        _, context, continuation = requests[pos]
        length = min(len(context) + len(continuation), self.max_length)
        return min(LARGEST_BATCH, windows_per_pass(length, self.model.config.get_text_config().vocab_size, self.device))


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Tasks | Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
) -> list[TaskScore]:
    """Scores of a model of transformers, packed or dense, as it stands in memory.

    Args:
        tasks: from `find_tasks`, or what it takes.
        limit: only the first items of each task.
        num_fewshot: solved examples before each question, in place of each task's own number.
        batch_size: requests per forward pass; when not given by their lengths on a GPU, see `Runner`, and `CPU_BATCH` on a CPU.

    Raises:
        EvaluationError: see `find_tasks`; or lm-eval cannot run a task with this model or tokenizer.
    """
    if tokenizer.eos_token_id is None:
        raise EvaluationError(
            "tasks need the token that ends a text, which this tokenizer does not name: set eos_token in tokenizer_config.json"
        )
    size = batch_size or (CPU_BATCH if model.device.type == "cpu" else "auto:8")  # they are chosen anew as sequences get shorter
    # In bfloat16, lm-eval's default, log-probabilities around -150 are rounded to whole numbers.
    runner = Runner(pretrained=model, tokenizer=tokenizer, batch_size=size, max_batch_size=LARGEST_BATCH, softmax_dtype="float32")
    return run_tasks(runner, tasks, include=include, limit=limit, num_fewshot=num_fewshot)


def run_tasks(
    runner: Any,
    tasks: Tasks | Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[TaskScore]:
    """Scores of any of lm-eval's model objects; see `evaluate_tasks`."""
    if not isinstance(tasks, Tasks):
        tasks = find_tasks(tasks, include=include)
    for task in tasks.loaded["tasks"].values():
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    try:
        results = evaluate(lm=runner, task_dict=tasks.loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=True)
    except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
        raise EvaluationError(f"lm-eval cannot run the tasks: {first_line(error)}") from error
    return _scores(results)


def _scores(results: dict[str, Any]) -> list[TaskScore]:
    """Rows from lm-eval's results, every group before its tasks."""
    children = results["group_subtasks"]
    parents = {child: group for group, members in children.items() for child in members}
    rows: list[TaskScore] = []

    def visit(name: str) -> None:
        rows.extend(_scores_of(results, name, parents.get(name, "")))
        for child in children.get(name, ()):
            visit(child)

    for name in [*children, *results["results"]]:
        if name not in parents and not any(row.task == name for row in rows):
            visit(name)
    return rows


def _scores_of(results: dict[str, Any], name: str, group: str) -> Iterator[TaskScore]:
    metrics = results["results"].get(name, {})
    better = results["higher_is_better"].get(name) or {}
    for key, value in metrics.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{metric}_stderr,{filter_}")
        yield TaskScore(
            task=name,
            group=group,
            metric=metric,
            filter=filter_,
            score=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            items=int(metrics.get("sample_len", 0)),
            shots=_number(results["n-shot"].get(name)),
            higher_is_better=better.get(metric),
            per_item=items_of_mean(_items(results, name, metric, filter_), float(value)),
        )


def _items(results: dict[str, Any], name: str, metric: str, filter_: str) -> Iterator[Any]:
    """What each item scored, those of a group's tasks one after the other."""
    for child in results["group_subtasks"].get(name, ()):
        yield from _items(results, child, metric, filter_)
    for sample in results["samples"].get(name, ()):
        if sample["filter"] == filter_ and metric in sample:
            yield sample[metric]


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def hush() -> None:
    """Silence lm-eval's and the hub's logs, except errors and warnings about cut prompts."""
    disable_progress_bars()
    for name in ("lm_eval", "huggingface_hub", "datasets"):
        getLogger(name).setLevel(ERROR)
    for name in ("huggingface", "vllm_causallms", "utils"):
        speaker = getLogger(f"lm_eval.models.{name}")
        speaker.setLevel(WARNING)
        speaker.addFilter(_matters)


def _matters(record: LogRecord) -> bool:
    return record.levelno >= ERROR or "runcat" in record.getMessage()
