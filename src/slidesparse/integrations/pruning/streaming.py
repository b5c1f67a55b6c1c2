"""The stream through a model's blocks: every block is solved behind the pruned blocks before it, and written at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.recipe import AUTO, RECONSTRUCTION_STEPS, LayerPlan
from ...checkpoint.solved import INPUT_NORMS, Job, PruningReport, read_block, solved_scheme, write_block
from ...checkpoint.tensorfile import TensorInfo, TensorReader
from ...errors import CheckpointError, UnsupportedError, first_line
from ...quantization import check_finite
from ..calibration import Samples, calibration_samples
from ..transformers import open_model, open_tokenizer
from ..transformers_files import StoredTensors, check_parameters
from .blocks import Blocks, Call
from .head import FAILURES, PIECE
from .reconstruction import Batches, Depth, reconstruct
from .solving import Solution, Task, dequantized, gather, solve_layers

_BATCH_TOKENS, _BATCHES = 4096, 8
"""Samples run together up to so many tokens, but in at least so many batches, since some are held out."""
_AHEAD = 3
"""Dense blocks behind which a block's output is judged, too."""
_SHARE = 4
"""Hidden states stay on the device where they take at most this fraction of its free memory."""


def solve(job: Job, trust_remote_code: bool = False) -> PruningReport:
    """Prune the layers of a job with a calibrated method; solved blocks that are there already are only run through.

    On a GPU blocks run in the model's own type, on a CPU in float32; the rest of the model stays on the host.

    Raises:
        UnsupportedError: a model whose blocks cannot be run one by one, or layers that are none of its blocks' linear modules.
        CheckpointError: a model or calibration text that cannot be read.
        WeightError: weights or inputs that cannot be used; names the layer.
    """
    job.progress(0, 0, "loading the model")
    recipe, path = job.recipe, job.checkpoint.path
    tokenizer = None if recipe.calibration.token_file() else open_tokenizer(path, trust_remote_code)
    samples = calibration_samples(tokenizer, recipe.calibration, recipe.seed)
    model = _open(job, trust_remote_code)
    _check_samples(model, samples)
    blocks = Blocks.of(model)
    tasks = _tasks(job, blocks)
    blocks.check(samples.tokens)
    device = torch.empty(0, device=job.device).device  # with its number
    if device.type == "cpu":
        _widen_all_but(blocks)
    steps = _steps(job)
    told = f" + {steps} steps of reconstruction" if steps else ""
    if steps and len(samples.tokens) == 1:
        steps, told = 0, ", without reconstruction: a single sample leaves none to judge by"
    # Nothing here holds on to the hidden states: the stream lets go of them batch by batch.
    stream = _Stream(job, blocks, tasks, device, steps, *blocks.enter(samples.tokens, _batch_size(samples)))
    report = PruningReport(_method(job) + told, samples.description)
    for index in range(len(tasks)):
        try:
            report.blocks.append(stream.step(index))
        except torch.OutOfMemoryError as error:
            raise UnsupportedError(
                f"the memory of {device} ran out at block {index + 1} of {len(tasks)}: free some and run the same command again to "
                "resume, or begin anew with --overwrite and a smaller --length, or --device cpu"
            ) from error
    return report


class _Stream:
    """Hidden states in front of a block behind the pruned ones; in the dense model in front of it, behind it and behind the next ones."""

    def __init__(
        self,
        job: Job,
        blocks: Blocks,
        tasks: list[list[Task]],
        device: torch.device,
        steps: int,
        hidden: list[Tensor],
        calls: list[list[Call]],
    ) -> None:
        self.job, self.blocks, self.tasks, self.device, self.steps, self.calls = job, blocks, tasks, device, steps, calls
        self.home = self._home(sum(batch.nbytes for batch in hidden) * (_AHEAD + 3 if steps else 1))
        self.pruned = [self._kept(batch) for batch in hidden]
        self.dense = [list(self.pruned)] if steps else []
        """By depth, the first in front of the block that is next."""
        self.sizes = {task.name: task.module.weight.nbytes for block in tasks for task in block}
        self.bytes = [sum(self.sizes[task.name] for task in block) for block in tasks]
        self.done, self.total = 0, sum(self.bytes) * (2 if steps else 1)

    def _home(self, nbytes: int) -> torch.device:
        if self.device.type == "cpu":
            return self.device
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = torch.cuda.get_per_process_memory_fraction(self.device) * total
        return torch.device("cpu") if nbytes * _SHARE > min(free, allowed) else self.device

    def _kept(self, batch: Tensor) -> Tensor:
        """A batch where its stream lies; from pinned memory a GPU takes it several times as fast."""
        if self.home == self.device:
            return batch.to(self.home)
        try:
            kept = torch.empty_like(batch, device=self.home, pin_memory=True)
        except RuntimeError:  # systems limit what may be pinned
            kept = torch.empty_like(batch, device=self.home)
        return kept.copy_(batch)

    def step(self, index: int) -> dict[str, Any]:
        """Solve one block, or read it if it is solved; take the streams behind it; tell how it went."""
        block, calls = self._on_device(index)
        depths = self._depths(index) if self.steps else [Depth(block, calls, [])]
        found = read_block(self.job.folder, index)
        if found is None:
            report = self._solve(index, *depths)
        else:
            tensors, report = found
            _place(self.tasks[index], tensors)
            self._advance(self.bytes[index] * (2 if self.steps else 1), f"block {index + 1} is there from an earlier run")
        if index + 1 < len(self.blocks.modules):
            self._through(block, calls, self.pruned, self.pruned)
        self.dense = self.dense[1:]
        block.to("meta")
        self.calls[index] = []
        return report

    def _on_device(self, index: int) -> tuple[nn.Module, list[Call]]:
        """A block and its calls; batches of one size share a call."""
        block = self.blocks.modules[index].to(self.device)
        if self.device.type == "cpu":
            block.float()
        moved = {id(call): call.to(self.device) for call in self.calls[index]}
        self.calls[index] = [moved[id(call)] for call in self.calls[index]]
        return block, self.calls[index]

    def _depths(self, index: int) -> list[Depth]:
        """A block and the next ones, with the dense stream behind each; all of them are still dense."""
        depths, last = [], len(self.blocks.modules) - 1
        for depth, number in enumerate(range(index, min(index + _AHEAD, last) + 1)):
            block, calls = self._on_device(number)
            if depth + 1 == len(self.dense):
                self.dense.append(list(self.dense[depth]))
                self._through(block, calls, self.dense[depth], self.dense[depth + 1])
            depths.append(Depth(block, calls, self.dense[depth + 1]))
        return depths

    @torch.no_grad()
    def _take_head(self, last: Depth) -> str | None:
        """The head to the device for the last block; where it does not run there, which a piece of the stream shows, why."""
        head = self.blocks.head
        if head is None:
            return None
        try:
            few = last.targets[0][:1, :PIECE].to(self.device)
            float(head.to(self.device).divergence(few, few))
        except FAILURES as error:
            head.to(torch.device("cpu"))
            return f"no logits on {self.device} ({first_line(error)})"
        last.head = head
        return None

    def _solve(self, index: int, here: Depth, *ahead: Depth) -> dict[str, Any]:
        tasks, where = self.tasks[index], f"block {index + 1} of {len(self.tasks)}"
        if not tasks:
            return {"block": index, "layers": {}}
        passes = [self._pass(here.block, call, batch) for call, batch in zip(here.calls, self.pruned, strict=True)]
        self._advance(0, f"{where}: running the samples")
        with torch.no_grad():
            statistics = gather(tasks, passes)
            solutions = solve_layers(tasks, statistics, _method(self.job), lambda name: self._advance(self.sizes[name], f"{where}: {name}"))
            norms = {f"{name}.{INPUT_NORMS}": known.norms for name, known in statistics.items()}
            del statistics
            _put(tasks, solutions)
        report: dict[str, Any] = {"block": index}
        if self.steps and index + 1 == len(self.tasks) and (told := self._take_head(here)):
            self._advance(0, f"{where}: {told}, judged by hidden states")
            report["judged_by_hidden_states"] = told
        if self.steps:
            share, before = self.bytes[index] / self.steps, self.done
            outcome = reconstruct(
                tasks,
                solutions,
                Batches(self.pruned, self.dense[0], here, list(ahead)),
                steps=self.steps,
                seed=self.job.recipe.seed + index,
                device=self.device,
                notice=lambda step: self._reach(before + round(step * share), f"{where}: reconstruction"),
            )
            self._reach(before + self.bytes[index], f"{where}: reconstruction")
            solutions = outcome.solutions
            _put(tasks, solutions)
            measure = "error" if here.head is None else "divergence"
            report |= {f"{measure}_before": outcome.before, f"{measure}_after": min(outcome.before, outcome.after)}
        report["layers"] = {name: {"error": solution.error} for name, solution in solutions.items()}
        write_block(self.job.folder, index, _tensors(solutions) | norms, report)
        return report

    @torch.no_grad()
    def _through(self, block: nn.Module, calls: list[Call], before: list[Tensor], behind: list[Tensor]) -> None:
        """Hidden states behind the block, batch by batch; the two lists may be one."""
        for number, call in enumerate(calls):
            behind[number] = self._kept(call.run(block, before[number].to(self.device)))

    def _pass(self, block: nn.Module, call: Call, batch: Tensor) -> Callable[[], Tensor]:
        return lambda: call.run(block, batch.to(self.device))

    def _advance(self, nbytes: int, what: str) -> None:
        self._reach(self.done + nbytes, what)

    def _reach(self, done: int, what: str) -> None:
        self.done = done
        self.job.progress(done, self.total, what)


def _method(job: Job) -> str:
    return "admm" if job.recipe.method == AUTO else str(job.recipe.method)


def _steps(job: Job) -> int:
    asked = job.recipe.reconstruction_steps
    if asked is not None:
        return asked
    return RECONSTRUCTION_STEPS if job.recipe.method == AUTO and job.device != "cpu" else 0


def _batch_size(samples: Samples) -> int:
    count, length = samples.tokens.shape
    return max(1, min(_BATCH_TOKENS // length, count // _BATCHES))


def _open(job: Job, trust: bool) -> Any:
    """The model, in a type that holds every layer's weights exactly: config.json may name a narrower one than the files have."""
    try:
        model = open_model(job.checkpoint.path, trust_remote_code=trust)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --method magnitude does not run the model") from error
    exact = reduce(torch.promote_types, (plan.layer.main.dtype for plan in job.plans), model.dtype)
    model = model if exact == model.dtype else open_model(job.checkpoint.path, exact, trust_remote_code=trust)
    # Reconstruction trains copies of some weights: gradients of all the others would be for nothing.
    return model.requires_grad_(False)


def _check_samples(model: Any, samples: Samples) -> None:
    """Whether the model can take them.

    Raises:
        CheckpointError: token ids or positions that it does not know.
    """
    known, largest = model.get_input_embeddings().num_embeddings, int(samples.tokens.max())
    if largest >= known:
        raise CheckpointError(f"{samples.description}: token {largest} is beyond the {known} that the model knows")
    length, positions = samples.tokens.shape[1], getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise CheckpointError(f"samples of {length} tokens are longer than the {positions} that the model takes: give a smaller --length")


def _tasks(job: Job, blocks: Blocks) -> list[list[Task]]:
    """The layers to prune, block by block.

    Raises:
        CheckpointError: a tensor of the blocks is missing.
        UnsupportedError: some are no linear modules of the blocks.
        WeightError: NaN or Inf, before any work is done; names the layer.
    """
    stored = StoredTensors.read(blocks.model, [str(job.checkpoint.path / shard) for shard in job.checkpoint.shards])
    check_parameters(stored, blocks.model, f"{blocks.name}.")
    plans: dict[str, LayerPlan] = {plan.layer.name: plan for plan in job.plans}
    tasks: list[list[Task]] = []
    for index, block in enumerate(blocks.modules):
        names = {f"{blocks.name}.{index}.{name}": module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        known = [(plans.pop(stored.layer_name(name), None), module) for name, module in names.items()]
        tasks.append([_task(plan, module) for plan, module in known if plan is not None])
    if plans:
        name, *others = plans
        more = f" and {len(others)} more" if others else ""
        raise UnsupportedError(
            f"layer {name}{more}: no linear module of the repeated blocks ({blocks.name}) has these weights, as fused experts and layers "
            f"outside the blocks do not: leave them out with --ignore, or use --method magnitude"
        )
    for task in (task for block in tasks for task in block):
        check_finite(task.module.weight, f"layer {task.name}")
    return tasks


def _task(plan: LayerPlan, module: nn.Linear) -> Task:
    if plan.pattern is None:
        raise UnsupportedError(f"layer {plan.layer.name}: pruning needs a pattern")
    return Task(plan.layer.name, module, plan.pattern, solved_scheme(plan))


def _widen_all_but(blocks: Blocks) -> None:
    """Everything but the blocks in float32; blocks follow one by one."""
    inside = {id(module) for block in blocks.modules for module in block.modules()}
    for module in blocks.model.modules():
        if id(module) not in inside:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.float()


def _put(tasks: list[Task], solutions: dict[str, Solution]) -> None:
    """Solved weights into the block that runs."""
    for task in tasks:
        task.module.weight.data = solutions[task.name].weight.to(task.module.weight.dtype)


def _place(tasks: list[Task], tensors: dict[str, TensorInfo]) -> None:
    """The same from a solved block's file."""
    with TensorReader() as reader:
        for task in tasks:
            scale = tensors.get(f"{task.name}.weight_scale")
            values = reader.read(tensors[f"{task.name}.weight"])
            weight = dequantized(values, None if scale is None else reader.read(scale))
            task.module.weight.data = weight.to(task.module.weight.device, task.module.weight.dtype)


def _tensors(solutions: dict[str, Solution]) -> dict[str, Tensor]:
    weights = {f"{name}.weight": solution.values for name, solution in solutions.items()}
    return weights | {f"{name}.weight_scale": solution.scale for name, solution in solutions.items() if solution.scale is not None}
