"""Expanding packed weights: bitwise the oracle, by Triton's interpreter on the CPU and compiled on a GPU; ops hold under compile, graphs
and streams."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from slidesparse import packing, reference
from slidesparse.format import Packed
from slidesparse.ops import expand
from slidesparse.ops.expand import Tile
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.tolerance import check_bitwise

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = (torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16)
OTHERS = tuple(Pattern.parse(text) for text in ("2:3@1:2", "4:8@4:8", "12:16@4:8", "6:8x2", "18:20", "62:64"))


def masked(n: int, k: int, pattern: Pattern, dtype: torch.dtype) -> torch.Tensor:
    """Random bytes that obey the pattern: every bit pattern may be moved, NaN too, but +0.0 stands where weights are pruned."""
    keep = reference.prune_mask(torch.randn(n, k), pattern)
    bits = torch.randint(1, 127, (n, k * dtype.itemsize), dtype=torch.int8)
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]) if k else torch.empty(n, 0, dtype=torch.int8)
    # A group with more zeros than it must have is filled up by the packer.
    return torch.where(keep & (torch.rand(n, k) > 0.05), bits, 0).view(dtype) if n * k else torch.empty(n, k, dtype=dtype)


def slid(weight: torch.Tensor, pattern: Pattern, width: int, rows: int) -> torch.Tensor:
    y = reference.slide(weight, pattern)[0]
    codes = packing.integer_view(y)
    return torch.nn.functional.pad(codes, (0, width - y.shape[1], 0, -y.shape[0] % rows)).view(weight.dtype)


def moved(packed: Packed, device: str) -> Packed:
    return Packed(packed.values.to(device), packed.keep.to(device), packed.pattern, packed.k)


def check_kernels(device: str, n: int, k: int, pattern: Pattern, dtype: torch.dtype, tile: Tile | None = None, inline: bool = True):
    weight = masked(n, k, pattern, dtype)
    packed = reference.pack(weight, pattern)
    check_bitwise(reference.restore(packed), weight)
    there = moved(packed, device)
    check_bitwise(expand.launch_restore(there.values, there.keep, pattern, k, tile, inline=inline).cpu(), weight)
    least = pattern.slid_k(k)
    for width, rows in ((least, 1), (-(-(least + 1) // 32) * 32, 8), (least + 3, 3)):
        got = expand.launch_slide(there.values, there.keep, pattern, k, width, rows, tile)
        check_bitwise(got.cpu(), slid(weight, pattern, width, rows))


def interpreted() -> None:
    """Everything the interpreter is asked for; runs in a process of its own, which Triton reads the choice from at import."""
    torch.manual_seed(int(sys.argv[1]))
    small = Tile(rows=4, warps=1, unroll=2)
    for dtype in (torch.int8, torch.bfloat16):
        for pattern in KNOWN:
            for k in (61, 144):
                check_kernels("cpu", 5, k, pattern, dtype, small, inline=False)
        check_kernels("cpu", 7, 256, Pattern.parse("6:8"), dtype, Tile(1, 1, 1), inline=False)
        check_kernels("cpu", 3, 40, Pattern.parse("6:8"), dtype, small, inline=False)
        check_kernels("cpu", 2, 1, Pattern.parse("6:8"), dtype, small, inline=False)
        check_kernels("cpu", 0, 16, Pattern.parse("6:8"), dtype, small, inline=False)
        check_kernels("cpu", 2, 0, Pattern.parse("6:8"), dtype, small, inline=False)
    # A flipped keep-bit shows, and no wrong bits make a kernel read outside the tensors (the allocator would not forgive it for long).
    weight, pattern = masked(5, 64, Pattern.parse("6:8"), torch.int8), Pattern.parse("6:8")
    packed = reference.pack(weight, pattern)
    packed.keep[2, 3] ^= 1
    assert not torch.equal(expand.launch_restore(packed.values, packed.keep, pattern, 64, small, inline=False), weight)
    for byte in (0, 255):
        expand.launch_restore(packed.values, packed.keep.fill_(byte), pattern, 64, small, inline=False)


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_kernels_are_bitwise_the_oracle_under_the_interpreter():
    """The fixture runs `interpreted` above and fails with what it says."""


def both(values: torch.Tensor, keep: torch.Tensor, pattern: Pattern, k: int) -> tuple[torch.Tensor, ...]:
    """Everything the module offers for one matrix."""
    packed = Packed(values, keep, pattern, k)
    return expand.restore(packed), expand.slide(packed), expand.slide(packed, width=pattern.slid_k(k) + 6, rows=4)


def check_ops(run, pattern: Pattern, dtype: torch.dtype) -> None:
    k = 62 if pattern.unit == 2 else 61
    weight = masked(5, k, pattern, dtype)
    stored, least = reference.pack(weight, pattern), pattern.slid_k(k)
    expected = weight, slid(weight, pattern, least, 1), slid(weight, pattern, least + 6, 4)
    for got, wanted in zip(run(stored.values, stored.keep, pattern, k), expected, strict=True):
        check_bitwise(got, wanted)


@pytest.mark.parametrize("pattern", (*KNOWN, *OTHERS), ids=str)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.uint8), ids=str)
def test_without_a_gpu_the_ops_are_the_packers(pattern, dtype):
    check_ops(both, pattern, dtype)


def test_one_compiled_function_takes_several_patterns_and_types():
    torch.compiler.reset()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for pattern, dtype in (("6:8", torch.int8), ("4:6", torch.int8), ("8:10", torch.bfloat16), ("6:8x2", torch.float8_e4m3fn)):
        check_ops(compiled, Pattern.parse(pattern), dtype)


def test_schemas_and_fakes_hold():
    packed = reference.pack(masked(5, 30, Pattern.parse("6:8"), torch.int8), Pattern.parse("6:8"))
    namespace = torch.ops.slidesparse
    torch.library.opcheck(namespace.restore.default, (packed.values, packed.keep, "6:8", 30))
    torch.library.opcheck(namespace.slide.default, (packed.values, packed.keep, "6:8", 30, 64, 16))


def test_bad_requests_are_refused():
    pattern = Pattern.parse("6:8")
    packed = reference.pack(masked(5, 32, pattern, torch.int8), pattern)
    for message, call in (
        ("smaller than", lambda: expand.slide(packed, width=47)),
        ("positive", lambda: expand.slide(packed, rows=0)),
        ("do not hold", lambda: expand.restore(Packed(packed.values[:, 1:], packed.keep, pattern, 32))),
        ("do not hold", lambda: expand.restore(Packed(packed.values, packed.keep.int(), pattern, 32))),
        ("do not hold", lambda: expand.slide(Packed(packed.values, packed.keep, Pattern.parse("4:6"), 32))),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", KNOWN, ids=str)
def test_kernels_are_bitwise_the_oracle_on_a_gpu(pattern, dtype):
    for n, k in ((0, 64), (1, 1), (7, 61), (63, 515), (33, 3584), (9, 18944), (5, 1000)):
        check_kernels("cuda", n, k, pattern, dtype)
    for tile in (Tile(1, 1, 1), Tile(2, 4, 4), Tile(8, 8, 1)):
        check_kernels("cuda", 13, 1440, pattern, dtype, tile)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("pattern", OTHERS, ids=str)
def test_other_patterns_fall_back_on_a_gpu(pattern):
    weight = masked(9, 96, pattern, torch.bfloat16)
    packed = moved(reference.pack(weight, pattern), "cuda")
    check_bitwise(expand.restore(packed).cpu(), weight)
    check_bitwise(expand.slide(packed, rows=4).cpu(), slid(weight, pattern, pattern.slid_k(96), 4))


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_ops_take_slices_graphs_compilation_and_streams(dtype):
    pattern, k = Pattern.parse("6:8"), 792
    weights = [masked(100, k, pattern, dtype) for _ in range(2)]
    stored = [moved(reference.pack(weight, pattern), "cuda") for weight in weights]

    def run(values, keep):
        packed = Packed(values, keep, pattern, k)
        return expand.restore(packed), expand.slide(packed, width=1216, rows=16)

    def check(got, weight):
        for one, wanted in zip(got, (weight, slid(weight, pattern, 1216, 16)), strict=True):
            check_bitwise(one.cpu(), wanted)

    # Rows of 594 values do not begin at whole words, strided ones are copied.
    for rows in (slice(1, 40), slice(3, None, 2)):
        check(run(stored[0].values[rows], stored[0].keep[rows]), weights[0][rows])
    check(torch.compile(run, fullgraph=True)(stored[0].values, stored[0].keep), weights[0])
    static, graph = moved(stored[0], "cuda"), torch.cuda.CUDAGraph()
    static.values, static.keep = static.values.clone(), static.keep.clone()
    with torch.cuda.graph(graph):
        captured = run(static.values, static.keep)
    static.values.copy_(stored[1].values)
    static.keep.copy_(stored[1].keep)
    graph.replay()
    check(captured, weights[1])
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream, packed in zip(streams, stored, strict=True):
        with torch.cuda.stream(stream):
            results.append(run(packed.values, packed.keep))
    torch.cuda.synchronize()
    for got, weight in zip(results, weights, strict=True):
        check(got, weight)


@pytest.mark.needs_gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 30 << 30, reason="needs 30 GB")
def test_offsets_pass_2_to_the_31_and_rows_the_grid():
    pattern = Pattern.parse("6:8")
    for n, k in ((130000, 18944), (1 << 20, 64)):
        values = torch.randint(1, 127, (n, pattern.packed_k(k)), dtype=torch.int8, device="cuda")
        keep = torch.full((n, k // 8), 0b10110111, dtype=torch.uint8, device="cuda")
        tail = Packed(values[-3:].cpu(), keep[-3:].cpu(), pattern, k)
        packed = Packed(values, keep, pattern, k)
        check_bitwise(expand.restore(packed)[-3:].cpu(), reference.restore(tail))
        check_bitwise(expand.slide(packed)[-3:].cpu(), slid(reference.restore(tail), pattern, pattern.slid_k(k), 1))
