"""Sliding-window perplexity of a causal language model, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .windows import Moments, batches, check_windows, exp, losses


@dataclass(frozen=True)
class PerplexityResult:
    """``perplexity`` = exp(``nll`` / ``tokens``); ``nll`` is the sum over the ``tokens`` that were scored, in nats.

    ``perplexity_stderr`` is its standard error from the spread of the tokens' losses, taken as independent.
    """

    perplexity: float
    nll: float
    tokens: int
    context: int
    stride: int
    perplexity_stderr: float

    @classmethod
    def of(cls, nll: Moments, context: int, stride: int) -> PerplexityResult:
        """From the losses of all tokens that were scored."""
        value = exp(nll.mean)
        return cls(value, nll.total, nll.count, context, stride, value * nll.stderr)


def perplexity(
    model: Callable[[Tensor], Any],
    token_ids: Tensor,
    *,
    context: int,
    stride: int,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of ``token_ids [T]`` (or ``[1, T]``) in windows of ``context`` tokens that advance by ``stride``.

    Each window scores only the tokens no earlier window has seen, given all tokens of the window before them. The first token of all
    has nothing before it and is not scored; with ``stride == context`` that goes for the first token of every window.

    Args:
        model: called with int64 ``[B, t]``; the result's ``logits [B, t, vocabulary]`` predict the next token.
        batch: how many windows of the same length one call takes at most; the result depends on it only by rounding.
        progress: called with the tokens passed so far and T after every call.

    Raises:
        ValueError: see `check_windows`.
    """
    ids = check_windows(token_ids, context, stride)
    nll = Moments()
    for windows, first, end in batches(ids, context, stride, batch):
        logits, targets = predictions(model, windows, first)
        nll.add(losses(logits, targets))
        if progress is not None:
            progress(end, ids.numel())
    return PerplexityResult.of(nll, context, stride)


@torch.no_grad()
def predictions(model: Callable[[Tensor], Any], windows: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Logits ``[R, vocabulary]`` for the tokens from ``first`` on of windows ``[B, t]``, and those tokens ``[R]``, R = B (t − first)."""
    there = windows.to(getattr(model, "device", windows.device))
    logits = model(there).logits[:, first - 1 : -1]
    return logits.reshape(-1, logits.shape[-1]), windows[:, first:].reshape(-1).to(logits.device)
