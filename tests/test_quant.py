"""Quantisation against independent arithmetic: exact fractions, numpy, the 256 codes of e4m3; and BitNet's ternary files."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from slidesparse import reference
from slidesparse.checkpoint.formats.bitnet import ternarize, unpack_ternary
from slidesparse.errors import WeightError
from slidesparse.format import SCHEMES, scheme_of_dtype
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.quantization import check_finite, quantize_nvfp4, quantize_weight

INT8, FP8 = SCHEMES["int8"], SCHEMES["fp8"]
INPUTS = (torch.bfloat16, torch.float16, torch.float32)


def nearest_float32(value: Fraction) -> np.float32:
    """The float32 nearest to a fraction, ties to the even significand."""
    guess = np.float32(float(value))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.int32)) & 1))


def e4m3_values() -> list[float]:
    """The 127 non-negative finite values of float8_e4m3fn, by code, from the format's definition."""
    return [(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]


E4M3 = e4m3_values()


def e4m3_code(value: float) -> int:
    """Nearest code, ties to the even code, by looking at all of them."""
    size = min(abs(value), 448.0)
    code = min(range(127), key=lambda c: (abs(E4M3[c] - size), c & 1))
    return code | (0x80 if np.signbit(value) else 0)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def test_the_codes_of_e4m3_are_torchs():
    assert torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist() == E4M3


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_against_exact_fractions(scheme, dtype, rng):
    x = (torch.randn(6, 40, generator=rng) * torch.logspace(-6, 4, 6).unsqueeze(-1)).to(dtype)
    q, scale = reference.quantize(x, scheme)
    assert q.dtype == scheme.dtype and scale.dtype == torch.float32 and scale.shape == (6, 1)
    for row in range(6):
        exact = [Fraction(float(value)) for value in x[row]]
        s = nearest_float32(max(map(abs, exact)) / Fraction(scheme.bound))
        assert float(scale[row]) == float(s)
        for value, code in zip(exact, bits(q[row]).tolist(), strict=True):
            ratio = float(nearest_float32(value / Fraction(float(s))))
            if scheme is INT8:
                assert code == max(-127, min(127, round(ratio))) % 256
            else:
                assert code & 0x7F == e4m3_code(ratio) & 0x7F and (code == e4m3_code(ratio) or code & 0x7F == 0)


def test_int8_against_numpy(rng):
    x = torch.randn(64, 300, generator=rng) * torch.logspace(-38, 37, 64).unsqueeze(-1)
    assert torch.isfinite(x).all()
    q, scale = reference.quantize(x, INT8)
    with np.errstate(all="ignore"):
        a = x.numpy()
        s = np.abs(a).max(-1, keepdims=True) / np.float32(127)
        s[s == 0] = 1
        expected = np.clip(np.rint(a / s), -127, 127).astype(np.int8)
    assert np.array_equal(scale.numpy(), s) and np.array_equal(q.numpy(), expected)
    assert (q.abs().amax(-1) == 127).all()


def test_ties_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    assert reference.quantize(x, INT8)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]
    middles = [(low + high) / 2 for low, high in pairwise(E4M3)]
    x = torch.tensor([[448.0, *middles, *(-m for m in middles)]])
    q, scale = reference.quantize(x, FP8)
    assert scale.item() == 1.0
    assert bits(q)[0].tolist() == [126, *map(e4m3_code, middles), *(e4m3_code(-m) for m in middles)]


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_every_bfloat16_in_range(scheme):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[torch.isfinite(x) & (x.abs() <= scheme.bound)]
    q, scale = reference.quantize(torch.cat([x, x.new_tensor([scheme.bound])]).unsqueeze(0), scheme)
    assert scale.item() == 1.0
    if scheme is INT8:
        assert q[0, :-1].tolist() == [round(value) for value in x.tolist()]
    else:
        table, sizes = np.array(E4M3), x.abs().double().numpy()
        upper = np.searchsorted(table, sizes)
        lower = np.maximum(upper - 1, 0)
        down, up = sizes - table[lower], table[upper] - sizes
        code = np.where((down < up) | ((down == up) & (lower % 2 == 0)), lower, upper)
        assert np.array_equal(bits(q)[0, :-1].numpy() & 0x7F, code)


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_zero_rows_tiny_rows_and_rows_that_are_not_numbers(scheme, dtype, rng):
    x = torch.randn(7, 33, generator=rng).to(dtype)
    clean = reference.quantize(x, scheme)
    x[1], x[3, 4], x[4, 0], x[5, 32] = 0.0, float("nan"), float("inf"), -float("inf")
    q, scale = reference.quantize(x, scheme)
    assert scale[1].item() == 1.0 and not q[1].float().any()
    assert scale[3:6].isnan().all() and not bits(q)[3:6].any()
    for row in (0, 2, 6):
        assert torch.equal(bits(q)[row], bits(clean[0])[row]) and scale[row] == clean[1][row]
    out = reference.linear(q, scale, torch.ones(2, 33), None, None, torch.float32)
    assert out.isnan().all(-1).tolist() == [False, False, False, True, True, True, False]


def test_subnormal_rows():
    tiny = 2.0**-149
    q, scale = reference.quantize(torch.tensor([[tiny, -tiny], [200 * tiny, -99 * tiny], [0.0, -0.0]]), INT8)
    assert scale.flatten().tolist() == [1.0, 2 * tiny, 1.0], "a scale that underflows counts as an all-zero row"
    assert q.tolist() == [[0, 0], [100, -50], [0, 0]]


def test_a_scheme_without_bound_is_refused():
    with pytest.raises(ValueError, match="bf16 does not quantise rows"):
        reference.quantize(torch.ones(1, 8), SCHEMES["bf16"])


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_quantise_and_lift_commute(scheme, rng):
    for pattern in (*KNOWN, Pattern.parse("6:8x2"), Pattern.parse("12:16@4:8")):
        for offset in (0, 1, pattern.group - 1):
            x = torch.randn(5, (2 * pattern.group + 3) * pattern.unit, generator=rng).bfloat16()
            x[2], x[3, 1] = 0, float("nan")
            q, scale = reference.quantize(x, scheme)
            lifted_q, lifted_scale = reference.quantize(reference.lift(x, pattern, offset), scheme)
            assert torch.equal(bits(scale), bits(lifted_scale))
            assert torch.equal(bits(reference.lift(q, pattern, offset)), bits(lifted_q))


def test_empty_rows():
    for shape in ((0, 8), (3, 0)):
        q, scale = reference.quantize(torch.zeros(shape), INT8)
        assert q.shape == shape and scale.tolist() == [[1.0]] * shape[0]


def edge_rows(scheme) -> list[list[float]]:
    """Rows of eight: zeros, subnormals, the ends of float32, and values half-way between two codes or beyond the last one."""
    tiny, bound = 2.0**-149, scheme.bound
    middles = [k + 0.5 for k in range(7)] if scheme is INT8 else [(low + high) / 2 for low, high in pairwise(E4M3)][8:15]
    return [
        [0.0] * 8,
        [-0.0] * 8,
        [-0.0, tiny] + [0.0] * 6,
        [tiny * size for size in (200, -99, 190, -190, 1, 63, 64, 127)],
        [-tiny * size for size in (190, 60, 61, 62, 63, 64, 65, 66)],
        [3.4028234663852886e38, -3.4028234663852886e38, 1.0, 1e-30, 0.0, -0.0, 1e38, -1e37],
        [bound, *middles],
        [-bound, *(-middle for middle in middles)],
        [bound / 3, *(middle / 3 for middle in middles)],
    ]


@pytest.mark.parametrize("dtype", INPUTS, ids=str)
@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_weights_are_quantised_per_output_channel_as_the_oracle_quantises_rows(scheme, dtype, rng):
    sizes = torch.logspace(-44, 30, 400).unsqueeze(-1)
    spread = torch.randn(400, 37, generator=rng) * sizes * torch.logspace(-8, 8, 37)
    for weight in (spread, -spread.abs(), torch.tensor(edge_rows(scheme)), torch.zeros(0, 8), torch.zeros(3, 0)):
        weight = weight.to(dtype)
        weight = weight[torch.isfinite(weight).all(-1)]
        for ours, oracle in zip(quantize_weight(weight, scheme), reference.quantize(weight, scheme), strict=True):
            assert ours.dtype == oracle.dtype and ours.shape == oracle.shape and torch.equal(bits(ours), bits(oracle))


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_weights_are_refused_where_the_oracle_poisons_a_row(scheme, rng):
    for bad in (float("nan"), float("inf"), -float("inf")):
        for column in (0, 20, 39):
            weight = torch.randn(9, 40, generator=rng)
            weight[6, column] = bad
            (poisoned,) = reference.quantize(weight, scheme)[1].isnan().flatten().nonzero().flatten().tolist()
            with pytest.raises(WeightError, match=f"row {100 + poisoned}, column {column} is {bad}"):
                quantize_weight(weight, scheme, first_row=100)


def test_16_bit_weights_have_no_scales(rng):
    weight = torch.randn(9, 40, generator=rng).bfloat16()
    values, scale = quantize_weight(weight, SCHEMES["bf16"])
    assert torch.equal(values, weight) and scale is None
    with pytest.raises(ValueError, match="quantize_nvfp4"):
        quantize_weight(weight, SCHEMES["nvfp4"])


@pytest.mark.parametrize("name", ["int8", "fp8", "bf16", "fp16"])
def test_weights_must_be_finite(name, rng):
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.randn(4, 16, generator=rng)
        weight[3, 7] = bad
        with pytest.raises(WeightError, match="row 3, column 7"):
            quantize_weight(weight, SCHEMES[name])
    check_finite(torch.full((2, 9), 3e38))


def test_weights_must_fit_float32():
    weight = torch.ones(4, 16, dtype=torch.float64)
    weight[3, 7] = 1e200
    for quantize in (
        partial(quantize_weight, scheme="int8"),
        partial(quantize_weight, scheme="fp8"),
        partial(quantize_nvfp4, global_scale=1.0),
    ):
        with pytest.raises(WeightError, match="row 3, column 7 is inf"):
            quantize(weight)


def test_weights_must_fit_16_bits():
    for name, value in (("fp16", 65520.0), ("bf16", 3.4e38)):
        with pytest.raises(WeightError, match="row 0, column 1"):
            quantize_weight(torch.tensor([[1.0, value]]), SCHEMES[name])


def test_scheme_of_dtype():
    found = {scheme.dtype: scheme_of_dtype(scheme.dtype) for scheme in SCHEMES.values() if not scheme.pair}
    assert all(scheme.dtype == dtype for dtype, scheme in found.items()) and len(found) == 4
    assert scheme_of_dtype(torch.float32) is None and scheme_of_dtype(torch.uint8) is None


def test_ternary_weights_are_rounded_multiples_of_the_mean():
    weight = torch.tensor([[0.26, -0.24, 0.75, -2.0, 0.0, 0.25]])
    assert ternarize(weight, 0.5).tolist() == [[1, 0, 1, -1, 0, 0]]
    assert ternarize(torch.full((1, 2), 2e-5), 0.0).tolist() == [[1, 1]], "the mean is at least 1e-5"


def test_ternary_files_hold_block_b_of_the_rows_in_bits_2b(rng):
    weight = torch.randint(-1, 2, (12, 5), generator=rng).to(torch.int8)
    packed = torch.zeros(3, 5, dtype=torch.uint8)
    for row in range(12):
        packed[row % 3] |= (weight[row] + 1).to(torch.uint8) << 2 * (row // 3)
    assert torch.equal(unpack_ternary(packed), weight)
    packed[1, 2] |= 0b11000000
    with pytest.raises(WeightError, match="code 3 at row 10, column 2"):
        unpack_ternary(packed)


def test_ternary_files_as_transformers_reads_them(rng):
    bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="transformers is not installed")
    weight = torch.randint(-1, 2, (16, 24), generator=rng)
    packed = bitnet.pack_weights(weight.clone())
    with torch.compiler.set_stance("force_eager"):
        theirs = bitnet.unpack_weights(packed, dtype=torch.float32)
    assert torch.equal(unpack_ternary(packed).float(), theirs) and torch.equal(theirs, weight.float())
