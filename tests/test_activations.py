"""What may stand in front of an 8-bit product: which inputs the fused kernels are launched on, and how they are told apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from slidesparse.gemm import activations
from slidesparse.gemm.activations import call_for, inputs_of, kind_of, quantized
from test_sums import made, normed, swiglu

M, K = 5, 96
WRONG: list[tuple[Callable, dict[str, Callable]]] = [
    (normed, {"residual": lambda t: t.float()}),
    (normed, {"residual": lambda t: t[:1]}),
    (normed, {"residual": lambda t: t[0]}),
    (normed, {"weight": lambda t: t.float()}),
    (normed, {"weight": lambda t: t[:16]}),
    (normed, {"scale": lambda t: t.double()}),
    (normed, {"scale": lambda t: t[:1]}),
    (swiglu, {"scale": lambda t: torch.cat((t, t), 1)[:, :1]}),
    (swiglu, {"channel": lambda t: torch.cat((t, t))[:, ::2]}),
    (swiglu, {"scale": lambda t: None}),  # channel scales alone
    (swiglu, {"gate_up": lambda t: t[:, 1:]}),  # gates without an up
]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are kernels; none is launched."""
    for name in ("quantize_call", "silu_call", "norm_call"):
        monkeypatch.setattr(activations, name, lambda *arguments, **options: arguments)
    monkeypatch.setattr(activations, "runs_kernels", lambda device, dtype: True)


@pytest.mark.parametrize(("before", "change"), WRONG, ids=[f"{before.__name__} {number}" for number, (before, _) in enumerate(WRONG)])
def test_what_the_kernels_cannot_read_is_not_launched(before: Callable, change: dict[str, Callable], kernels: None) -> None:
    weights = made(32, K, "int8")[0]
    problem, right = weights.problem(torch.bfloat16, torch.device("cpu"), None), before(M, K, True)
    wrong = right._replace(**{name: changed(getattr(right, name)) for name, changed in change.items()})
    assert call_for(problem, right, problem.pattern, 144) is not None and call_for(problem, wrong, problem.pattern, 144) is None
    assert kind_of(right) != kind_of(wrong)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6, 9, 10])
def test_the_op_says_what_is_wrong(number: int) -> None:
    before, change = WRONG[number]
    problem, right = made(32, K, "int8")[0].problem(torch.bfloat16, torch.device("cpu"), None), before(M, K, True)
    with pytest.raises(ValueError, match=r"must|give both"):
        quantized(problem, right._replace(**{name: changed(getattr(right, name)) for name, changed in change.items()}))


def test_absent_scales_are_stood_in_for() -> None:
    other = torch.zeros(1)
    for x in (swiglu(M, K, False), normed(M, K, False)):
        assert sum(tensor is other for tensor in inputs_of(x, other)) == 3  # token scales, channel scales, bias
    assert inputs_of(other, other) == (other,)
