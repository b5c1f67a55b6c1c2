"""One block's linear layers: statistics of what they are fed, and pruned, rounded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SlideSparseError, WeightError
from ...format import Scheme
from ...pattern import Pattern
from ...pruning import Gathering, Statistics, layer_error, method_named, prune, round_to_grid
from ...quantization import quantize_weight


@dataclass
class Task:
    """One linear layer to prune: its ``name`` in the files, the pattern to obey and the scheme to store it in."""

    name: str
    module: nn.Linear
    pattern: Pattern
    scheme: Scheme


@dataclass
class Solution:
    """A pruned layer: ``weight`` float32 ``[N, K]`` is what ``values`` and ``scale``, as stored, stand for.

    ``error`` is the relative error of the layer's output before any reconstruction.
    """

    weight: Tensor
    values: Tensor
    scale: Tensor | None
    error: float


@dataclass
class _Inputs:
    """Second moments of linear layers' inputs; layers that are given the very same tensor share theirs."""

    gatherings: dict[str, Gathering] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[Tensor, str]] = field(default_factory=list)

    def hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in self.leaders:
                # The tensors are kept while the pass lasts, so that one is never taken for another.
                self.leaders[name] = next((leader for tensor, leader in self.seen if tensor is x), name)
                self.seen.append((x, name))
            if self.leaders[name] == name:
                self.gatherings.setdefault(name, Gathering()).add(x)

        return look


def gather(tasks: Iterable[Task], passes: Iterable[Callable[[], Any]]) -> dict[str, Statistics]:
    """Statistics of every layer's inputs over forward passes of the block, by layer name.

    Raises:
        WeightError: a layer that no token reached, or inputs that are not finite; names the layer.
    """
    tasks, inputs = list(tasks), _Inputs()
    handles = [task.module.register_forward_pre_hook(inputs.hook(task.name)) for task in tasks]
    try:
        for run in passes:
            run()
            inputs.seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for task in tasks:
        if task.name not in inputs.leaders:
            raise WeightError(f"layer {task.name}: no calibration token reached it: leave it out with --ignore, or give more samples")
    shared = {name: gathering.statistics() for name, gathering in inputs.gatherings.items()}
    return {task.name: shared[inputs.leaders[task.name]] for task in tasks}


def solve_layers(
    tasks: Iterable[Task], statistics: dict[str, Statistics], method: str, notice: Callable[[str], None]
) -> dict[str, Solution]:
    """Prune and round every layer, by name; layers with the same inputs and pattern are solved together.

    Args:
        notice: called with each layer's name when it is done.

    Raises:
        WeightError: weights or statistics that cannot be used; names the layer.
    """
    together: dict[tuple[int, Pattern], list[Task]] = {}
    for task in tasks:
        together.setdefault((id(statistics[task.name]), task.pattern), []).append(task)
    solutions: dict[str, Solution] = {}
    for group in together.values():
        try:
            solutions |= _solve_group(group, statistics[group[0].name], method)
        except SlideSparseError as error:
            raise WeightError(f"layer {group[0].name}: {error}") from error
        for task in group:
            notice(task.name)
    return solutions


def _solve_group(tasks: list[Task], statistics: Statistics, method: str) -> dict[str, Solution]:
    rows = [task.module.out_features for task in tasks]
    together = torch.cat([task.module.weight.detach().float() for task in tasks])
    weights = together.split(rows)
    pruned = prune(together, tasks[0].pattern, method, statistics=statistics).split(rows)
    solutions: dict[str, Solution] = {}
    scale: Tensor | None
    for task, weight, solution in zip(tasks, weights, pruned, strict=True):
        if task.scheme.dynamic and method_named(method).corrects:
            values, scale = round_to_grid(solution, weight, statistics, task.scheme)
        else:
            values, scale = quantize_weight(solution, task.scheme)
        meant = dequantized(values, scale)
        solutions[task.name] = Solution(meant, values, scale, layer_error(weight, meant, statistics))
    return solutions


def dequantized(values: Tensor, scale: Tensor | None) -> Tensor:
    """What stored values mean, float32 ``[N, K]``."""
    return values.float() if scale is None else values.float() * scale
