"""Perplexity, divergence and their errors against sums done by hand; scores beside a reference's, and the report."""

from __future__ import annotations

import math
import re
import statistics
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import slidesparse.evaluate.windows as scoring
from slidesparse.errors import CheckpointError, EvaluationError
from slidesparse.evaluate import divergence, perplexity
from slidesparse.evaluate.generation import check_fits
from slidesparse.evaluate.report import Report, as_json, as_markdown
from slidesparse.evaluate.scores import TaskScore, compare, items_of_mean

VOCABULARY = 11


def bigram(table: torch.Tensor, seen: list[torch.Tensor] | None = None):
    """A model that predicts from the last token alone."""

    def model(ids: torch.Tensor) -> SimpleNamespace:
        if seen is not None:
            seen.append(ids[0])
        return SimpleNamespace(logits=table[ids])

    return model


def test_what_does_not_fit_the_model_is_refused_by_number() -> None:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=16, vocab_size=VOCABULARY))
    check_fits(model, torch.tensor([0, VOCABULARY - 1]), 16)
    check_fits(model, torch.tensor([], dtype=torch.long), 1)
    for ids, length, message in (([VOCABULARY], 16, "token 11, the model knows 11"), ([1], 17, "17 tokens at a time .* 16 positions")):
        with pytest.raises(CheckpointError, match=message):
            check_fits(model, torch.tensor(ids), length)


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


@pytest.mark.parametrize(("length", "context", "stride", "batch"), [(40, 8, 8, 3), (41, 8, 3, 4), (24, 8, 8, 16), (9, 16, 16, 2)])
def test_windows_that_share_a_call_change_nothing_but_the_number_of_calls(length: int, context: int, stride: int, batch: int) -> None:
    table, ids, shapes = torch.randn(VOCABULARY, VOCABULARY), torch.randint(VOCABULARY, (length,)), []

    def model(windows: torch.Tensor) -> SimpleNamespace:
        shapes.append(tuple(windows.shape))
        return SimpleNamespace(logits=table[windows])

    one = perplexity(bigram(table), ids, context=context, stride=stride)
    many = perplexity(model, ids, context=context, stride=stride, batch=batch)
    assert many.nll == pytest.approx(one.nll, rel=1e-6) and many.tokens == one.tokens
    windows = [end - begin for begin, end, _ in scoring.windows(length, context, stride)]
    assert sum(rows for rows, _ in shapes) == len(windows) and all(rows <= batch for rows, _ in shapes)
    assert len(shapes) < len(windows) or len(windows) == 1


def test_the_standard_error_is_that_of_the_tokens_losses() -> None:
    table, ids = torch.randn(VOCABULARY, VOCABULARY), torch.randint(VOCABULARY, (30,))
    losses = torch.stack([-table[a].double().log_softmax(-1)[b] for a, b in pairwise(ids)])
    result = perplexity(bigram(table), ids, context=64, stride=32)
    assert result.perplexity_stderr == pytest.approx(float(losses.mean().exp() * losses.std() / 29**0.5), rel=1e-4)


def test_windows_per_pass_by_memory() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert scoring.windows_per_pass(2048, 49152, cuda) == 16384 // 2048
    assert scoring.windows_per_pass(2048, 262144, cuda) == 2**30 // 262144 // 2048
    assert scoring.windows_per_pass(40000, 49152, cuda) == 1 and scoring.windows_per_pass(64, 49152, cpu) == 1


def brute_force(model: torch.Tensor, reference: torch.Tensor, tokens: list[int]) -> list[float]:
    """KL(reference ‖ model) after each of the tokens, by two loops in float64."""
    found = []
    for token in tokens:
        p, q = (table[token].double().softmax(-1).tolist() for table in (reference, model))
        found.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
    return found


@pytest.mark.parametrize(("length", "context", "stride", "batch"), [(20, 20, None, 1), (37, 8, None, 3), (37, 8, 3, 2)])
def test_divergence_against_loops(monkeypatch, length: int, context: int, stride: int | None, batch: int) -> None:
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 2 * VOCABULARY)  # rows are widened in parts, too
    model, reference = torch.randn(VOCABULARY, VOCABULARY), torch.randn(VOCABULARY, VOCABULARY)
    ids = torch.randint(VOCABULARY, (length,))
    before = [
        int(ids[begin + i - 1])
        for begin, end, first in scoring.windows(length, context, stride or context)
        for i in range(first, end - begin)
    ]
    result = divergence(bigram(model), bigram(reference), ids, context=context, stride=stride, batch=batch)
    kl = torch.tensor(brute_force(model, reference, before), dtype=torch.float64)
    same = torch.tensor([float(model[token].argmax() == reference[token].argmax()) for token in before], dtype=torch.float64)
    assert result.tokens == len(before) and result.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.kl_stderr == pytest.approx(float(kl.std()) / len(before) ** 0.5, rel=1e-4)
    assert result.agreement == pytest.approx(float(same.mean()))
    assert result.agreement_stderr == pytest.approx(float(same.std()) / len(before) ** 0.5)
    for table, found in ((model, result.model), (reference, result.reference)):
        assert found == perplexity(bigram(table), ids, context=context, stride=stride or context, batch=batch)
    assert result.ratio == pytest.approx(result.model.perplexity / result.reference.perplexity, rel=1e-9)


def test_the_ratio_s_error_is_that_of_paired_losses() -> None:
    reference, ids = torch.randn(VOCABULARY, VOCABULARY), torch.randint(VOCABULARY, (40,))
    model = reference + 0.01 * torch.randn(VOCABULARY, VOCABULARY)
    excess = torch.stack([(reference[a].double().log_softmax(-1) - model[a].double().log_softmax(-1))[b] for a, b in pairwise(ids)])
    result = divergence(bigram(model), bigram(reference), ids, context=64)
    assert result.ratio_stderr == pytest.approx(float(excess.mean().exp() * excess.std() / 39**0.5), rel=1e-3)
    assert result.ratio_stderr < result.model.perplexity_stderr / result.reference.perplexity


def test_a_model_does_not_differ_from_itself() -> None:
    table = torch.randn(VOCABULARY, VOCABULARY)
    table[:, 3] = -math.inf  # a token that the head rules out
    ids = torch.randint(3, (30,))
    result = divergence(bigram(table), bigram(table), ids, context=8)
    assert (result.kl, result.kl_stderr, result.agreement, result.ratio, result.ratio_stderr) == (0.0, 0.0, 1.0, 1.0, 0.0)


def test_what_cannot_be_compared_is_refused_or_shows() -> None:
    ids = torch.randint(4, (12,))
    with pytest.raises(EvaluationError, match="predicts 5 tokens, the reference 4"):
        divergence(bigram(torch.zeros(4, 5)), bigram(torch.zeros(4, 4)), ids, context=8)
    broken = torch.full((4, 4), math.nan)
    for model, reference in ((broken, torch.zeros(4, 4)), (torch.zeros(4, 4), broken)):
        assert math.isnan(divergence(bigram(model), bigram(reference), ids, context=8).kl)
    certain = torch.full((4, 4), -math.inf)
    certain[:, 0] = 0.0
    assert divergence(bigram(certain), bigram(torch.zeros(4, 4)), torch.zeros(9).long(), context=9).kl == math.inf


def score(task: str, items: list[float], **changes: object) -> TaskScore:
    mean = sum(items) / len(items)
    plain = {"group": "", "metric": "acc", "filter": "none", "score": mean, "stderr": 0.1, "items": len(items), "shots": 0}
    return TaskScore(**({"task": task, "higher_is_better": True, "per_item": tuple(items)} | plain | changes))


def test_recovery_and_the_paired_error() -> None:
    model, reference = [1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 1.0]
    lone = score("other", [1.0, 1.0])
    (found,) = compare([score("task", model), lone], [score("task", reference)])
    assert found.recovery == pytest.approx(0.6 / 0.8) and found.difference == pytest.approx(-0.2)
    assert found.difference_stderr == pytest.approx(statistics.stdev([0.0, -1.0, 0.0, 1.0, -1.0]) / 5**0.5)
    (found,) = compare([score("task", [3.0], per_item=())], [score("task", [0.0])])
    assert found.recovery is None and found.difference_stderr is None
    assert items_of_mean([1.0, 0.0, 1.0, True], 0.75) == (1.0, 0.0, 1.0, 1.0) and items_of_mean([1.0, 0.0], 0.25) == ()


def test_the_report_s_tables() -> None:
    members = [score("group::one", [1.0, 0.0], group="group"), score("group::two", [1.0, 1.0], group="group")]
    rows = [score("group", [1.0, 0.0, 1.0, 1.0], stderr=None, shots=None), *members, score("ppl|x", [2e7], metric="perplexity", filter="f")]
    references = [score("group", [1.0, 1.0, 1.0, 1.0])]
    report = Report(Path("model"), "transformers", Path("dense"), None, rows, references, {"torch": "2"}, ["A note."])
    lines = as_markdown(report).splitlines()
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    assert table[0] == ["task", "metric", "shots", "items", "score", "±", "reference", "±", "recovery", "difference", "±"]
    assert table[2] == ["group", "acc", "", "4", "0.7500", "", "1.0000", "0.1000", "0.7500", "-0.2500", "0.2500"]
    assert table[3] == [r"ppl\|x", "perplexity (f)", "0", "1", "2e+07", "0.1000", "", "", "", "", ""]
    assert len(table) == 4 and lines[-1] == "A note." and "Run by transformers (torch 2)." in lines
    data = as_json(report)["tasks"]
    assert [row["task"] for row in data] == ["group", "group::one", "group::two", "ppl|x"] and "recovery" not in data[1]
    assert data[0]["recovery"] == 0.75 and "per_item" not in data[0]
