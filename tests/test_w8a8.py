"""The dense int8 layer: bitwise the oracle, by Triton's interpreter on the CPU and compiled on a GPU, under compile, graphs and streams."""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module

import pytest
import torch

from slidesparse import ops, reference
from slidesparse.tolerance import check_bitwise

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
# The module: its name in the package is that of the function.
kernels = import_module("slidesparse.ops.w8a8")
Tile = kernels.Tile


def operands(m: int, n: int, k: int, bias: torch.dtype | None = torch.float32, pad: int = 0, device: str = "cpu") -> tuple:
    """q with ``pad`` rows too many, weight, both scales of very different sizes, bias."""
    q = torch.randint(-127, 128, (m + pad, k), dtype=torch.int8, device=device)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    x_scale = torch.randn(m, 1, device=device).mul(3).exp() * 1e-3
    w_scale = torch.randn(n, 1, device=device).exp() * 1e-3
    return q, weight, x_scale, w_scale, None if bias is None else torch.randn(n, device=device).mul(9).to(bias)


def expected(q, weight, x_scale, w_scale, bias, dtype: torch.dtype) -> torch.Tensor:
    return reference.linear(q[: len(x_scale)], x_scale, weight, w_scale, bias, dtype)


def check_bound(q, weight, x_scale, w_scale, bias, dtype: torch.dtype) -> None:
    """What `bound_w8a8` makes gives what `w8a8` does, in memory of its own."""
    m, (n, k) = len(x_scale), weight.shape
    bound = kernels.bound_w8a8(m, n, k, q.device, dtype, None if bias is None else bias.dtype)
    expect = ops.w8a8(q[:m], weight, x_scale, w_scale, bias, dtype)
    first, second = (bound(q[:m], x_scale, (weight,), w_scale, bias) for _ in range(2))
    check_bitwise(first, expect)
    check_bitwise(second, expect)
    assert first.data_ptr() != second.data_ptr()


def interpreted() -> None:
    """Everything the interpreter is asked for; runs in a process of its own, which Triton reads the choice from at import."""
    torch.manual_seed(int(sys.argv[1]))
    tiles = (Tile(16, 32, 32, 2, 4, swap=True), Tile(16, 32, 32, 2, 4, split=3), Tile(32, 32, 64, 2, 4, pieces=4, group=2))
    # Float32 and float16 only: the interpreter truncates to bfloat16 (Triton 3.6).
    for m, n, k, bias, dtype in (
        (1, 1, 1, None, torch.float32),
        (7, 33, 17, torch.bfloat16, torch.float32),
        (63, 40, 96, torch.float32, torch.float16),
        (33, 70, 256, None, torch.float32),
    ):
        arguments = operands(m, n, k, bias, pad=3)
        for tile in tiles:
            for descriptors in (False, True) if k % 16 == 0 else (False,):
                check_bitwise(kernels.launch_w8a8(*arguments, dtype, tile, descriptors=descriptors), expected(*arguments, dtype))
        check_bound(*arguments, dtype)
    check_bound(*operands(5, 40, kernels.LONG_K + 40, torch.bfloat16), torch.float16)  # its K is split
    # Sums past 2^24, which float32 rounds.
    q, weight, x_scale, w_scale, bias = operands(2, 3, 4096)
    q.fill_(127), weight.fill_(127)
    weight[0, 0] = 126
    check_bitwise(kernels.launch_w8a8(q, weight, x_scale, w_scale, bias, torch.float32, descriptors=False),
                  expected(q, weight, x_scale, w_scale, bias, torch.float32))  # fmt: skip


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_kernels_are_bitwise_the_oracle_under_the_interpreter():
    """The fixture runs `interpreted` above and fails with what it says."""


@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_without_a_gpu_the_op_is_the_oracle_and_compiles(dtype):
    def run(*arguments):
        return ops.w8a8(*arguments, dtype)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (5, 0, 9):
        arguments = operands(m, 12, 40, torch.bfloat16, pad=m % 2)
        for function in (run, compiled):
            check_bitwise(function(*arguments), expected(*arguments, dtype))


def test_schema_and_fake_hold():
    for bias in (None, torch.float32):
        torch.library.opcheck(torch.ops.slidesparse.w8a8.default, (*operands(5, 12, 40, bias, pad=2), torch.bfloat16))


def test_bad_requests_are_refused():
    q, weight, x_scale, w_scale, bias = operands(4, 6, 32)
    wide = torch.zeros(1, kernels.WIDEST_K + 1, dtype=torch.int8)
    for message, arguments in (
        ("one K", (q[:, 1:], weight, x_scale, w_scale, bias, torch.bfloat16)),
        ("one K", (q[0], weight, x_scale, w_scale, bias, torch.bfloat16)),
        ("must be int8", (q.to(torch.int32), weight, x_scale, w_scale, bias, torch.bfloat16)),
        ("int32 sums", (wide, wide, x_scale[:1], w_scale[:1], None, torch.bfloat16)),
        ("only 3", (q[:3], weight, x_scale, w_scale, bias, torch.bfloat16)),
        ("scales must be", (q, weight, x_scale.double(), w_scale, bias, torch.bfloat16)),
        ("scales must be", (q, weight, x_scale, w_scale[1:], bias, torch.bfloat16)),
        ("bias must", (q, weight, x_scale, w_scale, bias[1:], torch.bfloat16)),
        ("output must", (q, weight, x_scale, w_scale, bias, torch.int32)),
    ):
        with pytest.raises(ValueError, match=message):
            ops.w8a8(*arguments)


def test_every_shape_gets_a_tile_that_fits():
    """Powers of two, no part of K empty, and no more shared memory than cards of 9.0, 8.0 and 8.9 have."""
    for m in (1, 16, 17, 64, 65, 256, 1000, 4096, 1 << 17):
        for n, k in (
            (1, 1),
            (512, 512),
            (576, 1536),
            (4608, 3584),
            (37888, 3584),
            (3584, 18944),
            (515, 1000),
            (512, 40000),
            (40000, 40000),
        ):
            for processors, shared in ((132, 227 << 10), (108, 163 << 10), (142, 99 << 10), (20, 99 << 10)):
                tile = kernels.tile_for(m, n, k, processors, shared)
                assert all(size & (size - 1) == 0 for size in (tile.m, tile.n, tile.k, tile.warps, tile.pieces, tile.group))
                assert k % 16 == 0 or tile.m * tile.k + tile.n * tile.k <= 2 * 64 * tile.warps * 32, "an address for every byte"
                assert tile.stages >= 2 and tile.stages * tile.k * (tile.m + tile.n) < shared
                assert tile.split == 1 or tile.split * tile.k * 2 <= k
                assert tile.split == 1 or -(-m // tile.m) * -(-n // tile.n) < processors


def test_tiles_are_those_that_were_fastest():
    big, square, low = (128, 256), (128, 128), (64, 128)
    for m, shapes in (
        (1, ((16, 64), (16, 32), (16, 64), (16, 128, 4))),
        (16, ((16, 64), (16, 32), (16, 64), (16, 128, 4))),
        (64, ((64, 64), (64, 64), (64, 64), (64, 128, 4))),
        (256, (square, low, big, (128, 128, 2))),
        (1024, (square, big, big, big)),
        (4096, (big,) * 4),
        (16384, (big,) * 4),
    ):
        for (n, k), shape in zip(((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)), shapes, strict=True):
            tile = kernels.tile_for(m, n, k)
            assert (tile.m, tile.n, tile.split) == (*shape, 1)[:3]


@pytest.mark.needs_gpu
@pytest.mark.parametrize(
    ("n", "k", "bias", "pad"),
    [(1, 1, None, 0), (33, 100, "same", 3), (520, 1040, torch.float32, 1), (3584, 3584, torch.bfloat16, 0), (264, 18944, None, 0)],
    ids=str,
)
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_kernels_are_bitwise_the_oracle_on_a_gpu(dtype, n, k, bias, pad):
    """Numbers of tokens share kernels, so they share a test."""
    for m in (0, 1, 7, 16, 63, 200, 1000):
        arguments = operands(m, n, k, dtype if bias == "same" else bias, pad, "cuda")
        check_bitwise(ops.w8a8(*arguments, dtype), expected(*arguments, dtype))
        if m:
            check_bitwise(kernels.launch_w8a8(*arguments, dtype, descriptors=False), expected(*arguments, dtype))
            check_bound(*arguments, dtype)


@pytest.mark.needs_gpu
def test_large_sums_and_unaligned_operands_on_a_gpu():
    q, weight, x_scale, w_scale, bias = operands(100, 200, 4096, device="cuda")
    q.fill_(127), weight.fill_(127)
    weight[:, 0] = 126
    for m in (1, 20, 100):
        check_bitwise(ops.w8a8(q[:m], weight, x_scale[:m], w_scale, bias, torch.float32),
                      expected(q[:m], weight, x_scale[:m], w_scale, bias, torch.float32))  # fmt: skip
    # Views: of a row stride that is not K, and at an address that no descriptor takes.
    wide = torch.randint(-127, 128, (100, 4100), dtype=torch.int8, device="cuda")
    flat = torch.randint(-127, 128, (100 * 4096 + 1,), dtype=torch.int8, device="cuda")[1:].view(100, 4096)
    for view in (wide[:, 4:], wide[::2, :4096], flat):
        arguments = (view, weight, x_scale[: len(view)], w_scale, bias)
        check_bitwise(ops.w8a8(*arguments, torch.bfloat16), expected(*arguments, torch.bfloat16))


@pytest.mark.needs_gpu
def test_a_poisoned_row_is_nan_and_no_other_is():
    q, weight, x_scale, w_scale, bias = operands(20, 64, 128, device="cuda")
    x_scale[3], q[3] = torch.nan, 0
    y = ops.w8a8(q, weight, x_scale, w_scale, bias, torch.bfloat16)
    want = expected(q, weight, x_scale, w_scale, bias, torch.bfloat16)
    assert bool(y[3].isnan().all())
    rest = torch.arange(20, device="cuda") != 3
    check_bitwise(y[rest], want[rest])


@pytest.mark.needs_gpu
def test_the_op_works_under_compile_graphs_and_streams():
    def run(*arguments):
        return ops.w8a8(*arguments, torch.bfloat16)

    for m in (3, 100):
        arguments = operands(m, 4608, 3584, torch.bfloat16, device="cuda")
        want = expected(*arguments, torch.bfloat16)
        check_bitwise(torch.compile(run, fullgraph=True, dynamic=True)(*arguments), want)
        static, graph = torch.zeros_like(arguments[0]), torch.cuda.CUDAGraph()
        run(*arguments)
        with torch.cuda.graph(graph):
            captured = run(static, *arguments[1:])
        static.copy_(arguments[0])
        captured.fill_(torch.nan)
        graph.replay()
        check_bitwise(captured, want)
        streams = [torch.cuda.Stream() for _ in range(2)]
        flipped = (arguments[0].flip(0), arguments[1], arguments[2].flip(0), *arguments[3:])
        torch.cuda.synchronize()
        results = []
        for stream, one in zip(streams * 3, (arguments, flipped) * 3, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(*one))
        torch.cuda.synchronize()
        for got, one in zip(results, (want, want.flip(0)) * 3, strict=True):
            check_bitwise(got, one)


@pytest.mark.needs_gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 30 << 30, reason="needs 30 GB")
def test_outputs_pass_2_to_the_31():
    for k in (64, 31):
        q, weight, x_scale, w_scale, bias = operands(70000, 37888, k, device="cuda")
        y = ops.w8a8(q, weight, x_scale, w_scale, bias, torch.bfloat16)
        for rows in (slice(0, 100), slice(56600, 56800), slice(-100, None)):
            check_bitwise(y[rows], expected(q[rows], weight, x_scale[rows], w_scale, bias, torch.bfloat16))
