"""Perplexity against sums done by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from slidesparse.evaluate import perplexity

VOCABULARY = 11


def bigram(table: torch.Tensor, seen: list[torch.Tensor] | None = None):
    """A model that predicts from the last token alone."""

    def model(ids: torch.Tensor) -> SimpleNamespace:
        if seen is not None:
            seen.append(ids[0])
        return SimpleNamespace(logits=table[ids])

    return model


@pytest.mark.parametrize(("length", "context", "stride"), [(20, 20, 20), (20, 8, 4), (21, 8, 3), (2, 64, 32), (50, 2, 1), (9, 4, 3)])
def test_every_token_but_the_first_is_scored_once(length: int, context: int, stride: int) -> None:
    table, ids = torch.randn(VOCABULARY, VOCABULARY), torch.randint(VOCABULARY, (length,))
    # A bigram model does not care where windows begin, so the windows must not show.
    by_hand = -sum(float(table[a].double().log_softmax(-1)[b]) for a, b in pairwise(ids))
    result = perplexity(bigram(table), ids, context=context, stride=stride)
    assert result.tokens == length - 1
    assert result.nll == pytest.approx(by_hand, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(by_hand / (length - 1)), rel=1e-5)
    assert (result.context, result.stride) == (context, stride)


def test_a_case_small_enough_to_write_down() -> None:
    # P(next = 1 - last) = 3/4 for two tokens.
    table = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).log()
    result = perplexity(bigram(table), torch.tensor([[0, 1, 0, 0]]), context=4, stride=2)
    assert result.nll == pytest.approx(-math.log(3 / 4 * 3 / 4 * 1 / 4), rel=1e-6)
    assert result.perplexity == pytest.approx((64 / 9) ** (1 / 3), rel=1e-6)


def test_windows_give_each_token_the_context_promised() -> None:
    seen: list[torch.Tensor] = []
    ids = torch.arange(10)
    calls: list[tuple[int, int]] = []
    perplexity(bigram(torch.zeros(10, 10), seen), ids, context=6, stride=2, progress=lambda done, all_: calls.append((done, all_)))
    assert [window.tolist() for window in seen] == [list(range(0, 6)), list(range(2, 8)), list(range(4, 10))]
    assert calls == [(6, 10), (8, 10), (10, 10)]


def test_stride_equal_to_context_skips_what_has_no_context() -> None:
    result = perplexity(bigram(torch.zeros(4, 4)), torch.randint(4, (10,)), context=4, stride=4)
    assert result.tokens == 3 + 3 + 1
    assert result.perplexity == pytest.approx(4.0)


def test_what_cannot_be_scored_is_refused() -> None:
    model = bigram(torch.zeros(4, 4))
    for ids, context, stride, word in [
        (torch.tensor([1]), 4, 2, "at least 2"),
        (torch.zeros(2, 5).long(), 4, 2, "one sequence"),
        (torch.zeros(5).long(), 1, 1, "context"),
        (torch.zeros(5).long(), 4, 5, "stride"),
        (torch.zeros(5).long(), 4, 0, "stride"),
    ]:
        with pytest.raises(ValueError, match=word):
            perplexity(model, ids, context=context, stride=stride)


def test_a_model_that_breaks_shows() -> None:
    table = torch.full((4, 4), float("nan"))
    assert math.isnan(perplexity(bigram(table), torch.randint(4, (6,)), context=6, stride=3).perplexity)
