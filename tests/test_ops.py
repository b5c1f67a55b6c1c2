"""Row kernels: bitwise the oracle, by Triton's interpreter on the CPU and compiled on a GPU; ops work under compile, graphs and streams."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from importlib import import_module

import pytest
import torch

from slidesparse import ops, reference
from slidesparse.format import SCHEMES
from slidesparse.ops.row_config import RowConfig
from slidesparse.pattern import Pattern
from slidesparse.tolerance import check_bitwise

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
PATTERNS = (
    *((f"{group - 2}:{group}", 0) for group in range(4, 20, 2)),
    *(("4:6", 3), ("6:8", 5), ("8:10", 1), ("4:8@4:8", 0), ("2:3@1:2", 1)),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The module: its name in the package is that of the function.
kernels = import_module("slidesparse.ops.quantize")


def rows(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows of very different scales; among 14 and more also zeros, NaN, Inf, −0.0, subnormals and huge values."""
    x = torch.randn(m, k).mul(torch.logspace(-2, 2, m).unsqueeze(-1)).to(dtype) if m else torch.empty(0, k, dtype=dtype)
    if m >= 14:
        x[1], x[2, 0], x[3, -1], x[4] = 0, torch.nan, torch.inf, -0.0
        x[5], x[6] = (torch.randn(k) * 1e-39).to(dtype), (torch.randn(k) * 1e-44).to(dtype)
        x[7] = (torch.randn(k) * (1e37 if dtype != torch.float16 else 1e4)).to(dtype)
        x[8] = (torch.randint(-300, 300, (k,)).float() * 2**-149).to(dtype)
        x[9, ::2] = -0.0
        # Quotients that tie exactly.
        x[10], x[11] = (torch.arange(k) % 255 - 127).to(dtype), ((torch.arange(k) % 509 - 254) / 2).to(dtype)
        # Quotients that tie, by a scale whose inverse is rounded.
        size = 1 + (torch.randint(512, (1,)) * 2 + 1) / 1024
        x[12] = ((torch.arange(k) % 254 - 126.5) * size).to(dtype)
        x[12, 0] = 127 * size
        x[13] = (x[12].float() * 2.0**-125).to(dtype)
    return x


def padded(y: torch.Tensor, width: int) -> torch.Tensor:
    """Zero columns behind y."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[y.element_size()]
    return torch.nn.functional.pad(y.view(bits), (0, width - y.shape[1])).view(y.dtype)


def check_kernels(device: str, m: int, k: int, dtype: torch.dtype, patterns=PATTERNS, configs=(None,), compiled: bool = True) -> None:
    x = rows(m, k, dtype)
    there = x.to(device)
    # The interpreter's own conversion to e4m3 loses the carry into the exponent (Triton 3.6): compiled kernels only.
    schemes = ("int8", "fp8") if compiled else ("int8",)
    for scheme, config in itertools.product((SCHEMES[name] for name in schemes), configs):
        q, scale = reference.quantize(x, scheme)
        got, got_scale = kernels.launch_quantize(there, scheme.dtype, k + 5, 1, config, compiled=compiled)
        check_bitwise(got_scale.cpu(), scale)
        check_bitwise(got.cpu(), padded(q, k + 5))
        twice = (("6:8", 0, True),) if ("6:8", 0) in patterns else ()
        for text, offset, gather in (*((text, offset, False) for text, offset in patterns), *twice):
            pattern = Pattern.parse(text)
            width = -(-pattern.slid_k(k, offset) // 8) * 8 + 8
            expected = padded(reference.lift(q, pattern, offset), width)
            got, got_scale = kernels.launch_quantize_lift(
                there, pattern, scheme.dtype, offset, width, 16, config, compiled=compiled, gather=gather
            )
            assert got.shape[0] == -(-m // 16) * 16
            check_bitwise(got_scale.cpu(), scale)
            check_bitwise(got[:m].cpu(), expected)
            lifted = kernels.launch_lift(there, pattern, offset, width, 1, config)
            check_bitwise(lifted.cpu(), padded(reference.lift(x, pattern, offset), width))


def interpreted() -> None:
    """Everything the interpreter is asked for; runs in a process of its own, which Triton reads the choice from at import."""
    torch.manual_seed(int(sys.argv[1]))
    check_kernels("cpu", 14, 61, torch.bfloat16, configs=(RowConfig(8, 8, 1),), compiled=False)
    check_kernels("cpu", 14, 256, torch.bfloat16, patterns=(("6:8", 0), ("8:10", 3)), configs=(RowConfig(8, 16, 1),), compiled=False)
    # More chunks than stay in registers.
    check_kernels("cpu", 14, 255, torch.bfloat16, patterns=(("6:8", 0), ("8:10", 0)), configs=(RowConfig(16, 1, 1),), compiled=False)
    check_kernels("cpu", 63, 9, torch.float16, patterns=(("6:8", 1),), compiled=False)
    check_kernels("cpu", 14, 30, torch.float32, patterns=(("6:8", 0),), compiled=False)


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_kernels_are_bitwise_the_oracle_under_the_interpreter():
    """The fixture runs `interpreted` above and fails with what it says."""


def two_multiplications(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What kernels make of 16-bit elements; float64 holds the product that a fused multiply-add does not round."""
    high = 1 / scale
    high = torch.where(1 - high.double() * scale.double() < 0, high.nextafter(torch.zeros(())), high)
    low = (1 - high.double() * scale.double()).float() * high
    return (x.double() * high.double() + (x * low).double()).float()


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_multiplications_divide_every_16_bit_element(dtype, scheme):
    """Every significand of the largest element by every one of a smaller."""
    size = round(1 / torch.finfo(dtype).eps)
    significands = torch.arange(size, 2 * size)
    scale = (significands.float() / SCHEMES[scheme].bound).unsqueeze(-1)
    for exponent in range(21 if dtype == torch.bfloat16 else 12):
        x = significands.float() * 2.0**-exponent
        possible = x <= significands.unsqueeze(-1)
        assert torch.equal(two_multiplications(x, scale)[possible], (x / scale)[possible])


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_two_multiplications_divide_where_the_scale_is_subnormal(scheme):
    """Every bfloat16 under 2^-118 by the scale of every one as large: there scales have lost bits, and rows are first scaled up."""
    scheme, factor = SCHEMES[scheme], 2.0**90
    every = torch.arange(1, (127 - 118) << 7).to(torch.int16).view(torch.bfloat16).float()
    for largest in every.split(128):
        scale = largest.unsqueeze(-1) / scheme.bound
        scale = torch.where(scale == 0, 1.0, scale)
        limit = scheme.bound * (scale * factor)
        got = two_multiplications((every * factor).clamp(max=limit), scale * factor)
        expected = (every / scale).clamp(max=scheme.bound)
        possible = every <= largest.unsqueeze(-1)
        if scheme.dtype == torch.int8:
            got, expected = got.round(), expected.round()
        assert torch.equal(got[possible].to(scheme.dtype).float(), expected[possible].to(scheme.dtype).float())


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_without_a_gpu_the_ops_are_the_oracle_and_compile(scheme):
    x, pattern, scheme = rows(13, 61, torch.bfloat16), Pattern.parse("6:8"), SCHEMES[scheme]

    def run(x):
        return *ops.quantize(x, scheme, width=64), *ops.quantize_lift(x, pattern, scheme, offset=2, width=128), ops.lift(x, pattern)

    q, scale = reference.quantize(x, scheme)
    lifted = padded(reference.lift(q, pattern, 2), 128)
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        for got, expected in zip(function(x), (padded(q, 64), scale, lifted, scale, reference.lift(x, pattern)), strict=True):
            check_bitwise(got, expected)


def test_schemas_and_fakes_hold():
    x = torch.randn(5, 16)
    namespace = torch.ops.slidesparse
    torch.library.opcheck(namespace.quantize.default, (x, torch.int8, 32, 16))
    torch.library.opcheck(namespace.quantize_lift.default, (x, "6:8", torch.int8, 0, 32, 1))
    torch.library.opcheck(namespace.lift.default, (x, "6:8", 0, 32, 16))


def test_bad_requests_are_refused():
    x, scheme = torch.randn(2, 16), SCHEMES["int8"]
    for message, call in (
        ("does not quantise", lambda: ops.quantize(x, SCHEMES["bf16"])),
        ("matrix", lambda: ops.quantize(x[0], scheme)),
        ("smaller than", lambda: ops.quantize(x, scheme, width=15)),
        ("at least 1", lambda: ops.lift(x, Pattern.parse("6:8"), rows=0)),
        ("float64", lambda: ops.quantize(x.double(), scheme)),
        ("not of pairs", lambda: ops.quantize_lift(x, Pattern.parse("6:8x2"), scheme)),
        ("outside a group", lambda: ops.lift(x, Pattern.parse("6:8"), offset=8)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.needs_gpu
@pytest.mark.parametrize(
    ("k", "patterns"),
    [*((515, (pattern,)) for pattern in PATTERNS), (3584, (("6:8", 0), ("8:10", 1))), (18944, (("6:8", 0),)), (70001, (("6:8", 0),))],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_bitwise_the_oracle_on_a_gpu(dtype, k, patterns):
    """A test for each set of kernels, all numbers of tokens in it: compiling takes longer than running."""
    for m in (0, 1, 7, 16, 63, 1000):
        if m < 1000 or k < 10000:
            check_kernels("cuda", m, k, dtype, patterns)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_element_is_divided_exactly(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, device="cuda").to(torch.int16).view(dtype).float()
    size = round(1 / torch.finfo(dtype).eps)
    for largest in (torch.arange(size, 2 * size, device="cuda") / size).split(128):
        x = torch.where(every.abs() <= largest[:, None], every, 0).to(dtype)
        x[:, 0] = largest.to(dtype)
        for scheme in (SCHEMES["int8"], SCHEMES["fp8"]):
            for got, expected in zip(ops.quantize(x, scheme), reference.quantize(x, scheme), strict=True):
                check_bitwise(got, expected)


@pytest.mark.needs_gpu
def test_ops_take_strides_graphs_compilation_and_streams():
    pattern, scheme = Pattern.parse("6:8"), SCHEMES["fp8"]
    wide = rows(100, 2001, torch.bfloat16)

    def run(x):
        return *ops.quantize_lift(x, pattern, scheme), *ops.quantize(x, scheme), ops.lift(x, pattern)

    def check(got, x):
        q, scale = reference.quantize(x, scheme)
        for a, b in zip(got, (reference.lift(q, pattern), scale, q, scale, reference.lift(x.contiguous(), pattern)), strict=True):
            check_bitwise(a.cpu(), b)

    for view in (lambda x: x[:, 3:1000], lambda x: x[::2, ::2], lambda x: x[:, :96].t()):
        check(run(view(wide.cuda())), view(wide))
    x = wide[:, :800].contiguous()
    check(torch.compile(run, fullgraph=True)(x.cuda()), x)
    static, graph = torch.zeros_like(x, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static)
    static.copy_(x)
    graph.replay()
    check(captured, x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [x, x.flip(0)]
    there = [one.cuda() for one in inputs]
    torch.cuda.synchronize()
    results = []
    for stream, one in zip(streams, there, strict=True):
        with torch.cuda.stream(stream):
            results.append(run(one))
    torch.cuda.synchronize()
    for got, one in zip(results, inputs, strict=True):
        check(got, one)


@pytest.mark.needs_gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 30 << 30, reason="needs 30 GB")
def test_offsets_pass_2_to_the_31():
    pattern, scheme = Pattern.parse("6:8"), SCHEMES["int8"]
    x = torch.randn(70000, 18944 + 8, dtype=torch.bfloat16, device="cuda")
    q, scale = ops.quantize_lift(x, pattern, scheme, width=32768)
    other, _ = kernels.launch_quantize_lift(x, pattern, scheme.dtype, 0, 32768, gather=True)
    tail = x[-3:].cpu()
    expected, expected_scale = reference.quantize(tail, scheme)
    check_bitwise(scale[-3:].cpu(), expected_scale)
    for got in (q, other):
        check_bitwise(got[-3:].cpu(), padded(reference.lift(expected, pattern), 32768))
