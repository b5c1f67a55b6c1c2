"""The kernel for compute capability 9.0 on a GPU: its products against the oracle, and what stands around them in time and memory."""

from __future__ import annotations

import random

import pytest
import torch

from layers import hopper_only, made, oracle, posed, tokens
from slidesparse import ops, pack, prune, quantize_weight, reference
from slidesparse.format import SCHEMES
from slidesparse.gemm.kernels.sm90 import Sm90
from slidesparse.gemm.layouts import LAYOUTS
from slidesparse.gemm.problem import Weights
from slidesparse.gemm.runner import run
from slidesparse.ops import sm90
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.tolerance import check_bitwise


@pytest.mark.needs_gpu
@hopper_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("scheme", ["int8", "bf16"])
def test_products_on_a_device_that_is_not_the_current_one(scheme: str) -> None:
    weights, dense = made(264, 512, scheme, "6:8", "cuda:1")
    x, bias = tokens(77, 512).to("cuda:1"), torch.randn(264, 2, device="cuda:1").to(torch.bfloat16)[:, 0]
    problem = posed(264, 512, scheme, "6:8", torch.bfloat16)
    with torch.cuda.device(1):
        copy = LAYOUTS["tiled"].prepare(problem, weights)
        scale = None if weights.channel_scale is None else weights.channel_scale.contiguous()
    pipeline = Sm90().bind(problem, "tiled", "128 1x1", x, direct=False)
    y = run(pipeline, x, copy, scale, bias)
    assert y.device == x.device and torch.cuda.current_device() == 0
    wanted = oracle(x, weights, dense, bias, x.dtype)
    assert (y.double().cpu() - wanted.double().cpu()).norm() < 3e-3 * wanted.double().norm()


def call(weights, dense, n, k, pattern, scheme, layout, variant, x, bias):
    problem = posed(n, k, scheme, pattern, None if bias is None else bias.dtype)
    copy = LAYOUTS["tiled"].prepare(problem, weights) if layout == "tiled" else (dense.cuda(),)
    scale = None if weights.channel_scale is None else weights.channel_scale.contiguous().cuda()
    return Sm90().bind(problem, layout, variant, x, direct=True), copy, scale


CASES = [
    ("6:8", 512, 512, 128),
    ("6:8", 384, 1040, 1),
    ("2:4", 640, 2048, 300),
    ("4:6", 136, 304, 77),
    ("8:10", 264, 208, 1000),
    ("6:8", 1000, 3584, 513),
]


@pytest.mark.needs_gpu
@hopper_only
@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "fp16"])
@pytest.mark.parametrize("variant", list(map(str, sm90.VARIANTS)))
@pytest.mark.parametrize(("pattern", "n", "k", "m"), CASES)
def test_products_are_the_oracles(pattern: str, n: int, k: int, m: int, variant: str, scheme: str) -> None:
    weights, dense = made(n, k, scheme, pattern, "cuda")
    # float16 ends at 65504
    x = (tokens(m, k, torch.float16) / 64 if scheme == "fp16" else tokens(m, k)).cuda()
    for layout in ("tiled", "dense"):
        for bias in (None, torch.randn(n, device="cuda").to(x.dtype)):
            pipeline, copy, scale = call(weights, dense, n, k, pattern, scheme, layout, variant, x, bias)
            y = run(pipeline, x, copy, scale, bias).cpu()
            wanted = oracle(x, weights, dense, bias, x.dtype)
            if scheme == "int8":
                check_bitwise(y, wanted)
            else:
                error = (y.double() - wanted.double()).norm() / wanted.double().norm()
                assert error < 3e-3, (layout, bias is None, float(error))


def poisoned(
    gemm: sm90.Gemm, q: torch.Tensor, x_scale: torch.Tensor | None, copy: torch.Tensor, weights, bias, out: torch.dtype, early: bool = True
) -> torch.Tensor:
    """The kernel's output, written over NaN."""
    y = torch.full((q.shape[0], weights.packed.n), float("nan"), dtype=out, device="cuda")
    scale = None if weights.channel_scale is None else weights.channel_scale.contiguous()
    gemm(q, x_scale, copy, scale, bias, gemm.table(*y.shape, q.shape[1]), y, torch.cuda.current_stream().cuda_stream, early=early)
    return y


KINDS = {
    "int8": [("bfloat16", ""), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")],
    "bf16": [("bfloat16", ""), ("bfloat16", "bfloat16")],
    "fp16": [("float16", ""), ("float16", "float16")],
}
KINDS["fp8"] = KINDS["int8"]


def rounded(y: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, *, kept: int) -> bool:
    """Whether y is the exact value rounded once, but for what tensor cores drop: all below ``kept`` bits of the largest addend.

    They drop it in every step along K: ``size``, the sum of the addends' sizes, bounds the addend, and sixteen steps' worth is allowed.
    A single wrong addend of 2,000 would move an output by 2 % of its size: the mean error, row by row, shows that.
    """
    kind, error = torch.finfo(y.dtype), (y.double() - exact).abs()
    if not bool((error <= kind.eps / 2 * (exact.abs() + kind.smallest_normal) + 2.0 ** (4 - kept) * size).all()):
        return False
    rows = exact.square().mean(1, keepdim=True).sqrt().clamp(min=kind.smallest_normal)
    return float((error / rows).square().mean().sqrt()) < 6e-3


def random_case(draw: random.Random, schemes=tuple(KINDS), variants=sm90.VARIANTS, layouts=("tiled", "tiled", "dense")) -> tuple | None:
    """One product of random shape, pattern, types and variant over NaN; what it was if an output is wrong."""
    n, k, m = 8 * draw.randint(1, 120), 16 * draw.randint(1, 120), draw.choice((1, 7, draw.randint(1, 64), draw.randint(1, 700)))
    pattern, scheme, sparse = draw.choice(KNOWN), SCHEMES[draw.choice(schemes)], draw.choice(layouts) == "tiled"
    (out, kind), variant = draw.choice(KINDS[scheme.name]), draw.choice(variants)
    if not sm90.fits(variant, scheme.name, bool(kind)):
        return None
    k *= 4 if variant.split else 1  # rows of 2 kB and more are divided
    values, scale = quantize_weight(prune(torch.randn(n, k, device="cuda"), pattern), scheme)
    weights = Weights(pack(values, pattern), scheme, scale)
    x = (torch.randn(m, k, device="cuda") * torch.logspace(-2, 1, m, device="cuda").view(-1, 1)).to(getattr(torch, out))
    added = torch.randn(n, device="cuda").to(getattr(torch, kind)) if kind else None
    q, x_scale = ops.quantize(x, scheme) if scheme.dynamic else (x, None)
    types = sm90.Types(str(scheme.dtype)[6:], sparse, out, kind)
    given, copy, width = q, values, -(-pattern.slid_k(k) // 16) * 16
    if sparse:
        given = ops.quantize_lift(x, pattern, scheme, width=width)[0] if scheme.dynamic else ops.lift(x, pattern, width=width)
        copy = LAYOUTS["tiled"].prepare(posed(n, k, scheme.name, str(pattern)), weights)[0]
    y = poisoned(sm90.loaded(variant, types, 0), given, x_scale, copy, weights, added, getattr(torch, out), draw.random() < 0.5)
    sums = q.double() @ values.double().t()
    if scheme.name == "int8":
        wanted = sums.float() * scale.view(1, -1) * x_scale
        wanted = (wanted if added is None else wanted + added.float()).to(y.dtype)
        right = torch.equal(y.view(torch.int16), wanted.view(torch.int16))
    else:
        scales = scale.double().view(1, -1) * x_scale.double() if scheme.dynamic else torch.ones((), device="cuda")
        more = torch.zeros((), device="cuda") if added is None else added.double()
        exact, size = sums * scales + more, (q.double().abs() @ values.double().abs().t()) * scales + more.abs()
        right = rounded(y, exact, size, kept=13 if scheme.name == "fp8" else 23)
    return None if right else (n, k, m, str(pattern), scheme.name, str(variant), out, kind, sparse)


@pytest.mark.needs_gpu
@hopper_only
@pytest.mark.parametrize("part", range(20))
def test_500_random_cases(part: int) -> None:
    draw = random.Random(torch.initial_seed() + part)
    for _ in range(500):
        wrong = random_case(draw)
        assert wrong is None, wrong


@pytest.mark.needs_gpu
@hopper_only
@pytest.mark.parametrize(
    "variant", ["256 2x1", "256 4x2", "128 1x2", "64 1x1", "32 1x1", "256 2x1 split", "128 1x1 split", "128 1x2 split", "32 1x1 split"]
)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("n", "k", "m", "runs"), [(520, 1536, 700, 200), (264, 2048, 20, 50), (2568, 128, 2500, 50)])
def test_random_delays_change_nothing(n: int, k: int, m: int, runs: int, variant: str, sparse: bool) -> None:
    """Many steps a tile; few tokens; many tiles a block, of few steps each: every tile is written while the next one is multiplied."""
    weights, dense = made(n, k, "int8", "6:8", "cuda")
    x = tokens(m, k)
    q, x_scale = reference.quantize(x, SCHEMES["int8"])
    given = (reference.lift(q, Pattern(6, 8)) if sparse else q).cuda()
    copy = LAYOUTS["tiled" if sparse else "dense"].prepare(posed(n, k, "int8", "6:8"), weights)[0]
    wanted = oracle(x, weights, dense, None, torch.bfloat16).cuda()
    for delay in (True, False):
        gemm = sm90.Gemm(sm90.Variant.parse(variant), sm90.Types("int8", sparse, "bfloat16", ""), 0, delay=delay)
        for _ in range(runs):
            y = poisoned(gemm, given, x_scale.cuda(), copy, weights, None, torch.bfloat16)
            assert torch.equal(y.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.needs_gpu
@hopper_only
@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("layout", ["tiled", "dense"])
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
@pytest.mark.parametrize("m", [5, 300])
def test_weights_of_the_kernel_just_before_are_multiplied(m: int, pattern: str, layout: str, scheme: str) -> None:
    """The kernel reads weights before the pass in front of it has ended; in a graph nothing keeps the three apart."""
    n, k = 1024, 1024
    pairs = [made(n, k, scheme, pattern, "cuda") for _ in range(2)]
    inputs = [tokens(m, k).cuda() for _ in range(3)]
    called = [call(weights, dense, n, k, pattern, scheme, layout, "128 2x1", inputs[0], None) for weights, dense in pairs]
    pipeline, scale, copy = called[0][0], called[0][2], called[0][1][0].clone()
    wanted = [[run(pipeline, x, found, scale, None).clone() for x in inputs] for _, found, _ in called]
    assert not torch.equal(wanted[0][0], wanted[1][0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = []
        for turn in range(24):
            copy.view(torch.uint8).copy_(called[turn % 2][1][0].view(torch.uint8))
            outputs.append(run(pipeline, inputs[turn % 3], (copy,), scale, None))
    for _ in range(20):
        graph.replay()
        for turn, y in enumerate(outputs):
            assert torch.equal(y, wanted[turn % 2][turn % 3]), turn


@pytest.mark.needs_gpu
@hopper_only
@pytest.mark.parametrize("variant", ["32 1x1", "64 1x1 split", "128 2x1", "256 4x2"])
@pytest.mark.parametrize("scheme", ["fp8", "bf16"])
def test_what_shared_memory_held_before_does_not_reach_the_outputs(scheme: str, variant: str) -> None:
    """Of few tokens only their rows are copied; in place of the others stand the NaNs of the call before."""
    n, k = 1024, 2048
    weights, dense = made(n, k, scheme, "6:8", "cuda")
    for layout in ("tiled", "dense"):
        poison = torch.full((512, k), float("nan"), dtype=torch.bfloat16, device="cuda")
        pipeline, copy, scale = call(weights, dense, n, k, "6:8", scheme, layout, variant, poison, None)
        for m in (1, 7, 31, 33, 100):
            x = tokens(m, k).cuda()
            few = call(weights, dense, n, k, "6:8", scheme, layout, variant, x, None)[0]
            assert run(pipeline, poison, copy, scale, None).isnan().all()
            y, wanted = run(few, x, copy, scale, None).cpu(), oracle(x, weights, dense, None, x.dtype)
            assert (y.double() - wanted.double()).norm() < 3e-3 * wanted.double().norm(), (layout, m)
