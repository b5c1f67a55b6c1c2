"""Columns of packed rows: every rank's part is exact, also where a split cuts a group."""

from __future__ import annotations

import pytest
import torch

from slidesparse import reference
from slidesparse.compat.versions import check_vllm
from slidesparse.errors import CheckpointError, PatternError, UnsupportedError, WeightError
from slidesparse.format import SCHEMES, Packed
from slidesparse.integrations.engine.claims import Claims, part_names
from slidesparse.integrations.engine.rank_weights import blank, check_loaded, cut, made_up, pack
from slidesparse.packing import Shard, check_packed, restore
from slidesparse.packing import pack as pack_rows
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.pruning import prune
from slidesparse.quantization import quantize_weight
from slidesparse.tolerance import check_bitwise

SPLITS = [("4:6", 3584), ("4:6", 18944), ("6:8", 18944), ("8:10", 3584), ("8:10", 18944), ("8:10", 13824), ("2:4", 4096), ("6:8", 8960)]


def masked(n: int, k: int, pattern: Pattern, scheme: str = "int8") -> tuple[torch.Tensor, torch.Tensor | None]:
    return quantize_weight(prune(torch.randn(n, k).bfloat16(), pattern), SCHEMES[scheme])


def taken(packed: Packed, shard: Shard) -> Packed:
    return Packed(shard.values(packed.values).contiguous(), shard.keep(packed.keep), packed.pattern, shard.covered)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("text", "k"), SPLITS)
def test_every_rank_gets_its_columns_and_nothing_else(text: str, k: int, size: int) -> None:
    pattern = Pattern.parse(text)
    weight, _ = masked(3, k, pattern)
    whole = pack_rows(weight, pattern)
    x, total = torch.randint(-127, 128, (2, k)), torch.zeros(2, 3, dtype=torch.int64)
    for rank in range(size):
        shard = Shard.even(pattern, k, rank, size)
        part = cut(taken(whole, shard), None, shard)
        check_packed(part)
        left, right = shard.margins
        own = weight[:, shard.start : shard.stop]
        check_bitwise(restore(part)[:, left : left + shard.columns], own)
        assert not restore(part)[:, :left].any() and not restore(part)[:, left + shard.columns :].any()
        # What the sparse route computes: slid weights times lifted activations, both widened.
        wide = torch.nn.functional.pad(x[:, shard.start : shard.stop], (left, right))
        slid, _ = reference.slide(restore(part), pattern)
        total += reference.lift(wide, pattern) @ slid.long().t()
        # The same rows packed from dense weights are bitwise the same.
        again, found = pack(own.contiguous(), None, k, shard.start, [pattern])
        assert found == shard
        check_bitwise(again.values, part.values)
        check_bitwise(again.keep, part.keep)
    assert torch.equal(total, x @ weight.long().t())


def test_a_rank_within_one_group_and_odd_splits_are_exact() -> None:
    for text, k, size in (("14:16", 24, 4), ("6:8", 30, 5), ("4:6", 7, 7), ("10:12", 44, 2), ("6:8x2", 48, 3)):
        pattern = Pattern.parse(text)
        weight, _ = masked(5, k, pattern, "bf16")
        whole = pack_rows(weight, pattern)
        for rank in range(size):
            shard = Shard.even(pattern, k, rank, size)
            part = cut(taken(whole, shard), None, shard)
            left, _ = shard.margins
            check_bitwise(restore(part)[:, left : left + shard.columns], weight[:, shard.start : shard.stop])


def test_shards_that_cannot_be_are_refused() -> None:
    pattern = Pattern.parse("6:8")
    for arguments in ((16, 0, 3), (16, 2, 2), (16, 0, 0)):
        with pytest.raises(ValueError, match="equal"):
            Shard.even(pattern, *arguments)
    for columns in ((4, 4), (-1, 4), (8, 17)):
        with pytest.raises(ValueError, match="not within"):
            Shard(pattern, 16, *columns)
    with pytest.raises(ValueError, match="units"):
        Shard(Pattern.parse("6:8x2"), 32, 1, 17)


def test_a_late_start_or_one_wrong_bit_is_noticed() -> None:
    """Mutations of what a rank takes: one column late, one group late, one keep-bit flipped."""
    pattern = Pattern.parse("4:6")
    weight, _ = masked(4, 88, pattern)
    whole, shard = pack_rows(weight, pattern), Shard.even(pattern, 88, 1, 2)
    part, left = taken(whole, shard), shard.offset
    assert (shard.start, left) == (44, 2)
    good = restore(cut(part, None, shard))[:, left : left + 44]
    check_bitwise(good, weight[:, 44:])
    assert not torch.equal(restore(cut(part, None, shard))[:, left + 1 : left + 45], weight[:, 44:])
    late = Shard(pattern, 88, 48, 88)
    assert not torch.equal(restore(cut(taken(whole, late), None, late))[:, :40], weight[:, 44:84])
    flip = torch.tensor([1] + [0] * (part.keep.shape[1] - 1), dtype=torch.uint8)
    with pytest.raises(WeightError, match="row 0, group 0"):
        cut(Packed(part.values, part.keep ^ flip, pattern, part.k), None, shard)


def test_what_was_not_loaded_is_named() -> None:
    for scheme in ("int8", "fp8", "bf16", "fp16"):
        stored = blank((3, 8), SCHEMES[scheme].dtype)
        stored[:1] = torch.ones(1, 8).to(stored.dtype)
        with pytest.raises(WeightError, match="row 1 was not in the checkpoint"):
            check_loaded(stored)
    weight, scale = masked(4, 16, Pattern.parse("6:8"))
    scale[2] = torch.nan
    with pytest.raises(WeightError, match="weight_scale: row 2"):
        pack(weight, scale, 16, 0, KNOWN)


def test_dense_rows_take_the_tightest_pattern_they_obey_or_are_refused() -> None:
    weight, scale = masked(4, 48, Pattern.parse("6:8"))
    weight[weight == 0] = 0
    packed, _ = pack(weight, scale, 48, 0, KNOWN)
    assert str(packed.pattern) == "6:8"
    with pytest.raises(PatternError, match=r"obeys none of 2:4, 4:6: row \d+, group"):
        pack(weight, scale, 48, 0, KNOWN[:2])


def test_made_up_weights_obey_their_pattern_at_every_offset() -> None:
    for rank in range(4):
        for scheme in ("int8", "fp8", "bf16"):
            shard = Shard.even(Pattern.parse("4:6"), 56, rank, 4)
            packed, scale = made_up(6, shard, SCHEMES[scheme], torch.device("cpu"))
            check_packed(packed, scale)
            assert packed.k == sum(shard.margins) + 14


def test_claims_by_the_names_of_merged_layers() -> None:
    merged = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    parts = part_names("model.layers.0.self_attn.qkv_proj", merged)
    assert parts == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert part_names("o_proj", merged) == ("o_proj",)
    six, four = Pattern.parse("6:8"), Pattern.parse("4:6")
    claims = Claims(six, {parts[1]: four}, ("lm_head", "re:.*vision.*", parts[2]), {"a.down": 100})
    assert claims.patterns(parts) == (four, six) and claims.patterns(parts[:1]) == (six,) and Claims().patterns(parts) == KNOWN
    with pytest.raises(CheckpointError, match=r"k_proj \(4:6\).*cannot be merged"):
        claims.stored_pattern("qkv_proj", parts)
    with pytest.raises(CheckpointError, match="v_proj, which stays dense"):
        claims.stays_dense("x.qkv_proj", parts)
    assert claims.stays_dense("lm_head", ("lm_head",)) and not claims.stays_dense(parts[0], parts[:1])
    renamed = claims.renamed(lambda name: None if name == "a.down" else f"m.{name}")
    assert renamed.ignore == ("lm_head", "re:.*vision.*", f"m.{parts[2]}")
    assert renamed.overrides == {f"m.{parts[1]}": four} and not renamed.in_features
    claims.check_width("down", ("a.down",), 100)
    with pytest.raises(CheckpointError, match="K = 100"):
        claims.check_width("down", ("a.down",), 104)


def test_markers_are_read_or_refused() -> None:
    claims = Claims.of_marker({"pattern": "6:8", "overrides": {"a": "4:6"}, "ignore": ["b"]})
    assert str(claims.pattern) == "6:8" and str(claims.overrides["a"]) == "4:6" and claims.ignore == ("b",)
    assert Claims.of_marker(None).pattern is None and "lm_head" in Claims.of_marker(None).ignore
    for wrong in (
        "6:8",
        {"pattern": "7:8"},
        {"pattern": "6:8", "overrides": ["a"]},
        {"pattern": "6:8", "ignore": [1]},
        {"pattern": "6:8", "ignore": "lm_head"},
    ):
        with pytest.raises(CheckpointError, match="slidesparse"):
            Claims.of_marker(wrong)


def test_old_vllms_are_refused() -> None:
    for version in ("0.25.1", "0.9"):
        with pytest.raises(UnsupportedError, match=f"0.26 or newer, this is {version}"):
            check_vllm(version)
    for version in ("0.26.0", "0.33.0", "1.0", "0.0.0.dev1", "dev"):
        check_vllm(version)
