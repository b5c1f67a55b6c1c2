"""Pruning: the fast path bit by bit against the oracle, random pruning, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch

from slidesparse import reference
from slidesparse.errors import WeightError
from slidesparse.packing import find_violation, integer_view
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.pruning import METHODS, Statistics, prune

EVERY = [*KNOWN, *(Pattern.parse(t) for t in ("2:3@1:2", "3:4@1:2", "8:12@4:8", "12:16@4:8", "6:8x2", "2:4x2", "8:12x2@4:8"))]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8)


def same(ours: torch.Tensor, oracle: torch.Tensor) -> bool:
    return ours.dtype == oracle.dtype and torch.equal(integer_view(ours), integer_view(oracle))


def coarse(shape: tuple[int, int], dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """Few distinct magnitudes, both signs, zeros of both signs: ties everywhere."""
    return (torch.randn(shape, generator=rng) * 3).round().div(2).to(dtype)


@pytest.mark.parametrize("pattern", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_to_the_oracle(pattern, dtype, rng):
    for units in (0, 1, pattern.group - 1, pattern.group, pattern.group + 1, 3 * pattern.group + 2):
        for weight in (coarse((7, units * pattern.unit), dtype, rng), torch.randn(7, units * pattern.unit, generator=rng).mul(9).to(dtype)):
            assert same(prune(weight, pattern), reference.prune(weight, pattern))


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_every_offset(pattern, rng):
    for offset in range(pattern.group):
        for units in (1, pattern.group, pattern.group + 3):
            weight = coarse((5, units * pattern.unit), torch.bfloat16, rng)
            assert same(prune(weight, pattern, offset=offset), reference.prune(weight, pattern, offset))
            assert find_violation(prune(weight, pattern, offset=offset), pattern, offset) is None


@pytest.mark.parametrize(("pattern", "levels"), [(Pattern(2, 4), 4), (Pattern(4, 6), 3), (Pattern(6, 8), 3)], ids=str)
def test_every_tie(pattern, levels):
    weight = torch.tensor(list(itertools.product(range(levels), repeat=pattern.group)), dtype=torch.bfloat16)
    assert same(prune(weight, pattern), reference.prune(weight, pattern))
    assert same(prune(-weight, pattern), reference.prune(-weight, pattern))


def test_ties_go_to_the_lowest_index_and_zeros_are_positive():
    pruned = prune(torch.tensor([[-1.0, 1, -1, 1, -1, 1, -1, 1]]), Pattern(6, 8))
    assert pruned.tolist() == [[0, 0, -1, 1, -1, 1, -1, 1]]
    assert not torch.signbit(pruned[pruned == 0]).any()


def test_every_16_bit_and_8_bit_code(rng):
    for dtype, integer in ((torch.bfloat16, torch.int16), (torch.float16, torch.int16), (torch.int8, torch.int8)):
        count = 1 << 8 * dtype.itemsize
        codes = torch.randperm(count, generator=rng).to(integer).view(dtype)
        weight = codes[torch.isfinite(codes.float())]
        weight = weight[: weight.numel() // 8 * 8].view(8, -1)
        assert same(prune(weight, Pattern(6, 8)), reference.prune(weight, Pattern(6, 8)))


def test_pairs_go_by_their_summed_magnitude():
    weight = torch.tensor([[9.0, 0, 1, -1, 2, 2, 3, 0, 0, -3, 4, 4, 8, 8, 1, 8]])
    assert prune(weight, Pattern.parse("6:8x2")).tolist() == [[9, 0, 0, 0, 2, 2, 0, 0, 0, -3, 4, 4, 8, 8, 1, 8]]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.calibrated])
@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_exactly_the_dropped_go_and_the_rest_stays(method, pattern, rng):
    units = 3 * pattern.group
    weight = torch.rand((16, units * pattern.unit), generator=rng) + 1
    pruned = prune(weight, pattern, method, generator=rng)
    kept = (pruned != 0).view(16, 3, pattern.group, pattern.unit)
    assert (kept.all(-1).sum(-1) == pattern.kept).all() and (kept.any(-1).sum(-1) == pattern.kept).all()
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
    assert torch.equal(prune(pruned, pattern, method, generator=rng), pruned), "weights that obey stay as they are"


def test_the_input_is_left_alone_and_may_be_a_view(rng):
    weight = torch.randn(24, 10, generator=rng)
    before = weight.clone()
    assert same(prune(weight.t(), Pattern(6, 8)), reference.prune(weight.t().contiguous(), Pattern(6, 8)))
    assert torch.equal(weight, before)


def test_random_is_uniform_and_repeatable():
    weight, pattern = torch.ones(8000, 8), Pattern(6, 8)
    gone = (prune(weight, pattern, "random") == 0).float().mean(0)
    assert (gone - 0.25).abs().max() < 0.03
    assert torch.equal(prune(weight, pattern, "random"), prune(weight, pattern, "random"))
    other = prune(weight, pattern, "random", generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other, prune(weight, pattern, "random"))


def test_random_takes_zeros_first():
    weight = torch.ones(500, 8)
    weight[:, 5] = 0
    assert ((prune(weight, Pattern(6, 8), "random") == 0).sum(-1) == 2).all()


def test_refusals():
    pattern = Pattern(6, 8)
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.ones(3, 8)
        weight[2, 5] = bad
        with pytest.raises(WeightError, match="row 2, column 5"):
            prune(weight, pattern)
    with pytest.raises(WeightError, match=r"cannot prune torch\.float64"):
        prune(torch.ones(1, 8, dtype=torch.float64), pattern)
    with pytest.raises(ValueError, match="psychic"):
        prune(torch.ones(1, 8), pattern, "psychic")
    with pytest.raises(ValueError):
        prune(torch.ones(1, 7), Pattern.parse("6:8x2"))
    with pytest.raises(ValueError, match="magnitude takes no statistics"):
        prune(torch.ones(1, 8), pattern, statistics=Statistics(None, torch.ones(8)))
    with pytest.raises(ValueError, match=r"wanda needs statistics of the layer's inputs"):
        prune(torch.ones(1, 8), pattern, "wanda")
    with pytest.raises(ValueError, match="wanda prunes rows that start with a group, got offset 3"):
        prune(torch.ones(1, 8), pattern, "wanda", statistics=Statistics(None, torch.ones(8)), offset=3)


def test_no_rows_or_columns():
    for shape in ((0, 16), (3, 0), (0, 0)):
        assert prune(torch.zeros(shape), Pattern(6, 8)).shape == shape
