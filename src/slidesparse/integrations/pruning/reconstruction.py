"""Block reconstruction: a pruned block's weights are trained, on their masks, to give what the dense model gives at that depth.

After BRECQ's block-wise objective (arXiv 2102.05426), with masks in the place of rounding. The pruned block is judged by what the pruned
blocks before it give. In training each token lies a random share of the way from there to what the dense model gives at that depth: few
samples then teach more than their own errors. The output is judged as it is, and behind each of the next blocks, still dense, which shows
what errors do there. Each token counts by its error relative to its own size, since a few tokens of language models are a thousand times
larger than the others. The last block is judged by the KL divergence of the logits, where the model has logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...format import Scheme
from ...quantization import quantize_weight
from .blocks import Call
from .head import Head
from .solving import Solution, Task, dequantized

_HELD_OUT = 8
"""One batch of so many is held out, to judge by."""
_RATE = 1 / 60
"""Largest step of Adam, in units of a weight matrix's root mean square times the layers' relative output error, as a root."""
_EPSILON = 1e-15
"""Added to Adam's divisor: far below the gradients of the relative error, which are 1e-7 and less in large blocks."""


@dataclass
class Depth:
    """A block on the device, how each batch calls it, and what the dense model gives behind it, ``[B, L, hidden]``.

    With a ``head``, which the last block has in models with logits, those tell how far outputs are from the targets.
    """

    block: nn.Module
    calls: list[Call]
    targets: list[Tensor]
    head: Head | None = None

    def error(self, number: int, output: Tensor) -> Tensor:
        """Mean error over the tokens of one batch's hidden states behind the block.

        Of a token: the squared error relative to the target's squares, or KL(dense model || this) in nats.
        """
        target = self.targets[number].to(output.device)
        if self.head is not None:
            return self.head.divergence(output, target)
        size = target.float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return ((output.float() - target.float()).square().sum(-1) / size).mean()


@dataclass
class Batches:
    """What pruned and dense blocks give in front of a block, ``[B, L, hidden]`` each; the block, and the dense ones next to it."""

    inputs: list[Tensor]
    dense: list[Tensor]
    here: Depth
    ahead: list[Depth] = field(default_factory=list)

    def split(self) -> tuple[list[int], list[int]]:
        """Numbers of the batches to train on, and of those held out; none to train on where there is only one."""
        count = len(self.inputs)
        held = range(count - max(1, count // _HELD_OUT), count)
        return list(range(held.start)), list(held)

    def mixed(self, number: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """One batch's inputs for training, each token between the pruned blocks' and the dense ones'."""
        pruned, dense = (stream[number].to(device) for stream in (self.inputs, self.dense))
        share = torch.rand(*pruned.shape[:-1], 1, generator=generator)
        return torch.lerp(pruned, dense, share.to(pruned))


@dataclass
class Outcome:
    """Error of a block's output on held-out samples (`Depth.error`), before and after; the weights after are those kept if it fell."""

    before: float
    after: float
    solutions: dict[str, Solution]


def reconstruct(
    tasks: list[Task],
    solutions: Mapping[str, Solution],
    batches: Batches,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    notice: Callable[[int], None],
) -> Outcome:
    """Train the pruned weights of one block, which is left as it is; masks stay as they are.

    Args:
        notice: called with the steps done.
    """
    training, held = batches.split()
    trained = _Trained(batches.here.block, tasks, solutions)
    before = trained.error(batches, held, device)
    if not training or steps == 0:
        return Outcome(before, before, dict(solutions))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained.groups(), betas=(0.9, 0.95), eps=_EPSILON, fused=device.type == "cuda")
    rates = [group["lr"] for group in optimizer.param_groups]
    total = max(steps, 11)  # OneCycleLR divides by 0 where a tenth of the steps is one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total, pct_start=0.1, cycle_momentum=False)
    # A token's part in the loss has gradients of about its error / (its size · tokens), which float16 rounds to 0.
    half = any(task.module.weight.dtype == torch.float16 for task in tasks)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    order: list[int] = []
    for step in range(steps):
        order = order or [training[i] for i in torch.randperm(len(training), generator=generator)]
        number = order.pop()
        optimizer.zero_grad()
        scaler.scale(trained.loss(batches, number, batches.mixed(number, generator, device))).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        notice(step + 1)
    found = trained.solutions()
    after = _Trained(batches.here.block, tasks, found).error(batches, held, device)
    return Outcome(before, after, found if after < before else dict(solutions))


class _Trained:
    """The weights of one block's layers in training, float32, by the block's names for them."""

    def __init__(self, block: nn.Module, tasks: list[Task], solutions: Mapping[str, Solution]) -> None:
        self.block, self.tasks, self.start = block, tasks, solutions
        names = {id(module): name for name, module in block.named_modules()}
        self.names = {task.name: f"{names[id(task.module)]}.weight" for task in tasks}
        self.weights = {task.name: solutions[task.name].weight.clone().requires_grad_() for task in tasks}
        self.masks = {task.name: solutions[task.name].weight != 0 for task in tasks}

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for the optimiser, each with its own step size."""
        error = sum(solution.error for solution in self.start.values()) / len(self.start)
        sizes = ((weight, float(weight.detach().square().mean().sqrt())) for weight in self.weights.values())
        return [{"params": [weight], "lr": _RATE * error**0.5 * size} for weight, size in sizes]

    def loss(self, batches: Batches, number: int, given: Tensor) -> Tensor:
        """Error of one batch, ``given [B, L, hidden]`` in front of the block: behind the block, plus those behind the next ones."""
        hidden = batches.here.calls[number].run(self._run(rounded=False), given)
        error = batches.here.error(number, hidden)
        for depth in batches.ahead:
            hidden = depth.calls[number].run(depth.block, hidden)
            error = error + depth.error(number, hidden)
        return error

    @torch.no_grad()
    def error(self, batches: Batches, numbers: list[int], device: torch.device) -> float:
        """Mean error behind the block, with weights rounded as they are stored."""
        run, here = self._run(rounded=True), batches.here
        outputs = ((number, here.calls[number].run(run, batches.inputs[number].to(device))) for number in numbers)
        return sum(float(here.error(number, output)) for number, output in outputs) / len(numbers)

    def _run(self, *, rounded: bool) -> Callable[..., Any]:
        """The block with the weights in training."""
        weights = {}
        for task in self.tasks:
            masked = self.weights[task.name] * self.masks[task.name]
            seen = masked + (_rounded(masked.detach(), task.scheme) - masked.detach()) if rounded or task.scheme.dynamic else masked
            weights[self.names[task.name]] = seen.to(task.module.weight.dtype)
        return lambda *args, **kwargs: functional_call(self.block, weights, args, kwargs)

    @torch.no_grad()
    def solutions(self) -> dict[str, Solution]:
        """The weights as they are stored."""
        found = {}
        for task in self.tasks:
            values, scale = quantize_weight(self.weights[task.name].detach() * self.masks[task.name] + 0.0, task.scheme)
            found[task.name] = Solution(dequantized(values, scale), values, scale, self.start[task.name].error)
        return found


def _rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    return dequantized(*quantize_weight(weight, scheme))
