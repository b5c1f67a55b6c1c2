"""Arithmetic of patterns: which are coverable, how wide they get, what the lift reads."""

from __future__ import annotations

import ast
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidesparse import pattern as module
from slidesparse.pattern import KNOWN, Pattern

GENERAL = ("2:3@1:2", "3:4@1:2", "8:12@4:8", "12:16@4:8", "2:5@1:4", "6:7@3:4", "6:8x2", "4:6x2", "4:5x2@2:3")


def test_known_patterns_are_every_even_group_to_18():
    assert [str(pattern) for pattern in KNOWN] == ["2:4", "4:6", "6:8", "8:10", "10:12", "12:14", "14:16", "16:18"]


@pytest.mark.parametrize("pattern", KNOWN, ids=str)
def test_sizes_on_2_of_4(pattern):
    half = pattern.group // 2
    assert pattern.windows == half - 1
    assert pattern.slid_group == 4 * (half - 1)
    assert pattern.gamma == float(2 - Fraction(2, half))
    assert Fraction(pattern.bound).limit_denominator(100) == Fraction(pattern.group, pattern.kept)
    assert pattern.density == pattern.kept / pattern.group
    assert pattern.dropped == 2


def test_coverable_exactly_when_a_whole_number_of_windows_fits():
    for l in range(2, 9):  # noqa: E741
        for n in range(1, l):
            coverable = {(n * (k + 1), l + k * n): k + 1 for k in range(24)}
            for group in range(1, 25):
                for kept in range(1, 25):
                    if (kept, group) in coverable:
                        pattern = Pattern(kept, group, n, l)
                        windows = coverable[kept, group]
                        assert pattern.windows == windows
                        assert pattern.slid_group * n == kept * l, "stored values fill the hardware's n of l exactly"
                        assert pattern.gamma == l * windows / (l + (windows - 1) * n)
                    else:
                        with pytest.raises(ValueError):
                            Pattern(kept, group, n, l)


@pytest.mark.parametrize("pattern", KNOWN, ids=str)
def test_lift_index_is_the_designs_formula(pattern):
    og = pattern.slid_group
    for offset in range(pattern.group):
        for o in range(3 * og):
            assert pattern.lift_index(o, offset) == o // og * pattern.group + 2 * (o % og // 4) + o % 4 - offset


@pytest.mark.parametrize("text", GENERAL)
def test_lift_index_walks_windows_of_l_at_stride_n(text):
    pattern = Pattern.parse(text)
    for offset in range(pattern.group):
        expected = [
            (group * pattern.group + window * pattern.n + lane - offset) * pattern.unit + inner
            for group in range(3)
            for window in range(pattern.windows)
            for lane in range(pattern.l)
            for inner in range(pattern.unit)
        ]
        assert [pattern.lift_index(o, offset) for o in range(len(expected))] == expected


@pytest.mark.parametrize("text", [*map(str, KNOWN), *GENERAL])
def test_text_round_trip(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert Pattern.parse(f"  {text} ") == pattern
    assert Pattern.parse(pattern) is pattern
    assert hash(Pattern.parse(text)) == hash(pattern)


def test_explicit_defaults_are_the_same_pattern():
    assert Pattern.parse("6:8x1@2:4") == Pattern.parse("6:8") == Pattern(6, 8)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("5:7", "group must be 4 plus a multiple of the stride 2, got 7"),
        ("5:8", "drops 3"),
        ("7:8", "obey 14:16"),
        ("8:8", "kept must be smaller than group"),
        ("9:8", "kept must be smaller than group"),
        ("0:2", "kept must be a positive integer, got 0"),
        ("6:0", "group must be a positive integer"),
        ("1:3", "narrower than one window of 4"),
        ("3:4", "obey 6:8"),
        ("8:10@4:8", "drops 4"),
        ("10:14@4:8", "group must be 8 plus a multiple of the stride 4"),
        ("4:8@4:4", "drops nothing"),
        ("4:8@5:4", "drops nothing"),
        ("6:8x3", "unit must be 1 (elements) or 2 (pairs), got 3"),
        ("6:8x0", "unit must be a positive integer"),
        ("6:8@0:4", "n must be a positive integer"),
        ("64:66", "wider than 64"),
        ("1000000000000:1000000000002", "wider than 64"),
        ("", "write kept:group"),
        ("6", "write kept:group"),
        ("6:8:10", "write kept:group"),
        ("-6:8", "write kept:group"),
        ("6:8 x2", "write kept:group"),
        ("6.0:8", "write kept:group"),
        ("6:8\n9", "write kept:group"),
    ],
)
def test_parse_says_why_not(text, reason):
    with pytest.raises(ValueError) as error:
        Pattern.parse(text)
    assert reason in str(error.value)


@pytest.mark.parametrize("value", [None, 6, 6.8, ("6", "8"), b"6:8"])
def test_parse_refuses_other_types(value):
    with pytest.raises(ValueError, match="cannot read pattern"):
        Pattern.parse(value)


@pytest.mark.parametrize("value", [True, 6.0, "6", None])
def test_fields_must_be_plain_integers(value):
    with pytest.raises(ValueError, match="kept must be a positive integer"):
        Pattern(value, 8)


@given(st.one_of(st.text(max_size=12), st.from_regex(r"[0-9]{1,3}:[0-9]{1,3}(x[0-9])?(@[0-9]:[0-9])?", fullmatch=True)))
def test_parse_gives_a_pattern_or_a_value_error(text):
    try:
        pattern = Pattern.parse(text)
    except ValueError:
        return
    assert Pattern.parse(str(pattern)) == pattern
    assert pattern.kept == pattern.windows * pattern.n


@pytest.mark.parametrize("text", [*map(str, KNOWN), *GENERAL])
def test_widths_of_rows(text):
    pattern = Pattern.parse(text)
    for units in range(3 * pattern.group):
        k = units * pattern.unit
        groups = -(-units // pattern.group)
        assert pattern.units(k) == units
        assert pattern.groups(k) == groups
        assert pattern.slid_k(k) == groups * pattern.slid_group * pattern.unit
        assert pattern.packed_k(k) == groups * pattern.kept * pattern.unit
        assert pattern.keep_bytes(k) == (groups * pattern.group + 7) // 8
        for offset in range(pattern.group):
            touched = {(offset + unit) // pattern.group for unit in range(units)}
            assert pattern.groups(k, offset) == len(touched)
            assert pattern.slid_k(k, offset) == len(touched) * pattern.slid_group * pattern.unit


def test_rows_that_cannot_be():
    pairs = Pattern.parse("6:8x2")
    with pytest.raises(ValueError, match="K = 7 is not a whole number of units of 2"):
        pairs.units(7)
    with pytest.raises(ValueError, match="K = -8"):
        Pattern(6, 8).units(-8)
    for offset in (-1, 8):
        with pytest.raises(ValueError, match="outside a group of 8"):
            Pattern(6, 8).groups(16, offset)


def test_module_needs_the_standard_library_only():
    tree = ast.parse(Path(module.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert names and all(name.split(".")[0] in sys.stdlib_module_names for name in names)
