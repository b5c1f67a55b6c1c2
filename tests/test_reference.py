"""The oracle against the definitions, written out once more for single groups in plain Python."""

from __future__ import annotations

import itertools

import pytest
import torch

from slidesparse import reference
from slidesparse.errors import PatternError
from slidesparse.pattern import KNOWN, Pattern

GENERAL = [Pattern.parse(text) for text in ("2:3@1:2", "3:4@1:2", "8:12@4:8", "12:16@4:8", "2:5@1:4", "6:7@3:4")]
PAIRS = [Pattern.parse(text) for text in ("6:8x2", "2:4x2", "8:12x2@4:8")]
EVERY = [*KNOWN, *GENERAL, *PAIRS]


def masks(group: int) -> torch.Tensor:
    """All 2^group masks, bool ``[2^group, group]``."""
    return (torch.arange(1 << group).unsqueeze(-1) >> torch.arange(group) & 1).bool()


def filled(mask: list[bool], kept: int) -> list[bool]:
    """Canonical fill: lowest zero positions are kept until ``kept`` are."""
    mask = list(mask)
    for position in range(len(mask)):
        if sum(mask) == kept:
            break
        mask[position] = True
    return mask


def greedy(mask: list[bool], pattern: Pattern) -> dict[int, tuple[int, int]]:
    """Position → (window, lane): each window takes the first n kept positions not yet placed."""
    placed: dict[int, tuple[int, int]] = {}
    for window in range(pattern.windows):
        first = window * pattern.n
        free = [p for p in range(first, first + pattern.l) if mask[p] and p not in placed]
        placed |= {p: (window, p - first) for p in free[: pattern.n]}
    return placed


def exactly_kept(pattern: Pattern) -> list[list[bool]]:
    """Every mask with exactly ``kept`` true."""
    dropped = itertools.combinations(range(pattern.group), pattern.dropped)
    return [[p not in zeros for p in range(pattern.group)] for zeros in dropped]


def integers(shape: tuple[int, ...], rng: torch.Generator, bound: int = 8) -> torch.Tensor:
    """Random integers in ±bound without zero, so that an error cannot hide behind one."""
    return torch.randint(1, bound + 1, shape, generator=rng) * (torch.randint(0, 2, shape, generator=rng) * 2 - 1)


def sparse(n: int, k: int, pattern: Pattern, rng: torch.Generator) -> torch.Tensor:
    """Random integers that obey the pattern, some groups with more zeros than it asks for."""
    weight = integers((n, k), rng).to(torch.int32)
    keep = torch.rand((n, k), generator=rng) < 0.9
    return torch.where(reference.prune_mask(weight * keep, pattern) & keep, weight, 0)


@pytest.mark.parametrize("pattern", [*KNOWN, *GENERAL], ids=str)
def test_greedy_is_the_closed_form_on_filled_groups(pattern):
    for mask in exactly_kept(pattern):
        kept = [p for p in range(pattern.group) if mask[p]]
        closed = {p: (j // pattern.n, p - pattern.n * (j // pattern.n)) for j, p in enumerate(kept)}
        assert greedy(mask, pattern) == closed
        assert all(0 <= lane < pattern.l for _, lane in closed.values())
        if (pattern.n, pattern.l) == (2, 4):
            z1, z2 = (p for p in range(pattern.group) if not mask[p])
            assert kept == sorted(kept) and all(p - (p > z1) - (p > z2) == j for j, p in enumerate(kept))


@pytest.mark.parametrize("pattern", [p for p in [*KNOWN, *GENERAL] if p.group <= 12], ids=str)
def test_greedy_loses_exactly_the_excess(pattern):
    for mask in masks(pattern.group).tolist():
        assert sum(mask) - len(greedy(mask, pattern)) == max(0, sum(mask) - pattern.kept)


@pytest.mark.parametrize("pattern", [p for p in [*KNOWN, *GENERAL] if p.group <= 12], ids=str)
def test_oracle_on_every_mask(pattern, rng):
    every = masks(pattern.group)
    every = every[every.sum(-1) <= pattern.kept]
    weight = torch.where(every, integers(tuple(every.shape), rng), 0).to(torch.int8)
    keep = reference.keep_mask(weight, pattern)
    slid, occupied = reference.slide(weight, pattern)
    for row, mask in enumerate(every.tolist()):
        full = filled(mask, pattern.kept)
        assert keep[row, 0].tolist() == full
        expected, where = [0] * pattern.slid_group, [False] * pattern.slid_group
        for position, (window, lane) in greedy(full, pattern).items():
            expected[window * pattern.l + lane] = int(weight[row, position])
            where[window * pattern.l + lane] = True
        assert slid[row].tolist() == expected
        assert occupied[row].tolist() == where


@pytest.mark.parametrize("pattern", KNOWN, ids=str)
def test_oracle_on_every_pair_of_zeros(pattern, rng):
    every = torch.tensor(exactly_kept(pattern))
    weight = torch.where(every, integers(tuple(every.shape), rng), 0).to(torch.int8)
    slid, occupied = reference.slide(weight, pattern)
    windows = occupied.view(len(every), pattern.windows, 4)
    assert (windows.sum(-1) == 2).all(), "every window is exactly full"
    assert torch.equal(slid[occupied], reference.pack(weight, pattern).values.flatten()), "values in stored order, without gaps"


@pytest.mark.parametrize("pattern", [p for p in KNOWN if p.group <= 10], ids=str)
def test_too_many_nonzeros_is_an_error_naming_the_group(pattern):
    every = masks(pattern.group)
    for mask in every[every.sum(-1) > pattern.kept]:
        weight = torch.zeros(3, 2 * pattern.group, dtype=torch.int8)
        weight[1, pattern.group :] = mask
        for function in (reference.keep_mask, reference.pack, reference.slide):
            with pytest.raises(PatternError, match=f"row 1, group 1: {int(mask.sum())} non-zero") as error:
                function(weight, pattern)
            assert (error.value.row, error.value.group) == (1, 1)
            assert error.value.values == tuple(mask.float().tolist())


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_identity_for_every_ragged_k(pattern, rng):
    for units in range(2 * pattern.group + 2):
        k = units * pattern.unit
        weight, x = sparse(5, k, pattern, rng), integers((4, k), rng, 127)
        slid, occupied = reference.slide(weight, pattern)
        assert slid.shape == occupied.shape == (5, pattern.slid_k(k))
        assert (slid[~occupied] == 0).all()
        assert torch.equal(reference.lift(x, pattern) @ slid.long().t(), x @ weight.long().t())


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_identity_at_every_split_of_a_row(pattern, rng):
    k = (2 * pattern.group + 3) * pattern.unit
    weight, x = sparse(3, k, pattern, rng), integers((2, k), rng, 127)
    whole = x @ weight.long().t()
    for cut in range(0, k + 1, pattern.unit):
        total = torch.zeros_like(whole)
        for start, stop in ((0, cut), (cut, k)):
            offset = start // pattern.unit % pattern.group
            slid, _ = reference.slide(weight[:, start:stop], pattern, offset)
            lifted = reference.lift(x[:, start:stop], pattern, offset)
            assert lifted.shape[1] == slid.shape[1] == pattern.slid_k(stop - start, offset)
            total += lifted @ slid.long().t()
        assert torch.equal(total, whole), f"split at {cut}"


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_offset_is_a_row_with_zeros_before_it(pattern, rng):
    for offset in range(pattern.group):
        units = pattern.group + 3
        pad = offset * pattern.unit
        weight = torch.nn.functional.pad(sparse(3, units * pattern.unit, pattern, rng), (pad, 0))
        weight = torch.where(reference.prune_mask(weight, pattern), weight, 0)
        x = integers((2, units * pattern.unit), rng)
        for ours, padded in zip(reference.slide(weight[:, pad:], pattern, offset), reference.slide(weight, pattern), strict=True):
            assert torch.equal(ours, padded)
        assert torch.equal(reference.lift(x, pattern, offset), reference.lift(torch.nn.functional.pad(x, (pad, 0)), pattern))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_lift_copies_bits(dtype, rng):
    pattern = Pattern(6, 8)
    raw = torch.randint(-128, 128, (3, 21 * dtype.itemsize), generator=rng, dtype=torch.int8)
    lifted = reference.lift(raw.view(dtype), pattern).view(torch.int8).view(3, -1, dtype.itemsize)
    for o in range(pattern.slid_k(21)):
        source = pattern.lift_index(o)
        want = raw.view(3, 21, -1)[:, source] if source < 21 else torch.zeros(3, dtype.itemsize, dtype=torch.int8)
        assert torch.equal(lifted[:, o], want)


@pytest.mark.parametrize(("pattern", "levels"), [(Pattern(2, 4), 5), (Pattern(4, 6), 3), (Pattern(6, 8), 2)], ids=str)
def test_prune_takes_smallest_magnitudes_lowest_index_first(pattern, levels, rng):
    magnitudes = list(itertools.product(range(levels), repeat=pattern.group))
    weight = torch.tensor(magnitudes, dtype=torch.float32) * (torch.randint(0, 2, (len(magnitudes), 1), generator=rng) * 2 - 1)
    keep = reference.prune_mask(weight, pattern)
    for row, values in enumerate(magnitudes):
        gone = sorted(range(pattern.group), key=lambda p: (values[p], p))[: pattern.dropped]
        assert [p for p in range(pattern.group) if not keep[row, p]] == sorted(gone)
    assert not torch.signbit(reference.prune(weight, pattern)[~keep]).any(), "what goes becomes +0.0"


def test_prune_of_ragged_and_offset_groups_counts_the_outside():
    weight = torch.ones(1, 8)
    pattern = Pattern(6, 8)
    for k in range(1, 8):
        assert int((~reference.prune_mask(weight[:, :k], pattern)).sum()) == max(0, 2 - (8 - k))
    for offset in range(1, 8):
        assert reference.prune_mask(weight[:, : 8 - offset], pattern, offset).sum() == min(8 - offset, 6)


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_pack_stores_values_in_order_and_bits_least_significant_first(pattern, rng):
    k = (2 * pattern.group - 1) * pattern.unit
    weight = sparse(4, k, pattern, rng).to(torch.int8)
    packed = reference.pack(weight, pattern)
    assert packed.values.shape == (4, pattern.packed_k(k)) and packed.keep.shape == (4, pattern.keep_bytes(k))
    padded = torch.nn.functional.pad(weight, (0, pattern.unit)).view(4, -1, pattern.unit)
    for row in range(4):
        nonzero = padded[row].ne(0).any(-1).tolist()
        flags = [flag for g in (0, 1) for flag in filled(nonzero[g * pattern.group : (g + 1) * pattern.group], pattern.kept)]
        number = sum(1 << position for position, flag in enumerate(flags) if flag)
        assert bytes(packed.keep[row].tolist()) == number.to_bytes(pattern.keep_bytes(k), "little")
        assert packed.values[row].tolist() == padded[row][torch.tensor(flags)].flatten().tolist()
    assert torch.equal(reference.restore(packed), weight)


def test_a_mutated_slid_row_breaks_the_identity(rng):
    pattern = Pattern(6, 8)
    weight = sparse(1, 8, pattern, rng)
    weight[0] = torch.where(reference.prune_mask(integers((1, 8), rng), pattern)[0], integers((8,), rng), 0)
    x = torch.tensor([[2, 3, 5, 7, 11, 13, 17, 19]])
    slid, occupied = reference.slide(weight, pattern)
    truth = x @ weight.long().t()
    for position in occupied[0].nonzero().flatten().tolist():
        for other in range(position // 4 * 4, position // 4 * 4 + 4):
            if other != position and slid[0, other] != slid[0, position]:
                wrong = slid.clone()
                wrong[0, [position, other]] = slid[0, [other, position]]
                assert not torch.equal(reference.lift(x, pattern) @ wrong.long().t(), truth)


def test_linear_is_the_sum_then_weight_scale_then_token_scale_then_bias(rng):
    q, w = integers((3, 40), rng, 127), integers((5, 40), rng, 127)
    s_x, s_w = torch.rand(3, 1, generator=rng), torch.rand(5, 1, generator=rng)
    bias = torch.randn(5, generator=rng) * 1e4
    out = reference.linear(q.to(torch.int8), s_x, w.to(torch.int8), s_w, bias, torch.float32)
    for m in range(3):
        for n in range(5):
            total = torch.tensor(sum(int(a) * int(b) for a, b in zip(q[m], w[n], strict=True)), dtype=torch.float32)
            assert out[m, n] == total * s_w[n, 0] * s_x[m, 0] + bias[n]
    assert reference.linear(q.to(torch.int8), s_x, w.to(torch.int8), s_w, bias, torch.bfloat16).equal(out.bfloat16())


def test_empty_matrices():
    for pattern in (Pattern(6, 8), Pattern.parse("6:8x2")):
        for n, k in ((0, 16), (3, 0), (0, 0), (2, 2)):
            weight = torch.zeros(n, k)
            assert reference.restore(reference.pack(weight, pattern)).shape == (n, k)
            assert reference.slide(weight, pattern)[0].shape == (n, pattern.slid_k(k))
            assert reference.lift(weight, pattern).shape == (n, pattern.slid_k(k))
            assert reference.prune(weight, pattern).shape == (n, k)


def test_slide_stores_positive_zeros():
    slid, _ = reference.slide(torch.full((1, 8), -0.0), Pattern(6, 8))
    assert not torch.signbit(slid).any()
