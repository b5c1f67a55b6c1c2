"""The scale-and-bias pass: bitwise its plain composition, by Triton's interpreter on the CPU and compiled on a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from importlib import import_module

import pytest
import torch

from slidesparse import ops
from slidesparse.tolerance import check_bitwise

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SUMS = (torch.int32, torch.bfloat16, torch.float16, torch.float32)
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
# The module: its name in the package is that of the function.
kernels = import_module("slidesparse.ops.rescale")


def sums(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    if dtype == torch.int32:
        return torch.randint(-(1 << 28), 1 << 28, (rows, columns), dtype=dtype, device=device)
    return (torch.randn(rows, columns, device=device) * 100).to(dtype)


def factors(m: int, n: int, device: str = "cpu") -> list[tuple]:
    """Every choice of x_scale, w_scale and bias, given or not."""
    x_scale, w_scale = torch.rand(m, 1, device=device) * 1e-3, torch.randn(n, 1, device=device).exp() * 1e-3
    return list(itertools.product((None, x_scale), (None, w_scale), (None, torch.randn(n, device=device).bfloat16())))


def plain(acc, x_scale, w_scale, bias, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    """The definition, one float32 operation after the other."""
    y = acc[:m, :n].float()
    for factor in (None if w_scale is None else w_scale.t(), x_scale):
        y = y if factor is None else y * factor
    return (y if bias is None else y + bias.float()).to(dtype).contiguous()


def check(device: str, m: int, n: int, wide: int, dtypes, outputs) -> None:
    for dtype, output in itertools.product(dtypes, outputs):
        acc = sums(m + 3, wide, dtype, device)
        for x_scale, w_scale, bias in factors(m, n, device):
            if dtype == torch.int32 and x_scale is w_scale is bias is None:
                continue  # compilers round an integer to the output's type at once
            got = kernels.launch_rescale(acc, x_scale, w_scale, bias, output, m, n)
            check_bitwise(got, plain(acc, x_scale, w_scale, bias, output, m, n))


def interpreted() -> None:
    """Everything the interpreter is asked for; it truncates to bfloat16 (Triton 3.6), so the other types."""
    torch.manual_seed(int(sys.argv[1]))
    check("cpu", 5, 70, 80, (torch.int32, torch.bfloat16), (torch.float16, torch.float32))
    check("cpu", 600, 3, 3, (torch.float32, torch.float16), (torch.float32,))


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_the_kernel_is_bitwise_the_composition_under_the_interpreter():
    """The fixture runs `interpreted` above and fails with what it says."""


@pytest.mark.parametrize("dtype", SUMS, ids=str)
def test_without_a_gpu_the_op_is_the_composition(dtype):
    acc = sums(5, 12, dtype)
    for output, (x_scale, w_scale, bias) in itertools.product(OUTPUTS, factors(4, 10)):
        got = ops.rescale(acc, x_scale, w_scale, bias, output, m=4, n=10)
        check_bitwise(got, plain(acc, x_scale, w_scale, bias, output, 4, 10))


def test_the_op_compiles_for_any_number_of_rows():
    compiled = torch.compile(lambda *arguments: ops.rescale(*arguments, torch.bfloat16), backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (4, 7, 0):
        acc, (x_scale, w_scale, bias) = sums(m + 1, 12, torch.int32), factors(m, 10)[-1]
        check_bitwise(compiled(acc, x_scale, w_scale, bias), plain(acc, x_scale, w_scale, bias, torch.bfloat16, m, 10))


def test_sizes_come_from_the_scales():
    acc, (x_scale, w_scale, bias) = sums(6, 16, torch.int32), factors(4, 12)[-1]
    for arguments, shape in (
        ((acc, x_scale, w_scale, bias), (4, 12)),
        ((acc, x_scale, None, bias), (4, 12)),
        ((acc, None, w_scale, None), (6, 12)),
        ((acc, x_scale, None, None), (4, 16)),
    ):
        assert ops.rescale(*arguments, torch.bfloat16).shape == shape


def test_schema_and_fake_hold():
    acc = sums(6, 16, torch.float32)
    for x_scale, w_scale, bias in factors(4, 12):
        torch.library.opcheck(torch.ops.slidesparse.rescale.default, (acc, x_scale, w_scale, bias, torch.float32, 4, 12))
    # Nothing to do is no reason to give the input back.
    torch.library.opcheck(torch.ops.slidesparse.rescale.default, (acc, None, None, None, torch.float32, 6, 16))


def test_bad_requests_are_refused():
    acc, (x_scale, w_scale, bias) = sums(4, 12, torch.int32), factors(4, 12)[-1]
    for message, call in (
        ("sums must", lambda: ops.rescale(acc[0], x_scale, w_scale, bias, torch.bfloat16)),
        ("sums must", lambda: ops.rescale(acc.long(), x_scale, w_scale, bias, torch.bfloat16)),
        ("output must", lambda: ops.rescale(acc, x_scale, w_scale, bias, torch.int32)),
        ("do not hold", lambda: ops.rescale(acc, x_scale, w_scale, bias, torch.bfloat16, m=5)),
        ("do not hold", lambda: ops.rescale(acc[:, 1:], x_scale, w_scale, bias, torch.bfloat16)),
        ("x_scale must", lambda: ops.rescale(acc, x_scale.half(), w_scale, bias, torch.bfloat16)),
        ("w_scale must", lambda: ops.rescale(acc, x_scale, w_scale, bias, torch.bfloat16, n=11)),
        ("bias must", lambda: ops.rescale(acc, x_scale, w_scale, bias[1:], torch.bfloat16)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.needs_gpu
@pytest.mark.parametrize(("n", "wide"), [(1, 8), (777, 784), (3584, 3584)])
@pytest.mark.parametrize("dtype", SUMS, ids=str)
def test_the_kernel_is_bitwise_the_composition_on_a_gpu(dtype, n, wide):
    """Numbers of rows share kernels, so they share a test."""
    for m in (0, 1, 7, 63, 1000):
        check("cuda", m, n, wide, (dtype,), OUTPUTS)


@pytest.mark.needs_gpu
def test_the_op_works_under_compile_and_graphs():
    acc, (x_scale, w_scale, bias) = sums(100, 784, torch.int32, "cuda"), factors(90, 777, "cuda")[-1]
    want = plain(acc, x_scale, w_scale, bias, torch.bfloat16, 90, 777)
    run = lambda acc: ops.rescale(acc, x_scale, w_scale, bias, torch.bfloat16)  # noqa: E731
    check_bitwise(torch.compile(run, fullgraph=True, dynamic=True)(acc), want)
    static, graph = torch.zeros_like(acc), torch.cuda.CUDAGraph()
    run(static)
    with torch.cuda.graph(graph):
        captured = run(static)
    static.copy_(acc)
    graph.replay()
    check_bitwise(captured, want)


@pytest.mark.needs_gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 60 << 30, reason="needs 60 GB")
def test_offsets_pass_2_to_the_31():
    acc, (x_scale, w_scale, bias) = sums(70000, 37888, torch.bfloat16, "cuda"), factors(70000, 37888, "cuda")[-1]
    y = ops.rescale(acc, x_scale, w_scale, bias, torch.bfloat16)
    for rows in (slice(56600, 56800), slice(69900, 70000)):
        check_bitwise(y[rows], plain(acc[rows], x_scale[rows], w_scale, bias, torch.bfloat16, rows.stop - rows.start, 37888))
