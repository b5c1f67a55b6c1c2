"""How far a model's predictions are from those of a reference model, token by token, on the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaluationError
from .perplexity import PerplexityResult, predictions
from .windows import Moments, batches, check_windows, exp, losses, rows_at_once


@dataclass(frozen=True)
class DivergenceResult:
    """Means over the ``tokens`` predicted, each with its standard error, the tokens taken as independent.

    Attributes:
        kl: KL(reference ‖ model) = Σ p_reference (log p_reference − log p_model) over the vocabulary, in nats.
        agreement: share of tokens for which both hold the same token the most likely.
        ratio: perplexity of the model divided by that of the reference; its error is that of the paired losses.
        model, reference: perplexities, from the same forward passes.
    """

    kl: float
    kl_stderr: float
    agreement: float
    agreement_stderr: float
    ratio: float
    ratio_stderr: float
    tokens: int
    context: int
    stride: int
    model: PerplexityResult
    reference: PerplexityResult


def divergence(
    model: Callable[[Tensor], Any],
    reference: Callable[[Tensor], Any],
    token_ids: Tensor,
    *,
    context: int,
    stride: int | None = None,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> DivergenceResult:
    """KL divergence, top-1 agreement and perplexity ratio on ``token_ids [T]``, in the windows of `perplexity`.

    Args:
        model, reference: called with int64 ``[B, t]``; the result's ``logits [B, t, vocabulary]`` predict the next token.
        stride: tokens by which the window moves; ``context`` when not given.
        batch: how many windows of the same length one call takes at most; the result depends on it only by rounding.
        progress: called with the tokens passed so far and T after every call.

    Raises:
        ValueError: see `check_windows`.
        EvaluationError: the vocabularies differ in size.
    """
    stride = context if stride is None else stride
    ids = check_windows(token_ids, context, stride)
    kl, same, nll, reference_nll, excess = Moments(), Moments(), Moments(), Moments(), Moments()
    for windows, first, end in batches(ids, context, stride, batch):
        ours, targets = predictions(model, windows, first)
        theirs, _ = predictions(reference, windows, first)
        theirs = theirs.to(ours.device)
        if ours.shape != theirs.shape:
            raise EvaluationError(
                f"the model predicts {ours.shape[-1]} tokens, the reference {theirs.shape[-1]}: they do not share a vocabulary"
            )
        loss, reference_loss = losses(ours, targets), losses(theirs, targets)
        nll.add(loss)
        reference_nll.add(reference_loss)
        excess.add(loss.double() - reference_loss.double())
        same.add(ours.argmax(-1) == theirs.argmax(-1))
        kl.add(kl_of_logits(theirs, ours))
        if progress is not None:
            progress(end, ids.numel())
    ratio, ratio_stderr = ratio_of(excess)
    scores = PerplexityResult.of(nll, context, stride), PerplexityResult.of(reference_nll, context, stride)
    return DivergenceResult(kl.mean, kl.stderr, same.mean, same.stderr, ratio, ratio_stderr, kl.count, context, stride, *scores)


def ratio_of(excess: Moments) -> tuple[float, float]:
    """Ratio of two perplexities and its standard error, from the differences of paired losses."""
    ratio = exp(excess.mean)
    return ratio, ratio * excess.stderr


@torch.no_grad()
def kl_of_logits(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference ‖ model), float32 ``[R]`` in nats, of two ``[R, vocabulary]`` of logits."""
    rows = rows_at_once(reference.shape[-1])
    parts = []
    for p, q in zip(reference.split(rows), model.split(rows), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        p = log_p.exp()
        # A token ruled out by both, at minus infinity, adds nothing; NaN of a broken model stays NaN.
        parts.append(torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1))
    return torch.cat(parts)
