"""The oracles of calibrated pruning against each other and against what defines them, before anything is held against them."""

from __future__ import annotations

import pytest
import torch

from pruning_oracles import (
    best_on_support,
    damped,
    grid_of,
    largest_gain,
    layer_error_oracle,
    nearest,
    output_errors,
    quantised_error,
    random_layer,
    rounding_oracle,
    sparsegpt_oracle,
    surgeon_oracle,
    wanda_oracle,
)
from slidesparse import reference
from slidesparse.format import SCHEMES
from slidesparse.packing import find_violation
from slidesparse.pattern import Pattern

PATTERNS = [Pattern.parse(text) for text in ("2:4", "4:6", "6:8", "8:10", "2:3@1:2", "8:12@4:8", "2:4x2", "6:8x2")]
EIGHT_BITS = [SCHEMES["int8"], SCHEMES["fp8"]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [60, 5])
def test_sparsegpt_is_the_optimal_brain_surgeon(pattern, tokens, rng):
    for k in (pattern.unit, 12, 16, 22, 24):
        layer = random_layer(9, k, tokens, rng)
        solution, keep = sparsegpt_oracle(layer.weight, pattern, layer.hessian)
        other, same = surgeon_oracle(layer.weight, pattern, layer.hessian)
        assert torch.equal(keep, same)
        torch.testing.assert_close(solution, other, rtol=1e-7, atol=1e-9)
        assert find_violation(solution.float(), pattern) is None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_leaves_the_columns_not_yet_passed_at_their_best(pattern, rng):
    layer, damping = random_layer(4, 24, 60, rng), 0.05
    h, weight = damped(layer.hessian, damping), layer.weight.double()
    width = pattern.group * pattern.unit
    solution, keep = sparsegpt_oracle(weight, pattern, layer.hessian, damping=damping)
    for first in range(width, 24, width):
        # Given what became of the columns before, the group's weights at their best, from which its mask is chosen.
        change = solution[:, :first] - weight[:, :first]
        best = weight[:, first:] - torch.linalg.solve(h[first:, first:], h[first:, :first] @ change.T).T
        group = keep[:, first : first + width]
        untouched = group.cumprod(-1).bool()  # kept, and nothing of the group gone before
        torch.testing.assert_close(solution[:, first : first + width][untouched], best[:, :width][untouched], rtol=1e-7, atol=1e-9)


def test_sparsegpt_does_not_depend_on_its_blocks(rng):
    layer = random_layer(16, 100, 300, rng)
    for pattern in PATTERNS:
        solution, keep = sparsegpt_oracle(layer.weight, pattern, layer.hessian, block=1)
        for block in (17, 32, 99, 1000):
            other, same = sparsegpt_oracle(layer.weight, pattern, layer.hessian, block=block)
            assert torch.equal(keep, same)
            torch.testing.assert_close(solution, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrong", ["deaf", "blocked", "magnitude", "early", "unsquared"])
def test_every_defect_on_offer_changes_the_solution(wrong, rng):
    layer, pattern = random_layer(16, 96, 300, rng), Pattern(6, 8)
    right, _ = sparsegpt_oracle(layer.weight, pattern, layer.hessian, block=32)
    off, _ = sparsegpt_oracle(layer.weight, pattern, layer.hessian, block=32, wrong=wrong)
    assert (right - off).norm() > 1e-3 * right.norm()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wanda_of_equal_norms_is_magnitude_and_follows_the_norms(pattern, rng):
    for k in (pattern.unit, pattern.group * pattern.unit, 70):
        weight = (torch.randn(30, k, generator=rng) * 3).round()
        assert torch.equal(wanda_oracle(weight, pattern, 4 * torch.eye(k)), reference.prune_mask(weight, pattern))
        norms = torch.randint(0, 4, (k,), generator=rng).double()
        assert torch.equal(wanda_oracle(weight, pattern, norms.square().diag()), reference.prune_mask(weight * norms, pattern))


def test_the_best_on_a_support_is_stationary_and_below_all_others(rng):
    for tokens in (200, 6):
        layer = random_layer(5, 20, tokens, rng)
        mask = torch.rand(5, 20, generator=rng) < 0.7
        best = best_on_support(layer.weight, mask, layer.hessian)
        assert not best[~mask].any()
        gradient = (best - layer.weight.double()) @ layer.hessian.double()
        assert gradient[mask].abs().max() < 1e-6 * (layer.weight.double() @ layer.hessian.double()).abs().max()
        least = output_errors(layer.weight, best, layer.hessian)
        for _ in range(50):
            other = best + mask * torch.randn(best.shape, generator=rng, dtype=torch.float64) * layer.weight.std() * 0.1
            assert (output_errors(layer.weight, other, layer.hessian) >= least * (1 - 1e-6)).all()


def test_the_layer_error_is_that_of_the_outputs(rng):
    x = torch.randn(50, 12, generator=rng, dtype=torch.float64)
    weight, solution = (torch.randn(7, 12, generator=rng, dtype=torch.float64) for _ in range(2))
    expected = (x @ (solution - weight).T).square().sum() / (x @ weight.T).square().sum()
    assert layer_error_oracle(weight, solution, x.T @ x / 50) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("scheme", EIGHT_BITS, ids=lambda scheme: scheme.name)
def test_the_best_rounding_is_no_worse_than_the_nearest_and_has_no_better_neighbour(scheme, rng):
    grid = grid_of(scheme)
    assert len(grid) == {"int8": 255, "fp8": 253}[scheme.name]
    assert grid[[0, -1]].tolist() == [-scheme.bound, scheme.bound] and grid[len(grid) // 2 + 1] == {"int8": 1, "fp8": 2**-9}[scheme.name]
    strictly = 0
    for _ in range(10):
        layer = random_layer(2, 5, 40, rng)
        solution, _ = sparsegpt_oracle(layer.weight, Pattern(2, 4), layer.hessian)
        scale = solution.abs().amax(-1, keepdim=True) / scheme.bound
        best = rounding_oracle(solution, layer.weight, layer.hessian, scale, scheme, reach=2)
        plain = grid[nearest(solution / scale, grid)]
        least, simple = (quantised_error(values, scale, layer.weight, layer.hessian) for values in (best, plain))
        strictly += least < simple
        assert least <= simple
        assert not best[solution == 0].any()
        if (nearest(best, grid) - nearest(plain, grid)).abs().max() < 2:  # else a neighbour was not among those tried
            assert largest_gain(best, scale, solution, layer.weight, layer.hessian, scheme) <= 1e-12
    assert strictly
