"""Every kernel that runs on a CPU against the oracle: int8 bitwise, the others within the tolerance policy; how routes are asked for."""

from __future__ import annotations

import time
from dataclasses import replace
from threading import Barrier, Thread

import pytest
import torch

from layers import DTYPE, made, oracle, quantised, tokens
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm import Problem, Route, Runner, Weights, register
from slidesparse.gemm.kernels import Pipeline, chosen, kernels, refusal, unmeasured
from slidesparse.gemm.kernels import dense as dense_kernels
from slidesparse.gemm.layouts import LAYOUTS
from slidesparse.nn import SlideSparseLinear
from slidesparse.ops import cusparselt
from slidesparse.ops.w8a8 import WIDEST_K
from slidesparse.pattern import Pattern
from slidesparse.tolerance import check_bitwise, check_close, deviation

SHAPES = [(0, 24, 64), (1, 33, 100), (7, 16, 1), (16, 48, 256), (63, 40, 172)]
ON_CPU = ["dense", "packed", "dense:exact", "packed:exact", "packed:exact64"]
CPU, H100 = (0, 0), (9, 0)


def oracle64(x: torch.Tensor, weights: Weights, dense: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The linear with nothing rounded after quantisation."""
    q, s = quantised(x, weights)
    y = q.double() @ dense.double().t()
    if s is not None:
        y = y * weights.channel_scale.double().view(1, -1) * s.double()
    return y if bias is None else y + bias.double()


def plain_torch(x: torch.Tensor, weights: Weights, dense: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What a user would write: float32 products and sums, one rounding."""
    q, s = quantised(x, weights)
    y = q.float() @ dense.float().t()
    if s is not None:
        y = y * weights.channel_scale.view(1, -1) * s
    return (y if bias is None else y + bias.float()).to(dtype)


@pytest.mark.parametrize("route", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8_is_bitwise_the_oracle(route: str | None, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    weights, dense = made(n, k, "int8")
    x = tokens(m, k, dtype)
    for bias in (None, torch.randn(n).to(dtype), torch.randn(n)):
        out = Runner(weights, route=route)(x, bias)
        check_bitwise(out, oracle(x, weights, dense, bias, dtype))


def test_int8_sums_are_exact_at_the_extremes() -> None:
    for k in (1, 1023, 1025, 18944):
        q = torch.full((3, k), 127, dtype=torch.int8)
        q[1] = -127
        weight = torch.full((5, k), 127, dtype=torch.int8)
        weight[1:3] = -128
        exact = (q.double() @ weight.double().t()).to(torch.int32)
        assert torch.equal(dense_kernels.int_matmul(q, weight), exact)


def test_int8_without_integer_products_is_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_kernels, "_int_mm_is_exact", lambda device: False)
    monkeypatch.setattr(dense_kernels, "int_mm", None)
    # Odd products, whose sums float32 does not hold beyond 2^24.
    q, weight = torch.full((2, 3001), 127, dtype=torch.int8), torch.full((3, 3001), -127, dtype=torch.int8)
    assert torch.equal(dense_kernels.int_matmul(q, weight).double(), q.double() @ weight.double().t())
    q = torch.randint(-127, 128, (9, 3001), dtype=torch.int8)
    weight = torch.randint(-128, 128, (21, 3001), dtype=torch.int8)
    assert torch.equal(dense_kernels.int_matmul(q, weight).double(), q.double() @ weight.double().t())
    assert torch.equal(dense_kernels.int_matmul(q.fill_(-127), weight.fill_(-128)).double(), q.double() @ weight.double().t())


def test_saturating_integer_products_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # As vpmaddubsw does it: unsigned activations, pairs of products clamped at 16 bits, the shift taken back at the end.
        pairs = ((q.int() + 128).unsqueeze(-1) * weight.int().unsqueeze(0)).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-32768, 32767).sum(1) - 128 * weight.int().sum(0)

    monkeypatch.setattr(dense_kernels, "int_mm", saturating)
    assert not dense_kernels._int_mm_is_exact.__wrapped__("cpu")
    monkeypatch.setattr(dense_kernels, "int_mm", lambda q, weight: q.int() @ weight.int())
    assert dense_kernels._int_mm_is_exact.__wrapped__("cpu")


def test_integer_products_that_are_slower_than_floats_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2)
        return q.int() @ weight.int()

    monkeypatch.setattr(dense_kernels, "int_mm", slow)
    assert not dense_kernels._int_mm_pays.__wrapped__("cpu")
    monkeypatch.setattr(dense_kernels, "int_mm", lambda q, weight: torch.ones(q.shape[0], weight.shape[1], dtype=torch.int32))
    assert dense_kernels._int_mm_pays.__wrapped__("cpu")


@pytest.mark.parametrize("route", [None, "dense", "packed"])
@pytest.mark.parametrize("scheme", ["fp8", "bf16", "fp16", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floating_schemes_keep_the_tolerance_policy(route: str | None, scheme: str, dtype: torch.dtype) -> None:
    pattern = "6:8x2" if scheme == "nvfp4" else "6:8"
    for m, n, k in SHAPES:
        k = -(-k // 16) * 16 if scheme == "nvfp4" else k
        weights, dense = made(n, k, scheme, pattern)
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        for b in (None, bias):
            out = Runner(weights, route=route)(x, b)
            exact = oracle64(x, weights, dense, b)
            check_close(out, exact, plain_torch(x, weights, dense, b, dtype))


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
def test_native_16_bit_rounds_once_with_its_bias(scheme: str) -> None:
    dtype = SCHEMES[scheme].dtype
    weights, dense = made(64, 512, scheme)
    x, bias = torch.randn(33, 512).to(dtype), (torch.randn(64) * 100).to(dtype)
    out = Runner(weights)(x, bias)
    assert torch.equal(out, torch.nn.functional.linear(x, dense, bias)), "the masked dense model's very numbers"
    exact = oracle64(x, weights, dense, bias)
    check_close(out, exact, exact.to(dtype))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "nvfp4"])
@pytest.mark.parametrize("route", ON_CPU)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_only_itself(scheme: str, route: str | None, bad: float) -> None:
    weights, _ = made(24, 64, scheme, "6:8x2" if scheme == "nvfp4" else "6:8")
    x = torch.randn(5, 64).to(torch.bfloat16)
    run = Runner(weights, route=route)
    clean, x[2, 9] = run(x), bad
    out = run(x)
    assert not torch.isfinite(out[2]).any() if SCHEMES[scheme].dynamic else not torch.isfinite(out[2]).all()
    assert not SCHEMES[scheme].dynamic or out[2].isnan().all()
    others = [0, 1, 3, 4]
    check_bitwise(out[others], clean[others])


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_autocast_and_strides_change_nothing(scheme: str) -> None:
    weights, _ = made(40, 96, scheme)
    run, x = Runner(weights), torch.randn(96, 12)
    plain = run(x.t().contiguous())
    with torch.autocast("cpu", torch.bfloat16):
        check_bitwise(run(x.t()), plain)


def test_resident_copies_follow_the_activations_and_the_memory_policy() -> None:
    weights, _ = made(32, 64, "bf16")
    run = Runner(weights)
    assert run.resident_bytes == 0
    run(torch.randn(2, 64).to(torch.bfloat16))
    assert run.resident_bytes == 32 * 64 * 2
    run(torch.randn(2, 64))
    assert run.resident_bytes == 32 * 64 * (2 + 4), "another copy, in the type that float32 activations need"
    run(torch.randn(2, 64).to(torch.bfloat16))
    assert run.resident_bytes == 32 * 64 * (2 + 4)
    lean = Runner(weights, memory="lean")
    x = torch.randn(2, 64).to(torch.bfloat16)
    check_bitwise(lean(x), Runner(weights)(x))
    assert lean.resident_bytes == 0
    with pytest.raises(ValueError, match="thrifty"):
        Runner(weights, memory="thrifty")


@pytest.mark.parametrize("through", ["runner", "layer"])
def test_threads_whose_first_calls_meet_share_copies(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, dense = made(24, 64, "int8")
    run = Runner(weights) if through == "runner" else SlideSparseLinear.from_packed(weights.packed, weights.scheme, scale=weights.scale)
    x, start, found, copies, prepare = tokens(5, 64), Barrier(4), [], [], LAYOUTS["dense"].prepare

    def prepared(problem: Problem, weights: Weights) -> tuple[torch.Tensor, ...]:
        copies.append(problem)
        time.sleep(0.05)
        return prepare(problem, weights)

    def call() -> None:
        start.wait()
        found.append(run(x))

    monkeypatch.setattr(LAYOUTS["dense"], "prepare", prepared)
    threads = [Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(copies), len(found)) == (1, 4)
    for y in found:
        check_bitwise(y, oracle(x, weights, dense, None, x.dtype))


def test_a_try_that_failed_leaves_no_copies_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    run, devices, prepare = Runner(made(24, 64, "int8")[0]), [], LAYOUTS["dense"].prepare
    monkeypatch.setattr(
        LAYOUTS["dense"], "prepare", lambda problem, weights: devices.append(weights.packed.values.device) or prepare(problem, weights)
    )
    monkeypatch.setattr("slidesparse.gemm.runner._calls", lambda *_: 1 / 0)
    for device in ("meta", "cpu"):
        with pytest.raises(ZeroDivisionError):
            run.prepare(DTYPE, torch.device(device))
    assert [device.type for device in devices] == ["meta", "cpu"]


def test_scales_are_read_as_they_lie() -> None:
    weights, dense = made(24, 64, "int8")
    strided = torch.stack([weights.scale, weights.scale + 1], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    run, x = Runner(replace(weights, scale=strided)), tokens(5, 64)
    check_bitwise(run(x), oracle(x, weights, dense, None, x.dtype))
    assert run.ready.scale.is_contiguous()


def test_copies_made_in_inference_mode_serve_outside() -> None:
    weights, _ = made(8, 16, "bf16")
    run = Runner(weights)
    with torch.inference_mode():
        run(torch.randn(1, 16))
    x = torch.randn(3, 16, requires_grad=True)
    run(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_kernel_may_bring_a_layout_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Across:
        name = "across"

        def nbytes(self, problem: Problem) -> int:
            return LAYOUTS["dense"].nbytes(problem)

        def prepare(self, problem: Problem, weights: Weights) -> tuple[torch.Tensor]:
            return (LAYOUTS["dense"].prepare(problem, weights)[0].t().contiguous(),)

        def dense(self, problem: Problem, copy: tuple[torch.Tensor]) -> torch.Tensor:
            return copy[0].t()

    class Turned(dense_kernels.DenseKernel):
        layouts = ("across",)

        def bind(self, problem: Problem, layout: str, variant: str, x: torch.Tensor, *, direct: bool) -> Pipeline:
            return Pipeline(layout, None, lambda q, x_scale, copy, scale, bias: q @ copy[0])

    monkeypatch.setattr("slidesparse.gemm.kernels._KERNELS", kernels())
    monkeypatch.setitem(LAYOUTS, "across", None)
    register(Turned("turned", lambda problem: None), Across())
    weights, dense = made(24, 64, "bf16")
    x = tokens(3, 64)
    run = Runner(weights, route="across")
    check_bitwise(run(x), x @ dense.t())
    assert [str(route) for _, route in run.routes] == ["across:turned"] and run.resident_bytes == 24 * 64 * 2
    check_bitwise(Runner(weights)(x), torch.nn.functional.linear(x, dense))


WIDE = Problem(8, WIDEST_K + 8, Pattern(6, 8), SCHEMES["int8"], CPU, torch.bfloat16)
"""Sums of which int32 does not hold."""


def test_routes_read_what_they_write() -> None:
    for text, route in (
        ("dense:exact", Route("dense", "exact")),
        ("slid:cusparselt:exact alg=3", Route("slid", "cusparselt", "exact alg=3")),
    ):
        assert str(route) == text and Route.parse(text) == route
    for text in ("dense", "dense:", ":exact", ""):
        with pytest.raises(ValueError, match="is not a route"):
            Route.parse(text)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("dense", "overflow"),
        ("dense:triton", "int8 on CUDA"),
        ("packed:quick", "no kernel 'quick'"),
        ("dense:exact64", "reads weights in layout packed, not 'dense'"),
        ("packed:exact64:quick", "no variant 'quick'"),
        ("slid", "cusparselt: runs on CUDA"),
        ("slid:cusparselt:alg=3", "runs on CUDA"),
        ("nothing", "unknown layout 'nothing'.*packed, dense, slid"),
    ],
)
def test_a_route_asked_for_that_cannot_run_says_why(route: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        chosen(route, WIDE, 4)
    with pytest.raises(UnsupportedError, match=message):
        Runner(made(8, WIDE.k, "int8")[0], route=route)(torch.zeros(1, WIDE.k))


def test_a_layout_asked_for_runs_its_first_kernel_that_can() -> None:
    problem = Problem(48, 64, Pattern(6, 8), SCHEMES["fp8"], H100, torch.bfloat16)
    assert [str(chosen("packed", problem, m)) for m in (1, 64, 65)] == ["packed:tensorwise", "packed:tensorwise", "packed:rowwise"]
    assert str(chosen("dense", replace(problem, dtype=torch.float16), 65)) == "dense:tensorwise"
    assert str(chosen("dense", replace(problem, n=40), 65)) == "dense:exact", "the libraries want multiples of 16"
    assert str(chosen("packed", WIDE, 4)) == "packed:exact64"
    assert str(chosen("dense", replace(problem, scheme=SCHEMES["bf16"]), 4)) == "dense:native"


def test_what_runs_in_place_of_the_dense_layout_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from slidesparse.gemm.kernels import _report_fallback

    _report_fallback.cache_clear()
    for m in (4, 400):
        assert unmeasured(WIDE, m, "dense") == Route("packed", "exact64")
    (record,) = caplog.records
    assert "kernel exact64 is used because" in caplog.text and record.getMessage().count("exact cannot run: K = 131080") == 1
    assert unmeasured(replace(WIDE, k=64), 4, "dense") == Route("dense", "exact") and len(caplog.records) == 1


def test_a_registered_kernel_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(dense_kernels.DenseKernel):
        def refuses(self, problem: Problem, variant: str = "") -> str | None:
            return None if problem.n == 8 else "N must be 8"

    def twice(problem: Problem, q: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        return 2 * kernels()["native"].whole(problem, q, *rest)

    monkeypatch.setattr("slidesparse.gemm.kernels._KERNELS", kernels())
    register(Picky("picky", None, twice))
    weights, dense = made(8, 16, "bf16")
    x = tokens(3, 16)
    check_bitwise(Runner(weights)(x), torch.nn.functional.linear(x, dense))
    for layout in ("dense", "packed"):
        check_bitwise(Runner(weights, route=layout)(x), torch.nn.functional.linear(x, dense))
        picked = Runner(weights, route=f"{layout}:picky")
        check_bitwise(picked(x), 2 * torch.nn.functional.linear(x, dense))
        assert [str(route) for _, route in picked.routes] == [f"{layout}:picky"]
    problem = weights.problem(torch.bfloat16, x.device, None)
    assert refusal(Route("dense", "picky"), replace(problem, n=9)) == "N must be 8"
    assert "layout dense or packed" in refusal(Route("slid", "picky"), problem)


def test_a_kernel_that_is_registered_again_runs_in_new_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidesparse.gemm.kernels._KERNELS", kernels())
    weights, _ = made(8, 16, "bf16")
    for value in (1.0, 2.0):
        register(
            dense_kernels.DenseKernel(
                "filling", lambda problem: None, lambda problem, q, *rest, value=value: q.new_full((len(q), 8), value)
            )
        )
        assert (Runner(weights, route="dense:filling")(tokens(3, 16)) == value).all()


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
    monkeypatch.setattr(cusparselt, "unavailable", lambda *_: None)
    sparse = kernels()["cusparselt"]
    finer = (torch.bfloat16, ("default", "exact")), (torch.float16, ("exact",)), (torch.float32, ("exact",))
    for dtype, variants in finer:
        problem = Problem(32, 64, Pattern(6, 8), SCHEMES["int8"], H100, dtype)
        assert sparse.variants(problem, 16) == variants and str(chosen("slid", problem, 4)) == f"slid:cusparselt:{variants[0]}"
        assert sparse.refuses(problem, "exact alg=3") is None
        for variant in ("alg=3", "default"):
            assert (sparse.refuses(problem, variant) is None) == (dtype == torch.bfloat16)
    assert "not an algorithm" in sparse.refuses(problem, "exact quick")
    for wrong, reason in (("6:8x2", "single weights"), ("12:16@4:8", "2:4 hardware")):
        assert reason in sparse.refuses(replace(problem, pattern=Pattern.parse(wrong)))
    assert "one scale for 32" in sparse.refuses(replace(problem, scheme=SCHEMES["nvfp4"], pattern=Pattern.parse("6:8x2")))
    assert "one 16-bit type" in sparse.refuses(replace(problem, scheme=SCHEMES["fp16"]))


def test_kernels_say_how_often_they_round() -> None:
    asked = ("default", "alg=3", "exact", "exact alg=3")
    assert [kernels()["cusparselt"].roundings(variant) for variant in asked] == [2, 2, 1, 1]
    assert {name for name, kernel in kernels().items() if kernel.roundings("") == 2} == {"tensorwise", "cusparselt"}


def test_activations_of_another_width_are_refused() -> None:
    run = Runner(made(24, 64, "int8")[0])
    for _ in range(2):
        for columns in (56, 72):
            with pytest.raises(ValueError, match=f"have {columns} columns, the layer takes 64"):
                run(tokens(5, columns))
        run(tokens(5, 64))
