"""Calibrated pruning: Wanda, SparseGPT and ADMM against the float64 oracles, on odd shapes, and on statistics that must be refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import geometric_mean

import pytest
import torch
from torch import Tensor

from pruning_oracles import (
    Layer,
    best_on_support,
    damped,
    damped_error,
    excess,
    layer_error_oracle,
    output_errors,
    random_layer,
    sparsegpt_oracle,
    varied_layers,
    wanda_oracle,
)
from slidesparse import reference
from slidesparse.errors import WeightError
from slidesparse.packing import find_violation, integer_view
from slidesparse.pattern import Pattern
from slidesparse.pruning import Statistics, admm, layer_error, prune, sparsegpt, wanda
from slidesparse.pruning.admm import _support
from slidesparse.pruning.sparsegpt import sweep
from slidesparse.pruning.statistics import Scaled
from test_prune import EVERY

METHODS = {"wanda": wanda, "sparsegpt": sparsegpt, "admm": admm}
CORRECTING = ("sparsegpt", "admm")
PATTERNS = [Pattern.parse(text) for text in ("2:4", "4:6", "6:8", "8:10", "14:16", "6:8x2")]

pytestmark = pytest.mark.usefixtures("one_thread")
every_method = pytest.mark.parametrize("method", METHODS)
every_correcting = pytest.mark.parametrize("method", CORRECTING)


def statistics_of(layer: Layer) -> Statistics:
    return Statistics(layer.hessian, layer.norms)


def run(method: str, layer: Layer, pattern: Pattern, **options: float) -> Tensor:
    return METHODS[method](layer.weight, pattern, statistics_of(layer), **options)


def error(layer: Layer, solution: Tensor) -> float:
    return layer_error_oracle(layer.weight, solution, layer.hessian)


def bitwise(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(integer_view(one), integer_view(other))


def going(pattern: Pattern, k: int) -> Tensor:
    """How many units each group of a row of ``k`` weights loses: int ``[groups]``."""
    widths = [min(pattern.group, pattern.units(k) - first) for first in range(0, pattern.units(k), pattern.group)]
    return torch.tensor([max(0, pattern.dropped - (pattern.group - width)) for width in widths], dtype=torch.long)


def units_gone(solution: Tensor, pattern: Pattern) -> Tensor:
    """Units that are zero throughout, by group: int ``[N, groups]``; fails where a unit is zero in part."""
    zero = (solution == 0).unflatten(-1, (pattern.units(solution.shape[1]), pattern.unit))
    assert torch.equal(zero.any(-1), zero.all(-1)), "half a pair is gone"
    zero = torch.nn.functional.pad(zero.all(-1), (0, -zero.shape[1] % pattern.group))
    return zero.unflatten(-1, (pattern.groups(solution.shape[1]), pattern.group)).sum(-1)


# Wanda.


@pytest.mark.parametrize("pattern", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_wanda_is_bitwise_the_oracle(pattern, dtype, rng):
    """Weights and norms of a few bits: scores are exact in float32 and tie everywhere."""
    for units in (1, pattern.group - 1, pattern.group, pattern.group + 1, 5 * pattern.group + 2):
        k = units * pattern.unit
        weight = (torch.randn(9, k, generator=rng) * 3).round().div(2).to(dtype)
        norms = torch.randint(0, 16, (k,), generator=rng).float() / 8
        keep = wanda_oracle(weight, pattern, norms.double().square().diag())
        expected = torch.where(keep & (weight != 0), weight, torch.zeros((), dtype=dtype))
        for hessian in (None, norms.square().diag()):
            assert bitwise(wanda(weight, pattern, Statistics(hessian, norms)), expected)


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_wanda_of_any_weights_keeps_the_oracles_scores(pattern, rng):
    """Scores that only float64 tells apart may change places; what is kept has the same total."""
    layer = random_layer(16, 90, 300, rng)
    pruned, keep = run("wanda", layer, pattern), wanda_oracle(layer.weight, pattern, layer.hessian)
    assert torch.equal(pruned[pruned != 0], layer.weight[pruned != 0])
    assert (units_gone(pruned, pattern) == going(pattern, 90)).all()
    scores = layer.weight.double().abs() * layer.hessian.double().diagonal().sqrt()
    torch.testing.assert_close((scores * (pruned != 0)).sum(-1), (scores * keep).sum(-1), rtol=1e-7, atol=0)


# SparseGPT.


def close(layer: Layer, solution: Tensor, oracle: tuple[Tensor, Tensor]) -> bool:
    """Masks equal in nine rows of ten; of these rows the weights to 3 digits, and the layer's error within 1 %.

    Two scores that differ in the last bit of float32 may change places, and one such change moves many others behind it in its row.
    """
    expected, keep = oracle
    rows = ((solution != 0) == keep).all(-1)
    if rows.double().mean() < 0.9:
        return False
    distance = (solution.double() - expected)[rows].norm() / expected[rows].norm()
    ours, theirs = (layer_error_oracle(layer.weight[rows], one[rows], layer.hessian) for one in (solution, expected))
    return bool(distance < 1e-3) and ours == pytest.approx(theirs, rel=0.01, abs=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("k", [96, 250])
def test_sparsegpt_is_the_oracle(pattern, k, rng):
    for tokens, block, damping in ((4 * k, 128, 0.01), (k // 3, 32, 0.01), (2 * k, 1, 0.1), (2 * k, 1000, 0.01)):
        layer = random_layer(32, k, tokens, rng)
        solution = run("sparsegpt", layer, pattern, block=block, damping=damping)
        assert solution.dtype == torch.float32
        assert close(layer, solution, sparsegpt_oracle(layer.weight, pattern, layer.hessian, block, damping)), (tokens, block)


@pytest.mark.parametrize("wrong", ["deaf", "blocked", "magnitude", "early", "unsquared"])
def test_the_comparison_with_the_oracle_finds(wrong, rng):
    layer, pattern = random_layer(32, 128, 400, rng), Pattern(6, 8)
    solution = run("sparsegpt", layer, pattern, block=32)
    assert close(layer, solution, sparsegpt_oracle(layer.weight, pattern, layer.hessian, 32))
    assert not close(layer, solution, sparsegpt_oracle(layer.weight, pattern, layer.hessian, 32, wrong=wrong))


def test_sparsegpt_is_below_wanda(rng):
    for pattern in PATTERNS:
        layer = random_layer(32, 96, 400, rng)
        assert error(layer, run("sparsegpt", layer, pattern)) < error(layer, run("wanda", layer, pattern))


# ADMM.


def test_admm_is_no_worse_than_sparsegpt_on_any_row_and_far_better_on_most(rng):
    """Each row keeps the better of two solutions, one of them SparseGPT's, as the damped Hessian has it."""
    shares = []
    for pattern, layer in varied_layers(150, PATTERNS, rng):
        solutions, h = [run(method, layer, pattern) for method in ("admm", "sparsegpt")], damped(layer.hessian, 0.01)
        ours, theirs = (output_errors(layer.weight, solution, h) for solution in solutions)
        noise = 1e-6 * output_errors(layer.weight, torch.zeros_like(layer.weight), h)
        assert (ours <= theirs * (1 + 1e-5) + noise).all(), (str(pattern), layer.weight.shape, layer.tokens)
        shares.append(error(layer, solutions[0]) / error(layer, solutions[1]))
    assert geometric_mean(shares) < 0.6


def test_each_row_has_the_better_of_both_supports_once_they_are_corrected(rng):
    """A support is worth what its best weights are: SparseGPT's own weights are far from these."""
    behind = []
    for pattern, layer in varied_layers(40, PATTERNS, rng):
        problem, h = Scaled.of(statistics_of(layer), 0.01), damped(layer.hessian, 0.01)
        target = (layer.weight * problem.scale).t().contiguous()
        supports = _support(target, problem.hessian @ target, pattern, problem.hessian, 300).t(), sweep(target.t(), pattern, problem)
        least = [output_errors(layer.weight, best_on_support(layer.weight, support != 0, h), h) for support in supports]
        ours = output_errors(layer.weight, run("admm", layer, pattern), h)
        behind.append(float(ours.sum() / torch.minimum(*least).sum()) - 1)
    assert sorted(behind)[len(behind) * 9 // 10] < 0.03, behind


def test_admms_weights_are_the_best_on_their_support(rng):
    for pattern, layer in varied_layers(60, PATTERNS, rng):
        case = str(pattern), layer.weight.shape, layer.tokens
        solution = run("admm", layer, pattern, refinements=300, tolerance=1e-7)
        assert find_violation(solution, pattern) is None
        assert -1e-6 < excess(layer, solution) < 1e-3, case
        assert excess(layer, run("admm", layer, pattern)) < 5e-3, case
        assert excess(layer, torch.where(solution != 0, layer.weight, 0)) > 1e-3, "uncorrected weights would pass, too"


# All of them.


@every_method
@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_exactly_the_dropped_go_and_nothing_is_written_to(method, pattern, rng):
    for units in (1, pattern.group - 1, pattern.group, 2 * pattern.group, 3 * pattern.group + pattern.dropped - 1):
        k = units * pattern.unit
        for n in (1, 5):
            layer = random_layer(n, k, 8 * k, rng)
            before = [tensor.clone() for tensor in (layer.weight, layer.hessian, layer.norms)]
            solution = run(method, layer, pattern)
            assert all(torch.equal(*pair) for pair in zip(before, (layer.weight, layer.hessian, layer.norms), strict=True))
            assert solution.shape == (n, k) and bool(torch.isfinite(solution).all())
            assert (units_gone(solution, pattern) == going(pattern, k)).all()
            assert not torch.signbit(solution[solution == 0]).any()
            assert find_violation(solution, pattern) is None
            assert bitwise(solution, run(method, layer, pattern)), "a second run differs"


@every_method
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_rows_or_columns(method, pattern, rng):
    for n, k in ((0, 48), (0, 50), (3, 0), (0, 0)):
        layer = Layer(torch.zeros(n, k), torch.eye(k), 10)
        assert run(method, layer, pattern).shape == (n, k)
        assert prune(layer.weight, pattern, method, statistics=statistics_of(layer)).shape == (n, k)


@every_method
def test_views_and_16_bit_weights(method, rng):
    layer, pattern = random_layer(24, 50, 200, rng), Pattern(6, 8)
    plain = run(method, layer, pattern)
    view = dataclasses.replace(layer, weight=layer.weight.t().contiguous().t(), hessian=layer.hessian.t().contiguous().t())
    assert not view.weight.is_contiguous() and not view.hessian.is_contiguous()
    torch.testing.assert_close(run(method, view, pattern), plain, rtol=1e-4, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        half = dataclasses.replace(layer, weight=layer.weight.to(dtype))
        solution = run(method, half, pattern)
        assert solution.dtype == (dtype if method == "wanda" else torch.float32)
        assert bitwise(solution.float(), run(method, dataclasses.replace(layer, weight=half.weight.float()), pattern))


@every_method
def test_what_comes_back_is_contiguous_as_files_need_it(method, rng):
    assert run(method, random_layer(6, 32, 100, rng), Pattern(6, 8)).is_contiguous()


@every_method
def test_minus_zeros_do_not_come_through(method, rng):
    layer = random_layer(6, 32, 100, rng)
    weight = torch.where(torch.rand(6, 32, generator=rng) < 0.5, -0.0, layer.weight)
    solution = run(method, dataclasses.replace(layer, weight=weight), Pattern(6, 8))
    assert not torch.signbit(solution[solution == 0]).any()
    assert find_violation(solution, Pattern(6, 8)) is None


@every_method
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dead_inputs_and_silent_layers(method, pattern, rng):
    layer = random_layer(8, 64, 300, rng, dead=20)
    assert (layer.norms == 0).sum() == 20
    solution = run(method, layer, pattern)
    assert bool(torch.isfinite(solution).all()) and find_violation(solution, pattern) is None
    oracle, keep = sparsegpt_oracle(layer.weight, pattern, layer.hessian)
    if method == "sparsegpt":
        same = ((solution != 0) == keep).all(-1)
        assert same.sum() >= 7, "a score that differs in its last bit may change a row"
        ours, theirs = (output_errors(layer.weight, one, layer.hessian)[same].sum() for one in (solution, oracle))
        assert ours <= 1.01 * theirs
    if method == "admm":
        assert damped_error(layer, solution) <= 1.001 * damped_error(layer, oracle)
    silent = Layer(layer.weight, torch.zeros(64, 64), 300)
    solution = run(method, silent, pattern)
    assert bool(torch.isfinite(solution).all()) and (units_gone(solution, pattern) == going(pattern, 64)).all()


@every_correcting
@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_inputs_that_tell_nothing_give_magnitude(method, pattern, rng):
    """No two weights are of one size, or nearly so: which of these goes may turn on a last bit."""
    weight = (torch.randperm(16 * 70, generator=rng) + 1.0).view(16, 70) / 400
    weight *= torch.randint(2, weight.shape, generator=rng) * 2 - 1
    for loudness in (1e-6, 1.0, 1e6):
        layer = Layer(weight, loudness * torch.eye(70), 200)
        solution, expected = run(method, layer, pattern), reference.prune(weight, pattern)
        if pattern.unit == 1:
            torch.testing.assert_close(solution, expected, rtol=1e-5, atol=1e-6)
        else:  # SparseGPT squares before it sums a pair
            assert error(layer, solution) <= error(layer, expected) * (1 + 1e-5)


@every_method
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_fewer_tokens_than_inputs(method, pattern, rng):
    for tokens in (1, 3, 40):
        layer = random_layer(12, 80, tokens, rng)
        solution = run(method, layer, pattern)
        assert bool(torch.isfinite(solution).all()) and (units_gone(solution, pattern) == going(pattern, 80)).all()
        assert method == "wanda" or error(layer, solution) < error(layer, run("wanda", layer, pattern))


@every_correcting
def test_the_units_of_inputs_and_outputs_do_not_matter(method, rng):
    """Powers of two change no digit of what is computed, unless something absolute is added somewhere."""
    layer, pattern = random_layer(12, 64, 300, rng), Pattern(6, 8)
    plain = run(method, layer, pattern)
    for power in (-30, 30):
        louder = dataclasses.replace(layer, hessian=layer.hessian * 2.0**power)
        torch.testing.assert_close(run(method, louder, pattern), plain, rtol=1e-5, atol=1e-7)
        larger = dataclasses.replace(layer, weight=layer.weight * 2.0**power)
        torch.testing.assert_close(run(method, larger, pattern) / 2.0**power, plain, rtol=1e-5, atol=1e-7)


@every_correcting
def test_two_inputs_that_are_one(method, rng):
    """Loud twins: the Hessian is as far from being invertible as damping lets it be."""
    for k in (64, 256):
        layer = random_layer(16, k, 4 * k, rng)
        hessian = layer.hessian.clone()
        hessian[[5, 40]] = hessian[[5, 5]] * 100
        hessian[:, [5, 40]] = hessian[:, [5, 5]] * 100
        layer = dataclasses.replace(layer, hessian=hessian)
        solution = run(method, layer, Pattern(6, 8))
        oracle, _ = sparsegpt_oracle(layer.weight, Pattern(6, 8), layer.hessian)
        assert damped_error(layer, solution) < {"sparsegpt": 1.05, "admm": 1.001}[method] * damped_error(layer, oracle)


@every_correcting
def test_inputs_so_alike_that_float32_cannot_hold_the_inverse(method, rng):
    hessian = torch.eye(32)
    hessian[:24, :24] = 1 - 2**-23
    hessian.fill_diagonal_(1)
    layer = Layer(torch.randn(6, 32, generator=rng), hessian, 100)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(torch.linalg.inv(hessian.double()).float(), upper=True)
    solution = run(method, layer, Pattern(6, 8), damping=0.0)
    oracle, _ = sparsegpt_oracle(layer.weight, Pattern(6, 8), layer.hessian, damping=0.0)
    assert error(layer, solution) < 1.05 * error(layer, oracle)


@every_correcting
def test_a_hessian_that_is_not_positive_definite_is_one_line(method, rng):
    layer = random_layer(6, 32, 100, rng)
    with pytest.raises(WeightError, match=r"^the second moments of the inputs are not positive definite: use more calibration samples$"):
        run(method, dataclasses.replace(layer, hessian=torch.ones(32, 32) - 0.5 * torch.eye(32)), Pattern(6, 8))


def test_layer_error(rng):
    layer = random_layer(20, 64, 200, rng)
    for solution in (run("wanda", layer, Pattern(2, 4)), run("sparsegpt", layer, Pattern(2, 4)), torch.zeros(20, 64)):
        assert layer_error(layer.weight, solution, statistics_of(layer)) == pytest.approx(error(layer, solution), rel=1e-3)
    assert layer_error(layer.weight, layer.weight.clone(), statistics_of(layer)) == 0
    assert layer_error(layer.weight, solution, Statistics(torch.zeros(64, 64), torch.zeros(64))) == 0


# The door.


@every_method
def test_the_door_gives_what_the_method_gives(method, rng):
    layer = random_layer(10, 44, 200, rng)
    for pattern in PATTERNS:
        expected = run(method, layer, pattern)
        assert bitwise(prune(layer.weight, pattern, method, statistics=statistics_of(layer)), expected)


@every_correcting
def test_weights_too_large_to_correct_are_refused(method, rng):
    layer = random_layer(4, 16, 50, rng)
    weight = layer.weight.clone()
    weight[2] = 3e38
    with pytest.raises(WeightError, match=rf"^pruned by {method}, weight: value at row 2, column \d+ is (nan|inf|-inf); "):
        prune(weight, Pattern(6, 8), method, statistics=statistics_of(layer))


def damaged(**fields: Callable[[Statistics], object]) -> Callable[[Statistics], Statistics]:
    return lambda whole: dataclasses.replace(whole, **{name: change(whole) for name, change in fields.items()})


def with_value(tensor: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


REFUSED = [
    *((damaged(norms=lambda s, v=v: with_value(s.norms, (3,), v)), "norms") for v in (float("nan"), float("inf"))),
    *((damaged(hessian=lambda s, v=v: with_value(s.hessian, (2, 5), v)), "hessian") for v in (float("nan"), -float("inf"))),
    (damaged(norms=lambda s: s.norms[:-1]), "norms.*15.*16"),
    (damaged(norms=lambda s: s.norms.unsqueeze(0)), "norms"),
    (damaged(hessian=lambda s: s.hessian[:-1]), "hessian.*15, 16.*16, 16"),
    (damaged(hessian=lambda s: s.hessian[0]), "hessian"),
]


@every_method
@pytest.mark.parametrize(("damage", "named"), REFUSED)
def test_statistics_that_are_refused(method, damage, named, rng):
    layer = random_layer(4, 16, 50, rng)
    with pytest.raises(WeightError, match=named):
        prune(layer.weight, Pattern(6, 8), method, statistics=damage(statistics_of(layer)))


@every_method
def test_other_refusals(method, rng):
    layer, pattern = random_layer(4, 16, 50, rng), Pattern(6, 8)
    norms_only = Statistics(None, layer.norms)
    with pytest.raises(ValueError, match="statistics"):
        prune(layer.weight, pattern, method)
    if method in CORRECTING:
        with pytest.raises(WeightError, match="norms only"):
            prune(layer.weight, pattern, method, statistics=norms_only)
    with pytest.raises(WeightError, match="row 1, column 2"):
        prune(with_value(layer.weight, (1, 2), float("nan")), pattern, method, statistics=statistics_of(layer))
    odd = random_layer(4, 15, 50, rng)
    with pytest.raises(ValueError, match="K = 15"):
        prune(odd.weight, Pattern.parse("6:8x2"), method, statistics=statistics_of(odd))
