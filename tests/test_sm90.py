"""The kernel for compute capability 9.0: its layout, its variants, and on a GPU its products against the oracle."""

from __future__ import annotations

import csv
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from layers import made, oracle, tokens
from slidesparse import jit, ops, pack, prune, quantize_weight, reference
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES
from slidesparse.gemm.kernels.sm90 import Sm90
from slidesparse.gemm.layouts import LAYOUTS
from slidesparse.gemm.problem import Problem, Weights
from slidesparse.gemm.runner import run
from slidesparse.ops import sm90
from slidesparse.ops.sm90 import launch, variants
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.tolerance import check_bitwise

HOPPER = (9, 0)
SHAPES = [("2:4", 128, 128), ("4:6", 130, 300), ("6:8", 5, 40), ("6:8", 384, 1024), ("8:10", 257, 190), ("14:16", 64, 640)]
hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER, reason="needs compute capability 9.0"
)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(("pattern", "n", "k"), SHAPES)
def test_weights_come_back_from_tiles(pattern: str, n: int, k: int, scheme: str) -> None:
    weights, dense = made(n, k, scheme, pattern, "cpu")
    layout, problem = LAYOUTS["tiled"], Problem(n, k, Pattern.parse(pattern), SCHEMES[scheme], HOPPER, torch.bfloat16)
    copy = layout.prepare(problem, weights)
    assert copy[0].numel() == layout.nbytes(problem)
    check_bitwise(layout.dense(problem, copy), dense)


def test_a_window_of_three_is_refused() -> None:
    with pytest.raises(ValueError, match="more than two"):
        sm90.tile(torch.ones(4, 8, dtype=torch.int8))


def test_a_descriptor_that_the_cache_drops_lives_as_long_as_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call asks for up to three, and the last may push the first one out."""

    class Described:
        def __init__(self, matrix: torch.Tensor, columns: int, rows: int, size: int) -> None:
            self.shape = matrix.shape

    monkeypatch.setattr(launch, "_TensorMap", Described)
    monkeypatch.setattr(launch, "_MAPS", 1)
    gemm = object.__new__(launch.Gemm)
    gemm._maps = OrderedDict()
    first, second = (gemm._map(torch.empty(rows, 16, dtype=torch.int8), 128, 64, 1) for rows in (3, 5))
    assert (first.shape, second.shape) == ((3, 16), (5, 16)) and list(gemm._maps.values()) == [second]


def test_the_fastest_variant_is_among_the_three_that_a_search_times() -> None:
    """Within 3 %, of 128 products that were measured on an H200."""
    cells: dict[tuple, dict[str, float]] = {}
    with (Path(__file__).parent.parent / "benchmarks/results/archive/h200_sm90_variants.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            layout, kernel, variant = [*row["route"].split(":"), ""][:3]
            if kernel == "sm90":
                key = (int(row["n"]), int(row["k"]), int(row["m"]), row["pattern"], row["scheme"], layout)
                cells.setdefault(key, {})[variant] = float(row["us_product"])
    losses = []
    for (n, k, m, pattern, scheme, layout), times in cells.items():
        problem = Problem(n, k, Pattern.parse(pattern), SCHEMES[scheme], HOPPER, torch.bfloat16)
        copy = (torch.empty((1, 1, 1) if layout == "tiled" else (1, 1), device="meta"),)
        found = Sm90().search(problem, torch.empty(m, k, device="meta"), copy)
        losses.append(min(times[one] for one in found if one in times) / min(times.values()))
    assert len(losses) == 128 and max(losses) < 1.03, max(losses)


def test_every_variant_compiles_without_local_memory() -> None:
    try:
        jit.toolchain()
    except UnsupportedError as error:
        pytest.skip(str(error))
    kinds = [
        variants.Types(values, sparse, "bfloat16", bias)
        for values, bias in (("int8", ""), ("float8_e4m3fn", "float32"))
        for sparse in (True, False)
    ]
    jobs = [jit.Job(variants.source(one, kind), "gemm", "sm_90a", variants.constants(one, kind)) for one in sm90.VARIANTS for kind in kinds]
    for job, binary in zip(jobs, jit.compile_all(jobs), strict=True):
        assert (binary.resources.local, binary.resources.spills) == (0, 0), dict(job.constants)


def call(weights, dense, n, k, pattern, scheme, layout, variant, x, bias):
    kernel, dtype = Sm90(), x.dtype
    problem = Problem(n, k, Pattern.parse(pattern), SCHEMES[scheme], HOPPER, dtype, None if bias is None else bias.dtype)
    copy = LAYOUTS["tiled"].prepare(problem, weights) if layout == "tiled" else (dense.cuda(),)
    scale = weights.channel_scale.contiguous().cuda()
    return kernel.bind(problem, layout, variant, x, unscaled=False, direct=True), copy, scale


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
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("variant", list(map(str, sm90.VARIANTS)))
@pytest.mark.parametrize(("pattern", "n", "k", "m"), CASES)
def test_products_are_the_oracles(pattern: str, n: int, k: int, m: int, variant: str, scheme: str) -> None:
    weights, dense = made(n, k, scheme, pattern, "cuda")
    x = tokens(m, k).cuda()
    for layout in ("tiled", "dense"):
        for bias in (None, torch.randn(n, device="cuda").bfloat16()):
            pipeline, copy, scale = call(weights, dense, n, k, pattern, scheme, layout, variant, x, bias)
            y = run(pipeline, x, copy, scale, bias)[0].cpu()
            wanted = oracle(x, weights, dense, bias, x.dtype)
            if scheme == "int8":
                check_bitwise(y, wanted)
            else:
                error = (y.double() - wanted.double()).norm() / wanted.double().norm()
                assert error < 3e-3, (layout, bias is None, float(error))


def poisoned(gemm: sm90.Gemm, q: torch.Tensor, x_scale: torch.Tensor, copy: torch.Tensor, weights, bias, out: torch.dtype) -> torch.Tensor:
    """The kernel's output, written over NaN."""
    y = torch.full((q.shape[0], weights.packed.n), float("nan"), dtype=out, device="cuda")
    scale = weights.channel_scale.contiguous()
    gemm(q, x_scale, copy, scale, bias, gemm.order(*y.shape), y, torch.cuda.current_stream().cuda_stream)
    return y


KINDS = [("bfloat16", None), ("bfloat16", torch.bfloat16), ("bfloat16", torch.float32), ("float16", torch.float16)]


@pytest.mark.needs_gpu
@hopper_only
@pytest.mark.parametrize("part", range(20))
def test_500_random_cases(part: int) -> None:
    draw = random.Random(torch.initial_seed() + part)
    for _ in range(500):
        n, k, m = 8 * draw.randint(1, 120), 16 * draw.randint(1, 120), draw.choice((1, 7, draw.randint(1, 64), draw.randint(1, 700)))
        pattern, scheme, variant = draw.choice(KNOWN), SCHEMES[draw.choice(("int8", "fp8"))], draw.choice(sm90.VARIANTS)
        (out, bias), sparse = draw.choice(KINDS), draw.random() < 0.7
        values, scale = quantize_weight(prune(torch.randn(n, k, device="cuda"), pattern), scheme)
        weights = Weights(pack(values, pattern), scheme, scale)
        x = (torch.randn(m, k, device="cuda") * torch.logspace(-2, 1, m, device="cuda").view(-1, 1)).bfloat16()
        added = None if bias is None else torch.randn(n, device="cuda").to(bias)
        q, x_scale = ops.quantize(x, scheme)
        types = sm90.Types(str(scheme.dtype)[6:], sparse, out, "" if bias is None else str(bias)[6:])
        given, copy = q, values
        if sparse:
            given = ops.quantize_lift(x, pattern, scheme, width=-(-pattern.slid_k(k) // 16) * 16)[0]
            copy = LAYOUTS["tiled"].prepare(Problem(n, k, pattern, scheme, HOPPER, torch.bfloat16), weights)[0]
        y = poisoned(sm90.loaded(variant, types, 0), given, x_scale, copy, weights, added, getattr(torch, out))
        case = (n, k, m, str(pattern), scheme.name, str(variant), out, bias, sparse)
        if scheme.name == "int8":
            wanted = (q.double() @ values.double().t()).float() * scale.view(1, -1) * x_scale
            wanted = (wanted if added is None else wanted + added.float()).to(y.dtype)
            assert torch.equal(y.view(torch.int16), wanted.view(torch.int16)), case
        else:
            # One rounding of the exact value, and sums of which the tensor cores keep 13 bits and more.
            scales, kind = scale.double().view(1, -1) * x_scale.double(), torch.finfo(y.dtype)
            exact = (q.double() @ values.double().t()) * scales + (0 if added is None else added.double())
            size = (q.double().abs() @ values.double().abs().t()) * scales + (0 if added is None else added.double().abs())
            allowed = kind.eps / 2 * (exact.abs() + kind.smallest_normal) + 2**-12 * size
            assert ((y.double() - exact).abs() <= allowed).all(), case


@pytest.mark.needs_gpu
@hopper_only
@pytest.mark.parametrize("variant", ["256 2x1", "256 4x2", "128 1x2", "64 1x1"])
@pytest.mark.parametrize("sparse", [True, False])
def test_random_delays_change_nothing(variant: str, sparse: bool) -> None:
    n, k, m = 520, 1536, 700
    weights, dense = made(n, k, "int8", "6:8", "cuda")
    x = tokens(m, k)
    q, x_scale = reference.quantize(x, SCHEMES["int8"])
    given = reference.lift(q, Pattern(6, 8)) if sparse else q
    gemm = sm90.Gemm(sm90.Variant.parse(variant), sm90.Types("int8", sparse, "bfloat16", ""), 0, delay=True)
    problem = Problem(n, k, Pattern(6, 8), SCHEMES["int8"], HOPPER, torch.bfloat16)
    copy = LAYOUTS["tiled" if sparse else "dense"].prepare(problem, weights)[0]
    wanted = oracle(x, weights, dense, None, torch.bfloat16).cuda()
    for _ in range(200):
        y = poisoned(gemm, given.cuda(), x_scale.cuda(), copy, weights, None, torch.bfloat16)
        assert torch.equal(y.view(torch.int16), wanted.view(torch.int16))
