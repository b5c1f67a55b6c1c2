"""What scoring a text is made of: windows over its tokens, losses of their logits, and means with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_PER_PASS = 16384
"""Tokens that one forward pass on a GPU takes at most, where a window is not longer itself."""
LOGITS_PER_PASS = 1 << 30
"""Logits that one forward pass may make: 2 GB in 16 bits."""
LOGITS_AT_ONCE = 1 << 26
"""Logits that are widened to float32 at a time: 256 MB."""


@dataclass
class Moments:
    """Count, sum and sum of squares of numbers that come in parts, in float64."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of the numbers of one tensor."""
        moments = cls()
        moments.add(values)
        return moments

    def add(self, values: Tensor) -> None:
        """Take in the numbers of a tensor of any shape."""
        wide = values.double()
        self.count += values.numel()
        self.total += float(wide.sum())
        self.squares += float((wide * wide).sum())

    @property
    def mean(self) -> float:
        """NaN of no numbers."""
        return self.total / self.count if self.count else math.nan

    @property
    def stderr(self) -> float:
        """Standard error of the mean, the numbers taken as independent; NaN of fewer than two."""
        if self.count < 2:
            return math.nan
        spread = self.squares - self.total * self.total / self.count
        return math.sqrt(max(spread, 0.0) / (self.count - 1) / self.count) if not math.isnan(spread) else math.nan


def check_windows(token_ids: Tensor, context: int, stride: int) -> Tensor:
    """The tokens as int64 ``[T]``.

    Raises:
        ValueError: not one sequence of at least two tokens, a context below 2, or a stride outside ``1 … context``.
    """
    ids = token_ids.reshape(-1)
    if token_ids.dim() > 2 or (token_ids.dim() == 2 and token_ids.shape[0] != 1) or ids.numel() < 2:
        raise ValueError(f"token_ids must be one sequence of at least 2 tokens, got shape {list(token_ids.shape)}")
    if context < 2:
        raise ValueError(f"context must be at least 2, got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride must lie in 1 … context ({context}), got {stride}")
    return ids.long()


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin, end, and the first position in the window that is scored: what no earlier window has seen and has a token before it."""
    seen = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        first = max(seen - begin, 1)
        if first < end - begin:
            yield begin, end, first
        seen = end
        if end == length:
            return


def batches(ids: Tensor, context: int, stride: int, batch: int) -> Iterator[tuple[Tensor, int, int]]:
    """Up to ``batch`` neighbouring windows of the same shape as one ``[B, t]``, the first position scored in each, and the last end."""
    waiting: list[tuple[int, int, int]] = []
    for window in windows(ids.numel(), context, stride):
        begin, end, first = window
        if waiting and (len(waiting) == batch or (end - begin, first) != (waiting[0][1] - waiting[0][0], waiting[0][2])):
            yield _stack(ids, waiting)
            waiting = []
        waiting.append(window)
    if waiting:
        yield _stack(ids, waiting)


def _stack(ids: Tensor, group: list[tuple[int, int, int]]) -> tuple[Tensor, int, int]:
    return torch.stack([ids[begin:end] for begin, end, _ in group]), group[0][2], group[-1][1]


def windows_per_pass(context: int, vocabulary: int, device: torch.device) -> int:
    """How many windows one forward pass takes by itself: as many as memory is sure to allow on a GPU, one on a CPU."""
    if device.type == "cpu":
        return 1
    return max(1, min(TOKENS_PER_PASS, LOGITS_PER_PASS // max(vocabulary, 1)) // context)


def rows_at_once(vocabulary: int) -> int:
    """Rows of logits to widen at a time."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood, float32 ``[R]``, of ``targets [R]`` under ``logits [R, vocabulary]``."""
    rows = rows_at_once(logits.shape[-1])
    return torch.cat(
        [
            F.cross_entropy(part.float(), wanted, reduction="none")
            for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True)
        ]
    )


def exp(x: float) -> float:
    """Without an overflow error: infinity instead."""
    return math.exp(x) if x < 700 else math.inf if not math.isnan(x) else math.nan
