"""The one sentence of advice: which pattern and scheme, where they win and where they lose, or to stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, log
from typing import TYPE_CHECKING

from ..gemm.choose import GUARD
from .accuracy import rounded
from .estimate import MEASURED, phase

if TYPE_CHECKING:
    from .advice import Option

MUCH = 0.2
"""A pattern whose perplexity rose by more than this share in every model of the study is not recommended without training."""


def recommended(dense: Sequence[Option], options: Sequence[Option]) -> str:
    """Decode and prefill are told apart: what gains in one of them may lose in the other."""
    if not dense or not options:
        return "Nothing is known of these layers on this card: run the command on the card itself."
    eight = [each for each in options if each.rival_bits == 8 and each.ranges(8)]
    if not eight:
        return f"{_stay(dense)}: nothing is known of pruned weights of 8 bits."
    gaining = [each for each in eight if _faster(each)]
    if not gaining:
        top = max(eight, key=_most)
        told = f"{top.pattern} in {top.scheme}, the best, is {_told(top)}"
        return f"{_stay(dense)}: no pattern is faster in all of decode or of prefill; {told}."
    kind = [each for each in gaining if not _costly(each)]
    kind = [each for each in kind if all(speed.source == MEASURED for speed in each.speeds)] or kind
    if not kind:
        best = max(gaining, key=_rank)
        return f"{_stay(dense)}: {best.pattern} in {best.scheme} is {_told(best)}, but needs training after pruning{_loss(best)}."
    best = max(kind, key=_rank)
    faster = _faster(best)
    where = "" if len(faster) == len(best.ranges(8)) else f" where {' and '.join(faster)} is what counts"
    return f"Prune to {best.pattern} and serve in {best.scheme}{where}: {_source(best)}it is {_told(best)}{_loss(best)}."


def _faster(option: Option) -> list[str]:
    """Of decode and prefill those in which every number of tokens gains."""
    return [name for name, (least, _) in option.ranges(8).items() if least > GUARD]


def _most(option: Option) -> float:
    return max(most for _, most in option.ranges(8).values())


def _rank(option: Option) -> tuple[int, float]:
    return len(_faster(option)), _most(option)


def _costly(option: Option) -> bool:
    """Whether the study found the pattern to cost much, and in every model."""
    return bool(option.study) and all(loss.perplexity / loss.dense_perplexity > 1 + MUCH for loss in option.study)


def _stay(dense: Sequence[Option]) -> str:
    """The fastest dense weights, which may be others in decode than in prefill."""
    best = {}
    for name in dict.fromkeys(phase(speed.m) for each in dense for speed in each.speeds):
        means = {}
        for each in dense:
            us = [log(speed.us) for speed in each.speeds if phase(speed.m) == name]
            if us:
                means[each.scheme] = fsum(us) / len(us)
        best[name] = min(means, key=means.__getitem__)
    if len(set(best.values())) == 1:
        return f"Stay dense in {next(iter(best.values()))}"
    return f"Stay dense, in {' or '.join(f'{scheme} for {name}' for name, scheme in best.items())}"


def _source(option: Option) -> str:
    measured = all(speed.source == MEASURED for speed in option.speeds)
    return "" if measured else "by a model, which `slidesparse bench kernel` can confirm, "


def _told(option: Option) -> str:
    """Where the option wins and where it loses, what it wins first."""
    parts: list[str] = []
    for name, (least, most) in sorted(option.ranges(8).items(), key=lambda item: -item[1][0]):
        low, high = f"{least:.2f}", f"{most:.2f}"
        times = low if low == high else f"{low} to {high}"
        rival = "" if parts else " as fast as the best dense weights of 8 bits"
        parts.append(f"{_word(least, most)} in {name} ({times} times{rival})")
    return " and ".join(parts)


def _word(least: float, most: float) -> str:
    """By the number of tokens it may be two of slower, as fast and faster."""
    worst, best = (0 if gain < 1 / GUARD else 1 if gain <= GUARD else 2 for gain in (least, most))
    words = ("slower", "as fast", "faster")
    return words[worst] if worst == best else f"{words[worst]} or {words[best]}"


def _loss(option: Option) -> str:
    """What the study found, of the model that lost most."""
    if not option.study:
        return ""
    worst = max(option.study, key=lambda loss: loss.perplexity / loss.dense_perplexity)
    return f"; in our study {worst.model}'s perplexity went from {rounded(worst.dense_perplexity)} to {rounded(worst.perplexity)}"
