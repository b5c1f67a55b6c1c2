"""Block reconstruction: a pruned block's weights are trained, on their masks, to give what the dense model gives at that depth.

The pruned block is fed what the pruned blocks before it give. After BRECQ's block-wise objective (arXiv 2102.05426), with masks in the
place of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...format import Scheme
from .blocks import Call
from .solving import Solution, Task, dequantized, round_nearest

_HELD_OUT = 8
"""One batch of so many is held out, to judge by."""
_RATE = 5e-3
"""Step of Adam in units of a weight matrix's root mean square."""


@dataclass
class Batches:
    """A block's inputs behind the pruned blocks, the dense model's outputs at its end, ``[B, L, hidden]`` each, and how it is called."""

    inputs: list[Tensor]
    targets: list[Tensor]
    calls: list[Call]

    def split(self) -> tuple[list[int], list[int]]:
        """Numbers of the batches to train on, and of those held out; none to train on where there is only one."""
        count = len(self.inputs)
        held = range(count - max(1, count // _HELD_OUT), count)
        return list(range(held.start)), list(held)


@dataclass
class Outcome:
    """Relative error of a block's output on held-out samples, before and after; the weights after are those kept if it fell."""

    before: float
    after: float
    solutions: dict[str, Solution]


def reconstruct(
    block: nn.Module,
    tasks: list[Task],
    solutions: Mapping[str, Solution],
    batches: Batches,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    notice: Callable[[int], None],
) -> Outcome:
    """Train the pruned weights of one block; masks stay as they are.

    Args:
        block: with the pruned weights in place; left as it is.
        notice: called with the steps done.
    """
    training, held = batches.split()
    trained = _Trained(block, tasks, solutions)
    before = trained.error(batches, held, device)
    if not training or steps == 0:
        return Outcome(before, before, dict(solutions))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained.groups(), betas=(0.9, 0.95), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    order: list[int] = []
    for step in range(steps):
        order = order or [training[i] for i in torch.randperm(len(training), generator=generator)]
        number = order.pop()
        optimizer.zero_grad()
        trained.loss(batches, number, device).backward()
        optimizer.step()
        schedule.step()
        notice(step + 1)
    found = trained.solutions()
    after = _Trained(block, tasks, found).error(batches, held, device)
    return Outcome(before, after, found if after < before else dict(solutions))


class _Trained:
    """The weights of one block's layers in training, float32, by the block's names for them."""

    def __init__(self, block: nn.Module, tasks: list[Task], solutions: Mapping[str, Solution]) -> None:
        self.block, self.tasks, self.start = block, tasks, solutions
        names = {id(module): name for name, module in block.named_modules()}
        self.names = {task.name: f"{names[id(task.module)]}.weight" for task in tasks}
        self.weights = {task.name: solutions[task.name].weight.clone().requires_grad_() for task in tasks}
        self.masks = {task.name: solutions[task.name].weight != 0 for task in tasks}

    def groups(self) -> list[dict]:
        """Parameters for the optimiser, each with its own step size."""
        return [{"params": [weight], "lr": _RATE * float(weight.detach().square().mean().sqrt())} for weight in self.weights.values()]

    def loss(self, batches: Batches, number: int, device: torch.device, *, rounded: bool = False) -> Tensor:
        """Mean squared error of the block's output on one batch, relative to the target's mean square."""
        weights = {}
        for task in self.tasks:
            masked = self.weights[task.name] * self.masks[task.name]
            seen = masked + (_rounded(masked.detach(), task.scheme) - masked.detach()) if rounded or _is_8_bit(task.scheme) else masked
            weights[self.names[task.name]] = seen.to(task.module.weight.dtype)
        call, target = batches.calls[number], batches.targets[number].to(device)
        given = batches.inputs[number].to(device)
        output = call.to(device).run(lambda *args, **kwargs: functional_call(self.block, weights, args, kwargs), given)
        return (output.float() - target.float()).square().mean() / target.float().square().mean()

    @torch.no_grad()
    def error(self, batches: Batches, numbers: list[int], device: torch.device) -> float:
        """Mean of the losses with weights rounded as they are stored."""
        return sum(float(self.loss(batches, number, device, rounded=True)) for number in numbers) / len(numbers)

    @torch.no_grad()
    def solutions(self) -> dict[str, Solution]:
        """The weights as they are stored."""
        found = {}
        for task in self.tasks:
            values, scale = round_nearest(self.weights[task.name].detach() * self.masks[task.name] + 0.0, task.scheme)
            found[task.name] = Solution(dequantized(values, scale), values, scale, self.start[task.name].error)
        return found


def _is_8_bit(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.dynamic


def _rounded(weight: Tensor, scheme: Scheme | None) -> Tensor:
    return dequantized(*round_nearest(weight, scheme))
