"""Rounding to 8 bits with the layer error in view: against nearest rounding, and against every single step on the grid."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pruning_oracles import Layer, largest_gain, output_errors, quantised_error, random_layer, rounding_oracle
from slidesparse import reference
from slidesparse.format import SCHEMES, Scheme
from slidesparse.packing import integer_view
from slidesparse.pattern import Pattern
from slidesparse.pruning import Statistics, round_to_grid, sparsegpt, wanda

pytestmark = pytest.mark.usefixtures("one_thread")
every_scheme = pytest.mark.parametrize("scheme", [SCHEMES["int8"], SCHEMES["fp8"]], ids=lambda scheme: scheme.name)
PATTERNS = [Pattern.parse(text) for text in ("2:4", "6:8", "14:16", "6:8x2")]


def statistics_of(layer: Layer) -> Statistics:
    return Statistics(layer.hessian, layer.norms)


def draw(rng: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), generator=rng))


def layers(count: int, rng: torch.Generator, widest: int = 96) -> Iterator[tuple[Layer, Tensor]]:
    """Layers of many kinds, and their weights pruned with and without correction."""
    for i in range(count):
        k = 2 * draw(rng, 2, widest // 2 + 1)
        mixed = (0, 0.1, 1)[draw(rng, 0, 3)]
        layer = random_layer(draw(rng, 1, 24), k, draw(rng, 2, 5 * k), rng, mixed=mixed, decay=mixed * 1.5, dead=draw(rng, 0, 2))
        yield layer, (sparsegpt, wanda)[i % 2](layer.weight, PATTERNS[i % len(PATTERNS)], statistics_of(layer))


@every_scheme
def test_no_layer_and_no_row_is_worse_than_by_nearest_rounding(scheme: Scheme, rng):
    better = 0
    for layer, solution in layers(60, rng):
        values, scale = round_to_grid(solution, layer.weight, statistics_of(layer), scheme)
        nearest, expected = reference.quantize(solution, scheme)
        assert values.dtype == scheme.dtype and values.shape == solution.shape
        assert scale.dtype == torch.float32 and torch.equal(scale, expected)
        ours, plain = (output_errors(layer.weight, x.double() * scale.double(), layer.hessian) for x in (values, nearest))
        noise = 1e-6 * output_errors(layer.weight, torch.zeros_like(layer.weight), layer.hessian)
        assert (ours <= plain * (1 + 1e-5) + noise).all()
        total, before = (quantised_error(x, scale, layer.weight, layer.hessian) for x in (values, nearest))
        assert total <= before * (1 + 1e-6)
        better += total < 0.99 * before
    assert better > 30, "rounding that looks at the layer error gains on most layers"


@every_scheme
def test_zeros_stay_plus_zeros(scheme: Scheme, rng):
    for layer, solution in layers(20, rng):
        values, _ = round_to_grid(solution, layer.weight, statistics_of(layer), scheme)
        assert not integer_view(values)[solution == 0].any()


@every_scheme
def test_no_step_of_one_weight_makes_it_better(scheme: Scheme, rng):
    gains, by_nearest = [], []
    for layer, solution in layers(40, rng, widest=8):
        values, scale = round_to_grid(solution, layer.weight, statistics_of(layer), scheme, sweeps=200)
        gains.append(largest_gain(values, scale, solution, layer.weight, layer.hessian, scheme))
        by_nearest.append(largest_gain(*reference.quantize(solution, scheme), solution, layer.weight, layer.hessian, scheme))
    assert max(gains) < 1e-7, sorted(gains)[-5:]
    assert max(by_nearest) > 1e-7, "nearest rounding would pass, too"


@every_scheme
def test_often_the_best_of_all_roundings(scheme: Scheme, rng):
    reached = 0
    for _ in range(20):
        layer = random_layer(1, 5, 40, rng)
        solution = sparsegpt(layer.weight, Pattern(2, 4), statistics_of(layer))
        values, scale = round_to_grid(solution, layer.weight, statistics_of(layer), scheme)
        best = rounding_oracle(solution, layer.weight, layer.hessian, scale, scheme, reach=2)
        least = quantised_error(best, scale, layer.weight, layer.hessian)
        reached += quantised_error(values, scale, layer.weight, layer.hessian) <= least * 1.001
    assert reached >= 8


@every_scheme
def test_odd_inputs(scheme: Scheme, rng):
    layer = random_layer(5, 24, 60, rng)
    solution = sparsegpt(layer.weight, Pattern(6, 8), statistics_of(layer))
    solution[2] = 0
    before = [tensor.clone() for tensor in (solution, layer.weight, layer.hessian)]
    values, scale = round_to_grid(solution, layer.weight, statistics_of(layer), scheme)
    assert all(torch.equal(*pair) for pair in zip(before, (solution, layer.weight, layer.hessian), strict=True))
    assert scale[2] == 1 and not values[2].float().any()
    again, same = round_to_grid(solution.t().contiguous().t(), layer.weight, statistics_of(layer), scheme)
    assert torch.equal(integer_view(again), integer_view(values)) and torch.equal(same, scale)
    half = layer.weight.bfloat16()
    plain = round_to_grid(solution, half.float(), statistics_of(layer), scheme)[0]
    assert torch.equal(integer_view(round_to_grid(solution, half, statistics_of(layer), scheme)[0]), integer_view(plain))
    silent = Statistics(torch.zeros(24, 24), torch.zeros(24))
    unmoved = round_to_grid(solution, layer.weight, silent, scheme)[0]
    assert torch.equal(unmoved.float(), reference.quantize(solution, scheme)[0].float()), "no input gives a reason to move"
    for n, k in ((0, 24), (3, 0), (1, 1)):
        values, scale = round_to_grid(torch.ones(n, k), torch.ones(n, k), Statistics(torch.eye(k), torch.ones(k)), scheme)
        assert values.shape == (n, k) and scale.shape == (n, 1)
        assert bool((values.abs().float() == scheme.bound).all())
