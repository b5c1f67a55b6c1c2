"""cuSPARSELt: what does not fit is refused; on a GPU products are right for every type, algorithm, stream and graph."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from slidesparse import reference
from slidesparse.errors import UnsupportedError
from slidesparse.ops import cusparselt
from slidesparse.pattern import Pattern
from slidesparse.tolerance import check_bitwise, check_close

REASON = cusparselt.unavailable("cuda")
PRODUCTS = [(dtype, out) for dtype, outs in cusparselt.OUT_DTYPES.items() for out in outs]


def test_where_it_cannot_run_it_says_why():
    assert cusparselt.unavailable("cpu") == "cuSPARSELt runs on CUDA, not on cpu"
    slid, q = torch.zeros(32, 32, dtype=torch.int8), torch.zeros(16, 32, dtype=torch.int8)
    for call in (
        lambda: cusparselt.compress(slid),
        lambda: cusparselt.sparse_mm(q, torch.zeros(640, dtype=torch.uint8), None, 32, torch.int32),
        lambda: cusparselt.search(q, torch.zeros(640, dtype=torch.uint8), None, 32, torch.int32),
    ):
        with pytest.raises(UnsupportedError, match="not on cpu"):
            call()


def test_operands_that_do_not_fit_are_refused():
    q, half = torch.zeros(16, 64, dtype=torch.int8), torch.zeros(16, 64, dtype=torch.float16)
    weights, alpha = torch.zeros(1280, dtype=torch.uint8), torch.ones(32)
    cusparselt.checked(q, weights, alpha, 32, torch.bfloat16)
    for message, arguments in (
        ("contiguous", (q.t(), weights, None, 32, torch.int32)),
        ("contiguous", (q[0], weights, None, 32, torch.int32)),
        ("does not multiply", (q.float(), weights, None, 32, torch.float32)),
        ("come as", (q, weights, None, 32, torch.float32)),
        ("come as", (half, weights, None, 32, torch.bfloat16)),
        ("multiple of 16", (q[:8], weights, None, 32, torch.int32)),
        ("multiples of 32", (q, weights, None, 48, torch.int32)),
        ("multiples of 32", (q[:, :48].contiguous(), weights, None, 32, torch.int32)),
        ("multiples of 16", (half, weights, None, 24, torch.float16)),
        ("uint8", (q, weights.float(), None, 32, torch.int32)),
        ("alpha must be None", (q, weights, alpha, 32, torch.int32)),
        ("alpha must be None", (half, weights, alpha, 32, torch.float16)),
        ("alpha must be float32", (q, weights, alpha[:31], 32, torch.bfloat16)),
        ("alpha must be float32", (q, weights, alpha.double(), 32, torch.bfloat16)),
    ):
        with pytest.raises(ValueError, match=message):
            cusparselt.checked(*arguments)
    assert [cusparselt.alignment(dtype) for dtype in cusparselt.OUT_DTYPES] == [32, 32, 16, 16]


@pytest.mark.parametrize(("dtype", "out"), PRODUCTS, ids=str)
def test_fakes_give_shapes_and_types(dtype, out):
    with FakeTensorMode():
        q, slid = torch.empty(48, 160, dtype=dtype, device="cuda"), torch.empty(96, 160, dtype=dtype, device="cuda")
        compressed = cusparselt.compress(slid)
        assert compressed.dtype == torch.uint8 and compressed.shape == ({1: 10752, 2: 17920}[dtype.itemsize],)
        y = cusparselt.sparse_mm(q, compressed, None, 96, out)
        assert y.dtype == out and y.shape == (48, 96) and y.is_contiguous() and y.device.type == "cuda"
        with pytest.raises(ValueError, match="come as"):
            cusparselt.sparse_mm(q, compressed, None, 96, torch.float64)


def test_many_tokens_share_plans():
    steps = {m: cusparselt.token_step(m) for m in (1, 512, 513, 4096, 4097, 1 << 20)}
    assert steps == {1: 16, 512: 16, 513: 64, 4096: 64, 4097: 128, 1 << 20: 128}
    assert len({-(-m // step) * step for m, step in ((m, cusparselt.token_step(m)) for m in range(1, 32769))}) < 320


def test_plans_are_made_where_they_are_not_known(monkeypatch):
    class Plans:
        def known(self, wanted):
            return "known" if wanted == (1,) else None

        def make(self, wanted):
            return f"made for {wanted}"

    monkeypatch.setattr(cusparselt, "plans", Plans())
    assert cusparselt.plan_for((1,)) == "known" and cusparselt.plan_for((2,)) == "made for (2,)"


def on_gpu(test):
    return pytest.mark.needs_gpu(pytest.mark.skipif(REASON is not None, reason=f"no cuSPARSELt: {REASON}")(test))


def padded(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Zeros up to multiples."""
    out = torch.zeros(-(-x.shape[0] // rows) * rows, -(-x.shape[1] // columns) * columns, dtype=x.dtype)
    out.view(torch.uint8)[: x.shape[0], : x.shape[1] * x.element_size()] = x.contiguous().view(torch.uint8)
    return out


def numbers(shape: tuple[int, int], dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=rng).to(dtype)
    return torch.randn(shape, generator=rng).to(dtype)


class Case:
    """A pruned weight ``[N, K]``, slid, padded and compressed, and activations lifted to fit."""

    def __init__(self, text: str, m: int, n: int, k: int, dtype: torch.dtype, rng: torch.Generator) -> None:
        pattern, align = Pattern.parse(text), cusparselt.alignment(dtype)
        self.weight, self.x = reference.prune(numbers((n, k), dtype, rng), pattern), numbers((m, k), dtype, rng)
        self.slid = padded(reference.slide(self.weight, pattern)[0], align, align).cuda()
        self.n, self.compressed = self.slid.shape[0], cusparselt.compress(self.slid)
        self.q = padded(reference.lift(self.x, pattern), 16, align).cuda()
        self.m, self.rows = m, n

    def run(self, alpha: torch.Tensor | None, out: torch.dtype, algorithm: str = "") -> torch.Tensor:
        self.poison(out)
        return cusparselt.sparse_mm(self.q, self.compressed, alpha, self.n, out, algorithm)

    def poison(self, out: torch.dtype) -> None:
        """Leave bytes that the output will be made of: NaN for floats."""
        torch.full((self.q.shape[0], self.n * out.itemsize), 0xFF, dtype=torch.uint8, device="cuda")

    def check(self, y: torch.Tensor, alpha: torch.Tensor | None = None) -> None:
        exact = self.x.double() @ self.weight.double().t()
        y = y[: self.m, : self.rows].cpu()
        if y.dtype == torch.int32:
            check_bitwise(y.float(), exact.float())
            return
        scale = torch.ones(self.rows) if alpha is None else alpha[: self.rows].cpu()
        check_close(y, exact * scale, (self.by_torch(y.dtype, exact) * scale).to(y.dtype))

    def by_torch(self, out: torch.dtype, exact: torch.Tensor) -> torch.Tensor:
        if self.q.dtype == torch.int8:
            return exact.float()
        if self.q.dtype == torch.float8_e4m3fn:
            one = torch.ones((), device="cuda")
            product = torch._scaled_mm(self.q, self.slid.t(), one, one, out_dtype=out, use_fast_accum=True)
        else:
            product = self.q @ self.slid.t()
        return product[: self.m, : self.rows].cpu().float()


@on_gpu
@pytest.mark.parametrize("text", ["2:4", "6:8"])
@pytest.mark.parametrize("m", [0, 7, 16, 64, 1008])
def test_int8_sums_are_exact(text, m, rng):
    for n, k in ((32, 64), (96, 200), (1000, 1544)):
        case = Case(text, m, n, k, torch.int8, rng)
        y = case.run(None, torch.int32)
        assert y.shape == (case.q.shape[0], case.n)
        case.check(y)


@on_gpu
def test_int8_sums_are_rounded_once_to_float32(rng):
    """The library hands int32 sums through float32: no less than the linear's definition asks for, but no integers either."""
    combed = reference.prune(torch.randint(101, 128, (64, 28416), generator=rng).to(torch.int8), Pattern.parse("2:4"))
    x = torch.randint(101, 128, (16, 28416), generator=rng).to(torch.int8)
    exact = x.long() @ combed.long().t()
    assert exact.min() > 1 << 24
    y = cusparselt.sparse_mm(x.cuda(), cusparselt.compress(combed.cuda()), None, 64, torch.int32)
    check_bitwise(y.cpu(), exact.float().int())


@on_gpu
@pytest.mark.parametrize(("dtype", "out"), PRODUCTS, ids=str)
@pytest.mark.parametrize("text", ["2:4", "6:8"])
def test_every_type_is_within_the_policy(dtype, out, text, rng):
    if reason := cusparselt.unavailable("cuda", dtype):
        pytest.skip(reason)
    for m, n, k in ((16, 64, 128), (63, 96, 200), (1000, 512, 1544)):
        case = Case(text, m, n, k, dtype, rng)
        if (dtype, out) != (torch.int8, torch.float16):  # its sums overflow
            case.check(case.run(None, out))
        if cusparselt.scales_rows(dtype, out):
            alpha = torch.logspace(-5, -2, case.n).cuda()
            case.check(case.run(alpha, out), alpha)


@on_gpu
def test_graphs_streams_and_compilation(rng):
    case = Case("6:8", 64, 96, 400, torch.int8, rng)
    alpha = torch.rand(case.n, generator=rng).cuda()
    operands = (case.compressed, alpha, case.n, torch.bfloat16)
    expected = cusparselt.sparse_mm(case.q, *operands)
    case.check(expected, alpha)
    compiled = torch.compile(lambda q: cusparselt.sparse_mm(q, *operands) + 1, fullgraph=True)
    check_bitwise(compiled(case.q), expected + 1)
    static, graph = torch.zeros_like(case.q), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cusparselt.sparse_mm(static, *operands)
    static.copy_(case.q)
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        check_bitwise(captured, expected)
    with pytest.raises(UnsupportedError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cusparselt.sparse_mm(static[:48], *operands)
    flipped = case.q.flip(0).contiguous()
    results = []
    torch.cuda.synchronize()
    for one in (case.q, flipped) * 4:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(cusparselt.sparse_mm(one, *operands))
    torch.cuda.synchronize()
    for y, forward in zip(results, (True, False) * 4, strict=True):
        check_bitwise(y if forward else y.flip(0), expected)


@on_gpu
def test_evicted_plans_are_made_again(rng, monkeypatch):
    monkeypatch.setattr(cusparselt.plans, "bound", 2)
    cusparselt.plans.clear()
    for m in (16, 32, 48, 64) * 3:
        case = Case("2:4", m, 64, 128, torch.int8, rng)
        case.check(case.run(None, torch.int32))
        assert len(cusparselt.plans) <= 2


@on_gpu
@pytest.mark.parametrize(("dtype", "out"), PRODUCTS, ids=str)
@pytest.mark.parametrize("m", [16, 272])
def test_algorithms_found_are_right(dtype, out, m, rng):
    if reason := cusparselt.unavailable("cuda", dtype):
        pytest.skip(reason)
    case = Case("6:8", m, 512, 4096, dtype, rng)
    alpha = torch.rand(case.n, generator=rng).div(100).cuda() if cusparselt.scales_rows(dtype, out) else None
    found = cusparselt.search(case.q, case.compressed, alpha, case.n, out)
    assert found and len(set(found)) == len(found)
    for algorithm in found:
        case.check(case.run(alpha, out, str(algorithm)), alpha)
    with pytest.raises(UnsupportedError, match="alg=9999"):
        case.run(alpha, out, "alg=9999")
    assert cusparselt.search(case.q[:0], case.compressed, alpha, case.n, out) == []


@on_gpu
def test_schemas_hold_and_bad_weights_are_refused(rng):
    case = Case("2:4", 32, 64, 128, torch.bfloat16, rng)
    slid = case.weight.cuda()
    torch.library.opcheck(torch.ops.slidesparse.compress.default, (slid,))
    torch.library.opcheck(torch.ops.slidesparse.sparse_mm.default, (case.q, case.compressed, None, case.n, torch.bfloat16, ""))
    with pytest.raises(ValueError, match="bytes"):
        cusparselt.sparse_mm(case.q, case.compressed[:-1].contiguous(), None, case.n, torch.bfloat16)
    for message, weights in (("contiguous", slid.t()), ("multiples of 16", slid[:24]), ("does not multiply", slid.float())):
        with pytest.raises(ValueError, match=message):
            cusparselt.compress(weights)
    slid[5, 4:8] = torch.tensor([1.0, 2.0, -0.0, 3.0])
    with pytest.raises(ValueError, match=r"row 5, window 1 holds more than 2 non-zeros: \[1.0, 2.0"):
        cusparselt.compress(slid)
    slid[5, 4:8] = torch.tensor([1.0, 2.0, -0.0, 0.0])
    cusparselt.compress(slid)
