"""The fast pack, restore and slide bit by bit against the oracle; violations; the checks of a loader."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slidesparse import reference
from slidesparse.errors import PatternError, WeightError
from slidesparse.format import Packed
from slidesparse.packing import check_packed, check_scale, detect, find_violation, integer_view, pack, restore, slid_mask, slide
from slidesparse.packing.codes import count_negative_zeros
from slidesparse.packing.pack import _bit_flags, _byte_flags
from slidesparse.pattern import KNOWN, Pattern

GENERAL = [Pattern.parse(t) for t in ("2:3@1:2", "3:4@1:2", "8:12@4:8", "12:16@4:8", "2:5@1:4", "6:7@3:4")]
PAIRS = [Pattern.parse(t) for t in ("6:8x2", "2:4x2", "8:12x2@4:8")]
EVERY = [*KNOWN, *GENERAL, *PAIRS]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


def same(ours: torch.Tensor, oracle: torch.Tensor) -> bool:
    return ours.dtype == oracle.dtype and ours.shape == oracle.shape and torch.equal(integer_view(ours), integer_view(oracle))


def nonzero(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    return (torch.randint(1, 100, shape, generator=rng) * (torch.randint(0, 2, shape, generator=rng) * 2 - 1)).to(torch.int8)


def sparse(n: int, k: int, pattern: Pattern, dtype: torch.dtype, rng: torch.Generator, offset: int = 0) -> torch.Tensor:
    """Obeys the pattern; one weight in ten is a further zero, of either sign."""
    weight = reference.prune(nonzero((n, k), rng), pattern, offset)
    further = torch.rand((n, k), generator=rng) < 0.1
    return torch.where(further, -0.0, weight.float()).to(dtype)


def agrees(weight: torch.Tensor, pattern: Pattern) -> Packed:
    """Pack, restore and slide agree with the oracle bit by bit; returns the packed form."""
    packed, oracle = pack(weight, pattern), reference.pack(weight, pattern)
    assert same(packed.values, oracle.values) and same(packed.keep, oracle.keep)
    assert (packed.pattern, packed.k, packed.n) == (pattern, weight.shape[1], weight.shape[0])
    slid, occupied = reference.slide(weight, pattern)
    assert same(slide(packed), slid)
    assert torch.equal(slid_mask(packed).repeat_interleave(pattern.unit, -1), occupied)
    assert same(restore(packed), reference.restore(oracle))
    assert torch.equal(restore(packed).float(), weight.float())
    check_packed(packed)
    return packed


@pytest.mark.parametrize("pattern", [p for p in EVERY if p.group <= 16], ids=str)
def test_every_mask(pattern, rng):
    mask = (torch.arange(1 << pattern.group).unsqueeze(-1) >> torch.arange(pattern.group) & 1).bool()
    mask = mask[mask.sum(-1) <= pattern.kept]
    weight = nonzero((*mask.shape, pattern.unit), rng)
    if pattern.unit == 2:  # half of the pairs hold one zero
        weight[..., 0] *= torch.randint(0, 2, mask.shape, generator=rng, dtype=torch.int8)
    agrees((weight * mask.unsqueeze(-1)).flatten(1), pattern)


def test_every_pair_and_triple_of_zeros_of_the_widest_pattern(rng):
    for count in (2, 3):
        zeros = torch.tensor(list(itertools.combinations(range(18), count)))
        agrees(nonzero((len(zeros), 18), rng).scatter(1, zeros, 0), Pattern(16, 18))


@pytest.mark.parametrize("pattern", [p for p in EVERY if p.group <= 12 and p.unit == 1], ids=str)
def test_every_mask_of_every_ragged_or_offset_group(pattern, rng):
    for width in range(1, pattern.group):
        mask = (torch.arange(1 << width).unsqueeze(-1) >> torch.arange(width) & 1).to(torch.int8)
        mask = mask[mask.sum(-1) <= pattern.kept]
        weight = nonzero(tuple(mask.shape), rng) * mask
        agrees(weight, pattern)
        offset = pattern.group - width
        packed, oracle = pack(weight, pattern, offset), reference.pack(F.pad(weight, (offset, 0)), pattern)
        assert same(packed.values, oracle.values) and same(packed.keep, oracle.keep)
        assert same(slide(packed), reference.slide(weight, pattern, offset)[0])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_rows_of_many_groups(pattern, dtype, rng):
    for units in (0, 1, pattern.group - 1, pattern.group, 2 * pattern.group + 1, 7 * pattern.group + 3):
        packed = agrees(sparse(5, units * pattern.unit, pattern, dtype, rng), pattern)
        assert not (restore(packed).float().signbit() & (restore(packed).float() == 0)).any()


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_every_offset(pattern, rng):
    for offset in range(pattern.group):
        for units in (1, pattern.group - offset, pattern.group, 2 * pattern.group + 1):
            weight = sparse(3, units * pattern.unit, pattern, torch.bfloat16, rng, offset)
            packed = pack(weight, pattern, offset)
            whole = F.pad(weight, (offset * pattern.unit, -(offset + units) % pattern.group * pattern.unit))
            oracle = reference.pack(whole, pattern)
            assert same(packed.values, oracle.values) and same(packed.keep, oracle.keep)
            assert packed.k == (whole.shape[1] if offset else weight.shape[1])
            assert same(slide(packed), reference.slide(weight, pattern, offset)[0])


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_shards_of_a_row_sum_to_the_whole(pattern, rng):
    k = (2 * pattern.group + 1) * pattern.unit
    weight, x = sparse(4, k, pattern, torch.int8, rng), nonzero((3, k), rng).long()
    for cut in range(pattern.unit, k, pattern.unit):
        total = torch.zeros(3, 4, dtype=torch.int64)
        for part in (slice(0, cut), slice(cut, k)):
            offset = part.start // pattern.unit % pattern.group
            slid = slide(pack(weight[:, part], pattern, offset)).long()
            lifted = reference.lift(x[:, part], pattern, offset)
            total += lifted @ F.pad(slid, (0, lifted.shape[1] - slid.shape[1])).t()
        assert torch.equal(total, x @ weight.long().t())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_negative_zeros_count_as_zeros(dtype):
    weight = torch.full((2, 20), -0.0).to(dtype)
    packed = agrees(weight, Pattern(6, 8))
    assert count_negative_zeros(weight) == 40 and count_negative_zeros(restore(packed)) == 0
    assert not integer_view(packed.values).any()
    assert packed.keep.tolist() == [[0b00111111] * 3] * 2, "the fill keeps the lowest zero positions"


def test_views_and_empty_matrices(rng):
    weight = sparse(24, 10, Pattern(6, 8), torch.bfloat16, rng)
    assert same(restore(pack(weight.t().contiguous().t(), Pattern(6, 8))), restore(pack(weight, Pattern(6, 8))))
    for pattern in (Pattern(6, 8), Pattern.parse("6:8x2")):
        for n, k in ((0, 16), (3, 0), (0, 0), (2, 2)):
            agrees(torch.zeros(n, k, dtype=torch.bfloat16), pattern)


@pytest.mark.parametrize("pattern", [p for p in EVERY if p.group <= 10], ids=str)
def test_every_violating_mask_is_an_error(pattern, rng):
    for count in range(pattern.kept + 1, pattern.group + 1):
        for places in itertools.combinations(range(pattern.group), count):
            weight = torch.zeros(3, 2, pattern.group, pattern.unit)
            weight[1, 1, list(places), 0] = 2.0
            weight[2] = 1.0
            weight = weight.view(3, -1)
            with pytest.raises(PatternError, match="row 1, group 1") as ours:
                pack(weight, pattern)
            with pytest.raises(PatternError) as oracle:
                reference.pack(weight, pattern)
            found = find_violation(weight, pattern)
            for error in (ours.value, found):
                assert (error.row, error.group) == (oracle.value.row, oracle.value.group) == (1, 1)
                assert f"{count} non-zero" in str(error)
            assert found.values == oracle.value.values


def test_violation_in_a_ragged_or_offset_group():
    pattern = Pattern(6, 8)
    ragged = torch.zeros(2, 15, dtype=torch.bfloat16)
    ragged[1, 8:] = 3
    error = find_violation(ragged, pattern)
    assert (error.row, error.group, error.values) == (1, 1, (3.0,) * 7) and "columns 8–14" in str(error)
    assert find_violation(torch.ones(1, 6), pattern) is None and find_violation(torch.ones(1, 8), pattern, 4) is None
    assert find_violation(torch.ones(1, 7), pattern, 1).values == (1.0,) * 7
    with pytest.raises(PatternError):
        pack(torch.ones(1, 7), pattern, 1)
    with pytest.raises(ValueError):
        pack(torch.ones(1, 7), Pattern.parse("6:8x2"))


def test_pairs_are_not_elements(rng):
    weight = reference.prune(nonzero((4, 16), rng), Pattern(6, 8))
    weight[0] = torch.tensor([0, 1, 0, 1, 1, 1, 1, 1] * 2)
    assert find_violation(weight, Pattern(6, 8)) is None
    assert find_violation(weight, Pattern.parse("6:8x2")) is not None
    with pytest.raises(PatternError):
        pack(weight, Pattern.parse("6:8x2"))


def test_detect_finds_the_tightest(rng):
    for pattern in KNOWN:
        weight = reference.prune(nonzero((64, 16 * 9 * 5 * 7 * 2), rng)[:, : pattern.group * 20], pattern)
        assert detect([(0, weight)]) == pattern
        assert detect([(0, weight[:3]), (3, weight[3:40]), (40, weight[40:])]) == pattern
    assert detect([(0, torch.zeros(4, 64))]) == detect([]) == Pattern(2, 4)


def test_detect_names_what_violates_the_last_candidate(rng):
    weight = torch.zeros(6, 64, dtype=torch.int8)
    weight[5] = nonzero((64,), rng)
    weight[2, 8:16] = 1  # 2:4 falls in the first block, 6:8 in the second
    with pytest.raises(PatternError, match=r"row 5, group 1 \(columns 2–9\).*pattern 6:8 ") as caught:
        detect([(0, weight[:4]), (4, weight[4:])], [Pattern(2, 4), Pattern(6, 8)], start=6)
    assert (caught.value.row, caught.value.group) == (5, 1)
    with pytest.raises(ValueError, match="no candidates"):
        detect([(0, weight)], [])


@pytest.mark.parametrize("pattern", [Pattern(6, 8), Pattern.parse("6:8x2")], ids=str)
def test_detect_counts_groups_from_the_start_of_the_whole_row(pattern, rng):
    width = pattern.group * pattern.unit
    whole = reference.prune(nonzero((32, 6 * width), rng), pattern)
    for start in range(0, 2 * width, pattern.unit):
        assert detect([(0, whole[:, start:])], [pattern], start=start) == pattern
    with pytest.raises(PatternError):
        detect([(0, whole[:, width // 2 :])], [pattern])


@pytest.mark.parametrize("pattern", [Pattern(4, 6), Pattern(6, 8), Pattern(8, 10)], ids=str)
def test_every_flipped_keep_bit_is_refused(pattern, rng):
    packed = pack(sparse(2, 2 * pattern.group + 1, pattern, torch.int8, rng), pattern)
    for row in range(2):
        for bit in range(packed.keep.shape[1] * 8):
            damaged = dataclasses.replace(packed, keep=packed.keep.clone())
            damaged.keep[row, bit // 8] ^= 1 << bit % 8
            unused = bit >= 3 * pattern.group
            message = f"row {row} sets unused bits" if unused else f"row {row}, group {bit // pattern.group} has"
            with pytest.raises(WeightError, match=message):
                check_packed(damaged)


def test_moved_bits_and_swapped_values_break_the_identity():
    pattern, x = Pattern(6, 8), torch.eye(8, dtype=torch.int64)
    weight = torch.tensor([[0, 1, -2, 3, 0, -4, 5, -6]], dtype=torch.int8)
    packed, lifted = pack(weight, pattern), reference.lift(x, pattern)
    truth = x @ weight.long().t()
    assert torch.equal(lifted @ slide(packed).long().t(), truth)
    keep = int(packed.keep[0, 0])
    for gone, back in itertools.product(range(8), range(8)):
        if keep >> gone & 1 and not keep >> back & 1:
            moved = dataclasses.replace(packed, keep=torch.tensor([[keep ^ 1 << gone ^ 1 << back]], dtype=torch.uint8))
            check_packed(moved)
            assert not torch.equal(lifted @ slide(moved).long().t(), truth)
            assert not torch.equal(restore(moved), weight)
    for i, j in itertools.combinations(range(6), 2):
        order = list(range(6))
        order[i], order[j] = j, i
        swapped = dataclasses.replace(packed, values=packed.values[:, order])
        assert not torch.equal(lifted @ slide(swapped).long().t(), truth)


def test_check_packed_refuses_wrong_shapes_and_scales(rng):
    packed = pack(sparse(3, 20, Pattern(6, 8), torch.int8, rng), Pattern(6, 8))
    scale = torch.ones(3, 1)
    check_packed(packed, scale)
    for change, message in (
        ({"values": packed.values[:, :-1]}, "weight_values has shape"),
        ({"keep": packed.keep[:, :-1]}, "weight_keep is"),
        ({"keep": packed.keep[:-1]}, "weight_keep is"),
        ({"keep": packed.keep.to(torch.int8)}, "weight_keep is torch.int8"),
        ({"k": 28}, "weight_values has shape"),
        ({"pattern": Pattern(8, 10)}, "weight_values has shape"),
    ):
        with pytest.raises(WeightError, match=message):
            check_packed(dataclasses.replace(packed, **change))
    for bad in (float("nan"), float("inf"), 0.0, -1.0):
        scale[1] = bad
        with pytest.raises(WeightError, match="row 1 holds"):
            check_packed(packed, scale)
    with pytest.raises(WeightError, match="expected"):
        check_packed(packed, torch.ones(3))
    check_scale(torch.zeros(2, 3), (2, 3), zero_allowed=True)
    with pytest.raises(WeightError, match="block_scale: row 0"):
        check_scale(-torch.ones(2, 3), (2, 3), "block_scale", zero_allowed=True)


def test_bytes_of_the_packed_form(rng):
    for pattern in KNOWN:
        k = pattern.group * 8
        for dtype, size in ((torch.bfloat16, 2), (torch.int8, 1)):
            packed = pack(sparse(2, k, pattern, dtype, rng), pattern)
            assert packed.nbytes == 2 * (k * pattern.kept // pattern.group * size + k // 8)


class Largest(TorchDispatchMode):
    """The most bytes of a tensor with memory of its own that was made."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made, given = function(*args, **(kwargs or {})), {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


def test_keep_bits_of_a_large_layer_are_counted_in_bounded_memory():
    n, k, pattern = 5000, 8192, Pattern(6, 8)
    bits = torch.full((n, k // 8), 0b11011110, dtype=torch.uint8)
    packed = Packed(torch.zeros(n, pattern.packed_k(k), dtype=torch.int8), bits, pattern, k)
    with Largest() as made:
        check_packed(packed)
    assert 0 < made.nbytes <= 1 << 24 < n * k
    bits[4321, 77] ^= 1
    with pytest.raises(WeightError, match="row 4331, group 77 has 7 keep-bits"):
        check_packed(packed, first_row=10)


def test_bits_unpack_on_any_device_as_on_a_cpu():
    every = torch.arange(256, dtype=torch.uint8).view(8, 32)
    with Largest() as made:
        flags = _bit_flags(every)
    assert torch.equal(flags, _byte_flags(every)) and made.nbytes == 8 * 256
