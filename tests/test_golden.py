"""The documents hold: the worked example and the table of theory.md, the reader and the configuration of format.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from slidesparse import packing as fast
from slidesparse import reference
from slidesparse.format import SCHEMES, Packed, PackedConfig
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.pruning import prune
from slidesparse.quantization import quantize_weight

DOCS = Path(__file__).parent.parent / "docs"
INT8 = SCHEMES["int8"]


def block(document: str, language: str) -> str:
    """The last fenced block of that language."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / document).read_text(encoding="utf-8"), re.DOTALL)[-1]


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(block("theory.md", "json"))


def row(values: list) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def integers(values: list) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int8)


def check_packed_form(golden: dict, packed: Packed, values: str) -> None:
    assert packed.keep[0].tolist() == golden["keep"]
    assert packed.values[0].tolist() == golden[values]


def test_example_by_the_oracle(golden):
    pattern, masked, x = Pattern.parse(golden["pattern"]), row(golden["masked"]), row(golden["x"])
    assert reference.prune(row(golden["dense"]), pattern).equal(masked)
    assert [int(value != 0) for value in golden["masked"]] == golden["mask"]
    check_packed_form(golden, reference.pack(masked, pattern), "values")
    assert reference.slide(masked, pattern)[0].equal(row(golden["slid"]))
    assert reference.lift(x, pattern).equal(row(golden["lifted"]))
    for name, source in (("x", x), ("w", masked)):
        q, scale = reference.quantize(source, INT8)
        assert q.equal(integers(golden[f"{name}_q"])) and scale.item() == golden[f"{name}_scale"]
    w_q, x_q = integers(golden["w_q"]), integers(golden["x_q"])
    check_packed_form(golden, reference.pack(w_q, pattern), "w_q_values")
    assert reference.slide(w_q, pattern)[0].equal(integers(golden["w_q_slid"]))
    assert reference.lift(x_q, pattern).equal(integers(golden["x_q_lifted"]))
    scales = torch.tensor([golden["x_scale"]]), torch.tensor([golden["w_scale"]])
    assert reference.linear(x_q, scales[0], w_q, scales[1], None, torch.float32).item() == golden["y"]


def test_example_by_the_fast_path(golden):
    pattern, masked = Pattern.parse(golden["pattern"]), row(golden["masked"])
    assert prune(row(golden["dense"]), pattern).equal(masked)
    packed = fast.pack(masked, pattern)
    check_packed_form(golden, packed, "values")
    fast.check_packed(packed)
    assert fast.slide(packed).equal(row(golden["slid"])) and fast.restore(packed).equal(masked)
    w_q, scale = quantize_weight(masked, INT8)
    assert w_q.equal(integers(golden["w_q"])) and scale.item() == golden["w_scale"]
    packed = fast.pack(w_q, pattern)
    check_packed_form(golden, packed, "w_q_values")
    assert fast.slide(packed).equal(integers(golden["w_q_slid"]))


def test_example_by_plain_arithmetic(golden):
    def dot(a: str, b: str) -> float:
        return sum(u * v for u, v in zip(golden[a], golden[b], strict=True))

    assert dot("w_q", "x_q") == dot("w_q_slid", "x_q_lifted") == golden["accumulator"]
    assert dot("masked", "x") == dot("slid", "lifted") == golden["y_unquantized"]
    assert golden["y"] == pytest.approx(golden["accumulator"] * golden["w_scale"] * golden["x_scale"], rel=1e-6)
    assert [value for value in golden["slid"] if value] == [value for value in golden["values"] if value]
    assert golden["values"].count(0) == 2, "the fill shows"
    assert len(golden["slid"]) == len(golden["lifted"]) == 24 and len(golden["values"]) == 12


def test_table_of_patterns():
    line = r"^\| (\d+:\d+)" + r" \| ([\d.]+)" * 4 + r" \|$"
    rows = re.findall(line, (DOCS / "theory.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [text for text, *_ in rows] == [str(pattern) for pattern in KNOWN]
    for text, *numbers in rows:
        pattern = Pattern.parse(text)
        expected = (pattern.gamma, pattern.bound, pattern.density + 1 / 16, pattern.density + 1 / 8)
        assert all(abs(float(number) - value) <= 0.000501 for number, value in zip(numbers, expected, strict=True))


@pytest.fixture(scope="module")
def read_layer():
    scope: dict = {}
    exec(compile(block("format.md", "python"), "format.md", "exec"), scope)
    return scope["read_layer"]


@pytest.mark.parametrize("text", ["6:8", "4:6", "8:10", "16:18", "12:16@4:8", "6:8x2"])
def test_the_numpy_reader_restores(read_layer, text, rng):
    pattern = Pattern.parse(text)
    for units in (1, pattern.group, 3 * pattern.group + 1):
        k = units * pattern.unit
        weight = prune(torch.randn(7, k, generator=rng), pattern)
        packed = fast.pack(weight, pattern)
        dense = read_layer(packed.values.numpy(), packed.keep.numpy(), k, pattern.kept, pattern.group, pattern.unit)
        assert torch.equal(torch.from_numpy(dense.copy()), weight)


def test_the_numpy_reader_refuses(read_layer, rng):
    packed = fast.pack(prune(torch.randn(2, 20, generator=rng), Pattern(4, 6)), Pattern(4, 6))
    values, keep = packed.values.numpy(), packed.keep.numpy()
    with pytest.raises(ValueError, match="shapes"):
        read_layer(values, keep, 26, 4, 6)
    for byte, bit in ((0, 0), (2, 7)):
        damaged = keep.copy()
        damaged[1, byte] ^= 1 << bit
        with pytest.raises(ValueError, match="row 1, group"):
            read_layer(values, damaged, 20, 4, 6)
    long = fast.pack(torch.zeros(1, 6), Pattern(4, 6))
    with pytest.raises(ValueError, match="after the last group"):
        read_layer(long.values.numpy(), long.keep.numpy() | 0x80, 6, 4, 6)


def test_the_configuration_shown_is_one():
    data = json.loads(block("format.md", "json"))["quantization_config"]
    config = PackedConfig.from_dict(data)
    assert config.to_dict() == data
    for layer, k in config.in_features.items():
        assert k % config.pattern_of(layer).group, "only ragged layers are listed"
