"""Layers that nobody measured: predicted routes on cards whose constants come with the package."""

from __future__ import annotations

from sys import maxsize

import pytest
import torch

from slidesparse.format import SCHEMES
from slidesparse.gemm import Cell, Plan, Problem, key_of
from slidesparse.gemm.explain import summary
from slidesparse.gemm.machine import Machine
from slidesparse.gemm.predict import MANY, WANTED, predicted_gains, predicted_steps
from slidesparse.nn import SlideSparseLinear
from slidesparse.ops import sm90
from slidesparse.pattern import Pattern
from slidesparse.pruning import prune

CARD = "NVIDIA H200"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel could be compiled here."""
    monkeypatch.setattr("slidesparse.ops.sm90.unavailable", lambda: None)


def posed(n: int, k: int, pattern: str, scheme: str) -> Problem:
    return Problem(n, k, Pattern.parse(pattern), SCHEMES[scheme], (9, 0), torch.bfloat16)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize(("n", "k"), [(4608, 3584), (37888, 3584), (3584, 18944)])
def test_two_of_four_runs_on_sparse_tensor_cores_for_any_number_of_tokens(n: int, k: int, scheme: str) -> None:
    steps = predicted_steps(posed(n, k, "2:4", scheme), CARD)
    assert {(route.layout, route.kernel) for _, route in steps} == {("tiled", "sm90")}
    assert steps[-1][0] == maxsize and [most for most, _ in steps] == sorted(most for most, _ in steps)
    assert min(predicted_gains(posed(n, k, "2:4", scheme), CARD)[m] for m in MANY) >= WANTED


@pytest.mark.usefixtures("compiler")
def test_what_gains_little_or_lies_on_another_card_is_left_to_dense_weights() -> None:
    for n, k, pattern, scheme in ((4608, 3584, "6:8", "fp8"), (37888, 3584, "4:6", "int8"), (512, 2048, "2:4", "fp8")):
        assert predicted_gains(posed(n, k, pattern, scheme), CARD) and not predicted_steps(posed(n, k, pattern, scheme), CARD)
    assert not predicted_gains(posed(37888, 3584, "2:4", "int8"), "NVIDIA H100 80GB HBM3")


def test_nothing_is_predicted_of_a_kernel_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidesparse.ops.sm90.unavailable", lambda: "there is no compiler")
    assert not predicted_gains(posed(37888, 3584, "2:4", "int8"), CARD)


@pytest.mark.usefixtures("compiler")
def test_inspect_says_that_a_route_is_predicted() -> None:
    plan = Plan(Machine(CARD, "", "", "", "", ""))
    assert summary(plan, posed(4608, 3584, "2:4", "fp8")).startswith("not measured: tiled runs, predicted 1.2")
    assert summary(plan, posed(4608, 3584, "6:8", "fp8")) == "not measured: dense runs"
    plan.add(key_of(posed(4608, 3584, "2:4", "fp8")), Cell(16))
    assert summary(plan, posed(4608, 3584, "2:4", "fp8")).startswith("not measured: tiled runs"), "of times that have gone nothing is left"


@pytest.mark.usefixtures("compiler")
def test_the_numbers_of_tokens_that_are_asked_for_decide() -> None:
    many, few = posed(4608, 3584, "2:4", "fp8"), posed(37888, 3584, "2:4", "fp8")
    assert not predicted_steps(many, CARD, tokens=(1, 16)), "1.07 for few tokens is not clear"
    assert predicted_steps(few, CARD, tokens=(1, 16)) and predicted_steps(many, CARD, tokens=(4096,))


@pytest.mark.needs_gpu
def test_a_layer_that_nobody_measured_runs_the_predicted_route() -> None:
    if torch.cuda.get_device_name() not in sm90.RATES:
        pytest.skip("no constants for this card")
    weight = prune(torch.randn(3992, 3008, device="cuda"), Pattern(2, 4)).bfloat16()
    layer = SlideSparseLinear.from_dense(weight, pattern="2:4", scheme="bf16")
    x = torch.randn(2048, 3008, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    expected = x.double() @ weight.double().t()
    assert float((y - expected).norm() / expected.norm()) < 0.005
    assert {(route.layout, route.kernel) for _, route in layer._runner.ready.routes} == {("tiled", "sm90")}
