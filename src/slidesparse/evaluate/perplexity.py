"""Sliding-window perplexity of a causal language model, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PerplexityResult:
    """``perplexity`` = exp(``nll`` / ``tokens``); ``nll`` is the sum over the ``tokens`` that were scored, in nats."""

    perplexity: float
    nll: float
    tokens: int
    context: int
    stride: int


def perplexity(
    model: Callable[[Tensor], Any],
    token_ids: Tensor,
    *,
    context: int,
    stride: int,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of ``token_ids [T]`` (or ``[1, T]``) in windows of ``context`` tokens that advance by ``stride``.

    Each window scores only the tokens no earlier window has seen, given all tokens of the window before them. The first token of all
    has nothing before it and is not scored; with ``stride == context`` that goes for the first token of every window.

    Args:
        model: called with int64 ``[1, t]``; the result's ``logits [1, t, vocabulary]`` predict the next token.
        progress: called with the tokens passed so far and T after every window.

    Raises:
        ValueError: fewer than two tokens, a context below 2, or a stride outside ``1 … context``.
    """
    ids = token_ids.reshape(-1)
    if token_ids.dim() > 2 or (token_ids.dim() == 2 and token_ids.shape[0] != 1) or ids.numel() < 2:
        raise ValueError(f"token_ids must be one sequence of at least 2 tokens, got shape {list(token_ids.shape)}")
    if context < 2:
        raise ValueError(f"context must be at least 2, got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride must lie in 1 … context ({context}), got {stride}")
    total, scored, seen = 0.0, 0, 0
    for begin in range(0, ids.numel(), stride):
        end = min(begin + context, ids.numel())
        nll, count = _window(model, ids[begin:end], seen - begin)
        total, scored, seen = total + nll, scored + count, end
        if progress is not None:
            progress(end, ids.numel())
        if end == ids.numel():
            break
    return PerplexityResult(_exp(total / scored), total, scored, context, stride)


@torch.no_grad()
def _window(model: Callable[[Tensor], Any], ids: Tensor, seen: int) -> tuple[float, int]:
    """Negative log-likelihood and number of the tokens from ``seen`` on that have a token before them."""
    first = max(seen, 1)
    targets = ids[first:].long()
    if targets.numel() == 0:
        return 0.0, 0
    there = ids.long().to(getattr(model, "device", ids.device))
    logits = model(there.unsqueeze(0)).logits[0, first - 1 : -1]
    losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return float(losses.double().sum()), targets.numel()


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf if not math.isnan(x) else math.nan
