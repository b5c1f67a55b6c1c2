"""Every backend against the oracle: int8 bitwise, the others within the tolerance policy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slidesparse import reference
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Accepted, Execution, Problem, Rejected, Weights, choose, named, numerics, register, registry, verdicts
from slidesparse.gemm.backends import cusparselt
from slidesparse.pack import pack
from slidesparse.pattern import Pattern
from slidesparse.prune import prune
from slidesparse.quant import dequantize_nvfp4, nvfp4_global_scale, quantize_nvfp4, quantize_weight
from slidesparse.testing import check_bitwise, check_close, deviation

SHAPES = [(0, 24, 64), (1, 33, 100), (7, 16, 1), (16, 48, 256), (63, 40, 172)]
FAST = ["dense", "restore"]


def layer(n: int, k: int, scheme: str, pattern: str = "6:8") -> tuple[Weights, torch.Tensor]:
    """Stored weights and the dense matrix that they stand for before scaling."""
    kind, parsed = SCHEMES[scheme], Pattern.parse(pattern)
    weight = prune(torch.randn(n, k), parsed)
    if kind.pair:
        factor = nvfp4_global_scale(float(weight.abs().max()))
        values, scale = quantize_nvfp4(weight, factor)
        weights = Weights(pack(values, kind.pattern_stored(parsed)), kind, scale, torch.tensor([factor]))
        return weights, dequantize_nvfp4(values, scale, weights.global_scale)
    values, scale = quantize_weight(weight, kind)
    return Weights(pack(values, parsed), kind, scale), values


def oracle(x: torch.Tensor, weights: Weights, dense: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    q, s = reference.quantize(x, weights.scheme) if weights.scheme.dynamic else (x, None)
    return reference.linear(q, s, dense, weights.channel_scale, bias, dtype)


def oracle64(x: torch.Tensor, weights: Weights, dense: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same with nothing rounded after quantisation."""
    q, s = reference.quantize(x, weights.scheme) if weights.scheme.dynamic else (x, None)
    y = q.double() @ dense.double().t()
    if s is not None:
        y = y * weights.channel_scale.double().view(1, -1) * s.double()
    return y if bias is None else y + bias.double()


def plain_torch(x: torch.Tensor, weights: Weights, dense: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What a user would write: float32 products and sums, one rounding."""
    q, s = reference.quantize(x, weights.scheme) if weights.scheme.dynamic else (x, None)
    y = q.float() @ dense.float().t()
    if s is not None:
        y = y * weights.channel_scale.view(1, -1) * s
    return (y if bias is None else y + bias.float()).to(dtype)


@pytest.mark.parametrize("backend", ["dense", "restore", "reference", "dense:exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8_is_bitwise_the_oracle(backend: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    weights, dense = layer(n, k, "int8")
    # Tokens of very different size: a bias added before the token scale would show.
    x = (torch.randn(m, k) * torch.logspace(-3, 3, m).view(-1, 1)).to(dtype)
    for bias in (None, torch.randn(n).to(dtype), torch.randn(n)):
        out = Execution(weights, backend=backend)(x, bias)
        check_bitwise(out, oracle(x, weights, dense, bias, dtype))


def test_int8_sums_are_exact_at_the_extremes() -> None:
    for k in (1, 1023, 1025, 18944):
        q = torch.full((3, k), 127, dtype=torch.int8)
        q[1] = -127
        weight = torch.full((5, k), 127, dtype=torch.int8)
        weight[1:3] = -128
        exact = (q.double() @ weight.double().t()).to(torch.int32)
        assert torch.equal(numerics.int_matmul(q, weight), exact)


def test_int8_without_integer_products_is_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_int_mm_is_exact", lambda device: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    # Odd products, whose sums float32 does not hold beyond 2^24.
    q, weight = torch.full((2, 3001), 127, dtype=torch.int8), torch.full((3, 3001), -127, dtype=torch.int8)
    assert torch.equal(numerics.int_matmul(q, weight).double(), q.double() @ weight.double().t())
    q = torch.randint(-127, 128, (9, 3001), dtype=torch.int8)
    weight = torch.randint(-128, 128, (21, 3001), dtype=torch.int8)
    assert torch.equal(numerics.int_matmul(q, weight).double(), q.double() @ weight.double().t())
    assert torch.equal(numerics.int_matmul(q.fill_(-127), weight.fill_(-128)).double(), q.double() @ weight.double().t())


def test_saturating_integer_products_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # As vpmaddubsw does it: unsigned activations, pairs of products clamped at 16 bits, the shift taken back at the end.
        pairs = ((q.int() + 128).unsqueeze(-1) * weight.int().unsqueeze(0)).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-32768, 32767).sum(1) - 128 * weight.int().sum(0)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not numerics._probe_int_mm("cpu")
    monkeypatch.setattr(torch, "_int_mm", lambda q, weight: q.int() @ weight.int())
    assert numerics._probe_int_mm("cpu")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scheme", ["fp8", "bf16", "fp16", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floating_schemes_keep_the_tolerance_policy(backend: str, scheme: str, dtype: torch.dtype) -> None:
    pattern = "6:8x2" if scheme == "nvfp4" else "6:8"
    for m, n, k in SHAPES:
        k = -(-k // 16) * 16 if scheme == "nvfp4" else k
        weights, dense = layer(n, k, scheme, pattern)
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        for b in (None, bias):
            out = Execution(weights, backend=backend)(x, b)
            exact = oracle64(x, weights, dense, b)
            check_close(out, exact, plain_torch(x, weights, dense, b, dtype))


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
def test_native_16_bit_rounds_once_with_its_bias(scheme: str) -> None:
    dtype = SCHEMES[scheme].dtype
    weights, dense = layer(64, 512, scheme)
    x, bias = torch.randn(33, 512).to(dtype), (torch.randn(64) * 100).to(dtype)
    out = Execution(weights)(x, bias)
    assert torch.equal(out, torch.nn.functional.linear(x, dense, bias)), "the masked dense model's very numbers"
    exact = oracle64(x, weights, dense, bias)
    check_close(out, exact, exact.to(dtype))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "nvfp4"])
@pytest.mark.parametrize("backend", ["dense", "restore", "reference", "dense:exact"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_only_itself(scheme: str, backend: str, bad: float) -> None:
    weights, _ = layer(24, 64, scheme, "6:8x2" if scheme == "nvfp4" else "6:8")
    x = torch.randn(5, 64).to(torch.bfloat16)
    run = Execution(weights, backend=backend)
    clean, x[2, 9] = run(x), bad
    out = run(x)
    assert not torch.isfinite(out[2]).any() if SCHEMES[scheme].dynamic else not torch.isfinite(out[2]).all()
    assert not SCHEMES[scheme].dynamic or out[2].isnan().all()
    others = [0, 1, 3, 4]
    check_bitwise(out[others], clean[others])


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_autocast_and_strides_change_nothing(scheme: str) -> None:
    weights, _ = layer(40, 96, scheme)
    run, x = Execution(weights), torch.randn(96, 12)
    plain = run(x.t().contiguous())
    with torch.autocast("cpu", torch.bfloat16):
        check_bitwise(run(x.t()), plain)


def test_resident_copies_follow_the_activations_and_the_memory_policy() -> None:
    weights, _ = layer(32, 64, "bf16")
    run = Execution(weights)
    assert run.resident_bytes == 0
    run(torch.randn(2, 64).to(torch.bfloat16))
    assert run.resident_bytes == 32 * 64 * 2
    run(torch.randn(2, 64))
    assert run.resident_bytes == 32 * 64 * 4, "one copy, now in the type that float32 activations need"
    lean = Execution(weights, memory="lean")
    x = torch.randn(2, 64).to(torch.bfloat16)
    check_bitwise(lean(x), Execution(weights)(x))
    assert lean.resident_bytes == 0
    with pytest.raises(ValueError, match="thrifty"):
        Execution(weights, memory="thrifty")


def test_copies_made_in_inference_mode_serve_outside() -> None:
    weights, _ = layer(8, 16, "bf16")
    run = Execution(weights)
    with torch.inference_mode():
        run(torch.randn(1, 16))
    x = torch.randn(3, 16, requires_grad=True)
    run(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_an_explicit_backend_that_cannot_run_says_why() -> None:
    problem = Problem(8, numerics.INT32_SAFE_K + 8, Pattern(6, 8), SCHEMES["int8"], "cpu", torch.bfloat16)
    for name, message in (
        ("dense", "overflow"),
        ("dense:triton", "int8 on CUDA"),
        ("restore:quick", "no route 'quick'"),
        ("cusparselt", "CUDA"),
        ("nothing", r"nothing.*dense, restore, cusparselt, reference"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            named(name, problem, 4)
        with pytest.raises(UnsupportedError, match=message):
            Execution(layer(8, problem.k, "int8")[0], backend=name)(torch.zeros(1, problem.k))
    assert isinstance(verdicts(problem)["dense"], Rejected)
    assert isinstance(verdicts(problem)["reference"], Accepted)
    chosen = choose(problem, 4)
    assert chosen.backend.name == "reference" and [name for name, _ in chosen.refused] == ["dense", "restore", "cusparselt"]


def test_a_registered_backend_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(type(registry._BACKENDS[0])):
        name = "picky"

        def refuses(self, problem: Problem, variant: str | None = None) -> str | None:
            return None if problem.n == 8 else "N must be 8"

    monkeypatch.setattr(registry, "_BACKENDS", list(registry._BACKENDS))
    register(Picky())
    problem = Problem(8, 16, Pattern(6, 8), SCHEMES["bf16"], "cpu", torch.bfloat16)
    assert choose(problem, 3).backend.name == "picky"
    assert choose(dataclasses.replace(problem, n=9), 3).backend.name == "dense"


def test_the_policy_itself_can_fail() -> None:
    exact = torch.randn(50, 50, dtype=torch.float64)
    torchs = exact.to(torch.bfloat16)
    check_close(torchs, exact, torchs)
    off = torchs.clone()
    off[3, 4] += 1
    with pytest.raises(AssertionError, match="max error"):
        check_close(off, exact, torchs)
    with pytest.raises(AssertionError):
        check_close(torch.full_like(torchs, float("nan")), exact, torchs)
    twice = exact.to(torch.bfloat16) * (1 + 2**-8)
    assert deviation(twice, exact, torchs, roundings=2).limits > deviation(twice, exact, torchs).limits
    with pytest.raises(ValueError, match="dtypes"):
        check_close(torchs, exact, torchs.float())
    with pytest.raises(AssertionError, match=r"first at \(3, 4\)"):
        check_bitwise(off, torchs)


def test_outputs_finer_than_bfloat16_never_pass_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt.cusparselt, "unavailable", lambda *_: None)
    sparse = cusparselt.CuSparseLt()
    for dtype, variants in ((torch.bfloat16, ("", "exact")), (torch.float16, ("exact",)), (torch.float32, ("exact",))):
        problem = Problem(32, 64, Pattern(6, 8), SCHEMES["int8"], "cuda", dtype)
        assert sparse.variants(problem, 16) == variants
        assert sparse.refuses(problem, "exact alg=3") is None
        assert (sparse.refuses(problem, "alg=3") is None) == (dtype == torch.bfloat16)
    assert "not an algorithm" in sparse.refuses(problem, "exact quick")
