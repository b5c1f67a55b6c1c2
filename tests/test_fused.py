"""RMSNorm and SwiGLU quantised in one pass: against the layers one after the other, on the CPU by Triton's interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from slidesparse import ops, reference
from slidesparse.format import SCHEMES, Scheme
from slidesparse.ops import fused as kernels
from slidesparse.ops.row_config import RowConfig
from slidesparse.pattern import Pattern
from slidesparse.tolerance import check_bitwise

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
EPS = 1e-6
PATTERNS = (None, "2:4", "4:6", "6:8", "8:10", "14:16", "16:18", "4:8@4:8")
STEP = {"int8": 1.0, "fp8": 32.0}
"""The largest step between neighbouring quantised values."""


def inputs(m: int, k: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Rows of different scales; among 5 and more also zeros, NaN, Inf, and values whose squares overflow."""
    x, residual = (torch.randn(m, k).mul(torch.logspace(-1, 1, m).unsqueeze(-1) if m else 1).to(dtype) for _ in range(2))
    if m >= 5:
        x[1], x[2, 0], x[3, -1], x[4] = 0, torch.nan, torch.inf, 3e4
    return {name: tensor.to(device) for name, tensor in (("x", x), ("residual", residual), ("weight", torch.randn(k).to(dtype)))}


def eager_norm(x, weight, residual=None) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' layers compute: the sum and its norm."""
    h = x if residual is None else x + residual
    variance = h.float().pow(2).mean(-1, keepdim=True)
    return h, weight * (h.float() * torch.rsqrt(variance + EPS)).to(h.dtype)


def eager_silu(x) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def check_rows(got: tuple[torch.Tensor, ...], h: torch.Tensor, scheme: Scheme, pattern: str | None, width: int) -> None:
    """Scales within two units in the last place of h (float32: 16), values within one step; nearly all are the very same."""
    q, scale = (t.cpu() for t in got[:2])
    expected, expected_scale = reference.quantize(h.cpu(), scheme)
    expected = reference.lift(expected, Pattern.parse(pattern)) if pattern else expected
    m, k = expected.shape
    q = q[:m]
    assert q.dtype == scheme.dtype and q.shape == (m, width) and not q[:, k:].float().any()
    assert scale.shape == expected_scale.shape and torch.equal(scale.isnan(), expected_scale.isnan())
    places = 16 if h.dtype == torch.float32 else 2
    off = (scale - expected_scale).abs().nan_to_num() > places * torch.finfo(h.dtype).eps * expected_scale.nan_to_num()
    assert not off.any(), f"scales differ: {scale[off]} and {expected_scale[off]}"
    real = ~scale.isnan()
    step = STEP[scheme.name] * torch.where(real, torch.maximum(scale, expected_scale), 0)
    # The norm may differ in its last place before it is quantised.
    allowed = 1.02 * step + torch.finfo(h.dtype).eps * (expected.float() * expected_scale).where(real, 0).abs()
    error = (q[:, :k].float() * scale - expected.float() * expected_scale).where(real, 0).abs()
    assert (error <= allowed).all(), f"{(error - allowed).max()} more than a step"
    assert not q[:, :k].float().where(~real, 0).any()
    # Float32 is not rounded on the way, so there the order of a sum shows in many a last place.
    same = (scale == expected_scale) | ~real | (h.dtype == torch.float32)
    assert same.float().mean() > 0.99 or same.numel() - same.sum() <= 1, f"{h.dtype}: {same.sum()} of {same.numel()} scales are equal"
    equal = (q[:, :k].float() == expected.float()).where(same, True)
    assert equal.float().mean() > 0.999 or equal.numel() - equal.sum() <= 2, f"{h.dtype}: {equal.float().mean()} are equal"


def check_fused(
    device: str, m: int, k: int, dtype: torch.dtype, pattern: str | None, scheme: str, config=None, compiled=True, emulated=False
) -> None:
    made = inputs(m, k, dtype, device)
    twin = {name: tensor.cpu() for name, tensor in made.items()}
    parsed, chosen = (Pattern.parse(pattern) if pattern else None), SCHEMES[scheme]
    width = (parsed.slid_k(k) if parsed else k) + 3
    width += -width % 16
    text = pattern if pattern and not ops.quantize.__globals__["moves_nothing"](parsed, 0) else ""
    for residual in (None, made["residual"]):
        h, normed = eager_norm(twin["x"], twin["weight"], None if residual is None else twin["residual"])
        if compiled and not emulated:
            got = ops.rms_norm_quantize(made["x"], made["weight"], EPS, chosen, pattern=parsed, width=width, rows=16, residual=residual)
            assert got[0].shape[0] == -(-m // 16) * 16 and len(got) == 2 + (residual is not None)
        else:
            given = made["x"], made["weight"], residual, EPS, chosen.dtype, text, width, 1, config
            got = kernels.launch_norm(*given, compiled=compiled)
        check_rows(got, normed, chosen, pattern, width)
        if residual is not None:
            # One NaN is as good as another.
            check_bitwise(got[2].cpu().nan_to_num(7.0), h.nan_to_num(7.0))
    both = torch.cat((made["x"], made["residual"]), -1)
    if compiled and not emulated:
        got = ops.silu_mul_quantize(both, chosen, pattern=parsed, width=width, rows=16)
    else:
        got = kernels.launch_silu(both, chosen.dtype, text, width, 1, config, compiled=compiled)
    check_rows(got, eager_silu(both.cpu()), chosen, pattern, width)


def interpreted() -> None:
    """Everything the interpreter is asked for; runs in a process of its own, which Triton reads the choice from at import."""
    torch.manual_seed(int(sys.argv[1]))
    for pattern, k, config in (("6:8", 60, RowConfig(2, 8, 1)), (None, 61, RowConfig(8, 4, 1)), ("8:10", 175, RowConfig(8, 1, 1))):
        check_fused("cpu", 7, k, torch.bfloat16, pattern, "int8", config, compiled=False)
    check_fused("cpu", 5, 33, torch.float32, "4:6", "int8", RowConfig(8, 8, 1), compiled=False)


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_kernels_are_the_layers_under_the_interpreter():
    """The fixture runs `interpreted` above and fails with what it says."""


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_a_gpu_the_ops_are_the_layers(pattern, scheme):
    for m, k, dtype in ((7, 61, torch.bfloat16), (0, 32, torch.float16), (1, 9, torch.float32)):
        check_fused("cpu", m, k, dtype, pattern, scheme)


def run(x, weight, residual):
    pattern, scheme = Pattern.parse("6:8"), SCHEMES["int8"]
    normed = ops.rms_norm_quantize(x, weight, EPS, scheme, pattern=pattern, residual=residual, rows=16)
    both = torch.cat((x, residual), -1)
    return *normed, *ops.rms_norm_quantize(x, weight, EPS, scheme), *ops.silu_mul_quantize(both, scheme, rows=16)


def check_same(got, expected, m: int) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        check_bitwise(a[:m], b[:m])


def test_schemas_hold_and_rows_may_change_under_compilation():
    x, residual, weight = inputs(7, 32, torch.bfloat16).values()
    x[2, 0] = x[3, -1] = 1
    namespace, tail = torch.ops.slidesparse, (torch.int8, "6:8", 48, 1)
    torch.library.opcheck(namespace.rms_norm_quantize.default, (x, weight, EPS, *tail))
    torch.library.opcheck(namespace.add_rms_norm_quantize.default, (x, weight, residual, EPS, *tail))
    torch.library.opcheck(namespace.silu_mul_quantize.default, (x, torch.int8, "", 16, 1))
    torch._dynamo.reset()
    function = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (7, 16, 21):
        x, residual, weight = inputs(m, 32, torch.bfloat16).values()
        check_same(function(x, weight, residual), run(x, weight, residual), m)


def test_bad_requests_are_refused():
    x, weight, scheme = torch.randn(2, 16), torch.ones(16), SCHEMES["int8"]
    for message, call in (
        ("does not quantise", lambda: ops.rms_norm_quantize(x, weight, EPS, SCHEMES["bf16"])),
        ("matrix", lambda: ops.rms_norm_quantize(x[0], weight, EPS, scheme)),
        ("smaller than", lambda: ops.silu_mul_quantize(x, scheme, width=7)),
        ("at least 1", lambda: ops.silu_mul_quantize(x, scheme, rows=0)),
        ("as many ups", lambda: ops.silu_mul_quantize(x[:, 1:], scheme)),
        ("weight must be", lambda: ops.rms_norm_quantize(x, weight.half(), EPS, scheme)),
        ("residual must be", lambda: ops.rms_norm_quantize(x, weight, EPS, scheme, residual=x[:, 1:])),
        ("not of pairs", lambda: ops.silu_mul_quantize(x, scheme, pattern=Pattern.parse("6:8x2"))),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.needs_gpu
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("k", "dtype", "pattern"),
    [
        *((515, dtype, "8:10") for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        *((576, torch.bfloat16, pattern) for pattern in PATTERNS),
        *((k, torch.bfloat16, pattern) for k, pattern in ((3584, "6:8"), (18944, "6:8"), (70001, None))),
    ],
    ids=str,
)
def test_kernels_are_the_layers_on_a_gpu(k, dtype, pattern, scheme):
    """A test for each set of kernels, all numbers of tokens in it: compiling takes longer than running."""
    for m in (0, 1, 7, 16, 63, 1000):
        if m < 100 or k < 10000:
            check_fused("cuda", m, k, dtype, pattern, scheme)


@pytest.mark.needs_gpu
def test_ops_take_strides_graphs_compilation_and_streams():
    x, residual, weight = inputs(100, 800, torch.bfloat16, "cuda").values()
    expected = run(x, weight, residual)
    wide = torch.cat((x, residual), -1)
    check_same(run(wide[:, :800], weight, wide[:, 800:]), expected, 100)
    check_same(run(x.t().contiguous().t(), weight, residual), expected, 100)
    torch._dynamo.reset()
    function = torch.compile(run, fullgraph=True, dynamic=True)
    for m in (100, 37):
        check_same(function(x[:m], weight, residual[:m]), run(x[:m], weight, residual[:m]), m)
    static, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static, weight, residual)
    static.copy_(x)
    graph.replay()
    check_same(captured, expected, 100)
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(run(x, weight, residual))
    torch.cuda.synchronize()
    for got in results:
        check_same(got, expected, 100)
