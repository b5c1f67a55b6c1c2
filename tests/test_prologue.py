"""What may stand in front of an 8-bit product: which inputs the fused kernels are launched on, and how they are told apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from layers import normed, swiglu, tokens
from slidesparse import reference
from slidesparse.format import SCHEMES
from slidesparse.ops import prologue
from slidesparse.ops.prologue import Gated, Normed, inputs_of, launch_for, quantiser, quantized, signature
from slidesparse.pattern import Pattern
from slidesparse.tolerance import check_bitwise

M, K = 5, 96
SIX, INT8 = Pattern.parse("6:8"), SCHEMES["int8"]
WRONG: list[tuple[Callable, dict[str, Callable]]] = [
    (normed, {"residual": lambda t: t.float()}),
    (normed, {"residual": lambda t: t[:1]}),
    (normed, {"residual": lambda t: t[0]}),
    (normed, {"weight": lambda t: t.float()}),
    (normed, {"weight": lambda t: t[:16]}),
    (swiglu, {"gate_up": lambda t: t[:, 1:]}),  # gates without an up
]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are kernels; none is launched."""
    for name in ("quantize_call", "silu_call", "norm_call"):
        monkeypatch.setattr(prologue, name, lambda *arguments, **options: arguments)
    monkeypatch.setattr(prologue, "runs_kernels", lambda device, dtype: True)


def changed(right: Gated | Normed, change: dict[str, Callable]) -> Gated | Normed:
    return right._replace(**{name: one(getattr(right, name)) for name, one in change.items()})


@pytest.mark.parametrize(("before", "change"), WRONG, ids=[f"{before.__name__} {number}" for number, (before, _) in enumerate(WRONG)])
def test_what_the_kernels_cannot_read_is_not_launched(before: Callable, change: dict[str, Callable], kernels: None) -> None:
    right = before(M, K)
    wrong = changed(right, change)
    assert launch_for(right, torch.int8, SIX, 144) is not None and launch_for(wrong, torch.int8, SIX, 144) is None
    assert signature(right) != signature(wrong)


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_the_op_says_what_is_wrong(number: int) -> None:
    before, change = WRONG[number]
    with pytest.raises(ValueError, match="must"):
        quantized(changed(before(M, K), change), INT8, SIX, 144, 1)


def test_no_launch_where_rows_are_strided_or_no_kernel_runs(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(M, K)
    assert launch_for(x, torch.int8, SIX, 144) is not None and launch_for(x.t().contiguous().t(), torch.int8, SIX, 144) is None
    monkeypatch.setattr(prologue, "runs_kernels", lambda device, dtype: False)
    assert launch_for(x, torch.int8, SIX, 144) is None


def test_a_launch_is_given_what_stands_for_the_activations() -> None:
    x, gated, behind = tokens(M, K), swiglu(M, K), normed(M, K)
    for one, given in ((x, [x]), (gated, [gated.gate_up]), (behind, [behind.x, behind.weight, behind.residual, behind.total])):
        assert all(tensor is wanted for tensor, wanted in zip(inputs_of(one), given, strict=True))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("pattern", [None, "2:4", "6:8"])
def test_a_quantiser_without_kernels_is_the_oracle(pattern: str | None, scheme: str) -> None:
    """Whatever stands in front, with rows and columns added or none."""
    kind, parsed = SCHEMES[scheme], None if pattern is None else Pattern.parse(pattern)
    for x in (tokens(M, K), swiglu(M, K), normed(M, K)):
        computed = x if isinstance(x, torch.Tensor) else x.computed()
        q, scale = reference.quantize(computed, kind)
        lifted = q if parsed is None else reference.lift(q, parsed)
        for added, rows in ((0, 1), (16, 8)):
            width = lifted.shape[1] + added
            got, got_scale = quantiser(x, kind, parsed, width, rows, direct=False)(x)
            assert got.shape == (-(-M // rows) * rows, width)
            check_bitwise(got_scale, scale)
            check_bitwise(got[:M, : lifted.shape[1]], lifted)
            assert not got[:M, lifted.shape[1] :].float().any()


def test_a_norm_writes_the_sum_it_made() -> None:
    x = normed(M, K)
    quantized(x, INT8, None, None, 1)
    check_bitwise(x.total, x.x + x.residual)


def test_signatures_tell_apart_what_runs_in_another_way() -> None:
    x = tokens(M, K)
    kinds = [
        x,
        x[:4],
        x[:, :80],
        x.float(),
        x.t().contiguous().t(),
        swiglu(M, K),
        swiglu(M, K).gate_up,
        normed(M, K),
        normed(M, K)._replace(eps=1e-5),
    ]
    assert len({signature(kind) for kind in kinds}) == len(kinds)
    assert signature(x) == signature(tokens(M, K)) and signature(swiglu(M, K)) == signature(swiglu(M, K))
