"""cuSPARSELt: plans are made, kept and destroyed in order; on a GPU products are right for every type, algorithm, stream and graph."""

from __future__ import annotations

import gc
import itertools
from ctypes import c_float, c_int32, c_void_p

import pytest
import torch
from torch._subclasses import FakeTensorMode

from slidesparse import reference
from slidesparse.errors import UnsupportedError
from slidesparse.ops import cusparselt, cusparselt_plans
from slidesparse.ops.cusparselt import Algorithm
from slidesparse.ops.cusparselt_plans import Multiplication, Plan, Plans
from slidesparse.ops.cusparselt_search import splits
from slidesparse.pattern import Pattern
from slidesparse.testing import check_bitwise, check_close

REASON = cusparselt.unavailable("cuda")
PRODUCTS = [(dtype, out) for dtype, outs in cusparselt.OUT_DTYPES.items() for out in outs]
WANTED = Multiplication(0, 64, 96, 16, torch.int8, torch.bfloat16, True, "alg=3,split_k=2")


class Recorder:
    """Stands in for nvmath's bindings: hands out numbers, records calls, and holds destruction to the library's order."""

    class cuSPARSELtError(Exception):
        pass

    def __init__(self) -> None:
        # Far above enumeration values, which stand among the arguments too.
        self.failing, self.numbers = "", itertools.count(1000)
        self.needs: dict[int, tuple[int, ...]] = {}
        self.calls: list[tuple] = []

    def make(self, name: str, *arguments: int) -> int:
        self.calls.append((name, *arguments))
        if name == self.failing:
            raise self.cuSPARSELtError("NOT_SUPPORTED")
        made = next(self.numbers)
        self.needs[made] = tuple(number for number in arguments[1:] if number in self.needs)
        return made

    def __getattr__(self, name: str):
        if name.endswith("_init"):
            return lambda *arguments: self.make(name, *arguments)
        if name.endswith("_destroy"):
            return self.destroy
        raise AttributeError(name)

    def destroy(self, number: int) -> None:
        assert number in self.needs and not any(number in needs for needs in self.needs.values())
        del self.needs[number]

    def set_attribute(self, handle: int, target: int, attribute: int, at: int, size: int) -> None:
        assert size == 4
        self.calls.append(("set", attribute, c_int32.from_address(at).value))

    matmul_desc_set_attribute = matmul_alg_set_attribute = set_attribute

    def matmul_get_workspace(self, handle: int, plan: int) -> int:
        return 128

    def sp_mma_compressed_size2(self, handle: int, descriptor: int) -> tuple[int, int]:
        return 3840, 0

    def matmul(self, handle, plan, alpha, a, b, beta, c, d, workspace, streams, count) -> None:
        assert plan in self.needs and c == d and workspace and count == 1
        numbers = (c_float.from_address(beta).value, c_void_p.from_address(streams).value)
        self.calls.append(("matmul", alpha, a, b, d, *numbers))


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(cusparselt_plans, "library", lambda: made)
    monkeypatch.setattr(cusparselt_plans, "handle", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_a_plan_describes_the_transposed_product_and_sets_its_algorithm(recorder):
    plan = Plan(WANTED)
    assert recorder.calls == [
        ("structured_descriptor_init", 1, 64, 96, 96, 16, 3, 2, 0),
        ("dense_descriptor_init", 1, 16, 96, 96, 16, 3, 2),
        ("dense_descriptor_init", 1, 64, 16, 64, 16, 14, 1),
        ("matmul_descriptor_init", 1, 0, 1, 1000, 1001, 1002, 1002, 0),
        ("set", 5, 1),
        ("matmul_alg_selection_init", 1, 1003, 0),
        ("set", 0, 3),
        ("set", 3, 2),
        ("matmul_plan_init", 1, 1003, 1004),
    ]
    assert (plan.workspace, plan.compressed_bytes) == (128, 3840)
    del plan
    gc.collect()
    assert not recorder.needs


@pytest.mark.parametrize("failing", ["dense_descriptor_init", "matmul_descriptor_init", "matmul_alg_selection_init", "matmul_plan_init"])
def test_a_refused_plan_leaves_nothing_behind_and_says_what_was_asked(recorder, failing):
    recorder.failing = failing
    with pytest.raises(UnsupportedError, match=r"n=64, k=96, m=16.*alg=3.*NOT_SUPPORTED"):
        Plan(WANTED)
    gc.collect()
    assert not recorder.needs


def test_plans_are_kept_up_to_a_bound_and_calls_under_way_keep_theirs(recorder):
    plans = Plans(bound=2)
    assert plans.known(tuple(WANTED)) is None
    first = plans.make(tuple(WANTED))
    assert plans.known(tuple(WANTED)) is first and plans.make(tuple(WANTED)) is first
    second = plans.make(tuple(WANTED._replace(m=32)))
    plans.known(tuple(WANTED))  # now the second is the older one
    plans.make(tuple(WANTED._replace(m=48)))
    assert len(plans) == 2 and plans.known(tuple(WANTED)) is first and plans.known(tuple(WANTED._replace(m=32))) is None
    assert len(recorder.needs) == 18  # three plans of six objects: the evicted one is still held here
    assert plans.make(tuple(WANTED._replace(m=32))) is not second
    del second
    gc.collect()
    assert len(recorder.needs) == 12
    del first
    plans.clear()
    gc.collect()
    assert not recorder.needs and len(plans) == 0


def test_no_plan_is_made_under_capture(recorder, monkeypatch):
    plans = Plans()
    kept = plans.make(tuple(WANTED))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert plans.make(tuple(WANTED)) is kept
    with pytest.raises(UnsupportedError, match="run it once before capturing"):
        plans.make(tuple(WANTED._replace(m=32)))
    monkeypatch.setattr(cusparselt_plans, "BUILD_UNDER_CAPTURE", True)
    assert plans.make(tuple(WANTED._replace(m=32)))


def test_a_call_passes_pointers_and_the_current_stream(recorder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("", (), {"cuda_stream": 77}))
    q, compressed, alpha = torch.zeros(16, 96, dtype=torch.int8), torch.zeros(3840, dtype=torch.uint8), torch.ones(64)
    y = torch.empty(16, 64, dtype=torch.bfloat16)
    for plan, vector in ((Plan(WANTED), alpha), (Plan(WANTED), None)):
        plan.run(q, compressed, vector, y)
        name, at, *rest = recorder.calls[-1]
        assert (name, *rest) == ("matmul", compressed.data_ptr(), q.data_ptr(), y.data_ptr(), 0.0, 77)
        assert at == alpha.data_ptr() if vector is not None else c_float.from_address(at).value == 1.0


@pytest.mark.parametrize("algorithm", [Algorithm(), Algorithm(0), Algorithm(3, -1), Algorithm(12, 2, 1, 1), Algorithm(7, 0, 6)], ids=repr)
def test_algorithms_read_what_they_write(algorithm):
    assert Algorithm.parse(str(algorithm)) == algorithm


def test_algorithms_are_written_as_documented():
    assert str(Algorithm(3, 2, 1, 1)) == "alg=3,split_k=2,mode=1,buffers=1"
    assert str(Algorithm()) == "" and str(Algorithm(0)) == "alg=0" and str(Algorithm(5, -1)) == "alg=5,split_k=-1"
    for text in ("alg", "split_k=2", "alg=x", "alg=-1", "alg=1,alg=2", "alg=1,waves=2", "alg=1,", " "):
        with pytest.raises(ValueError, match="alg"):
            Algorithm.parse(text)


def test_k_is_split_as_each_generation_can():
    whole = Algorithm(4)
    assert {(one.split_k, one.split_k_mode) for one in splits(whole, (8, 9))} == {(2, 1), (2, 2), (4, 1), (4, 2)}
    assert list(splits(whole, (9, 0))) == [Algorithm(4, -1)]
    assert all(one.split_k == 0 for one in splits(whole, (10, 0)))
    assert not [*splits(Algorithm(4, -1), (9, 0)), *splits(Algorithm(), (9, 0))]


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


def test_without_the_bindings_or_the_library_it_says_what_to_install(monkeypatch):
    class Broken:
        @staticmethod
        def get_property(part: int) -> int:
            raise RuntimeError("CUDA driver is not found")

    def missing(name: str):
        raise ModuleNotFoundError("No module named 'nvmath'")

    for importer, message in ((missing, r"slidesparse\[cuda\]"), (lambda name: Broken, "driver is not found")):
        monkeypatch.setattr(cusparselt_plans.importlib, "import_module", importer)
        with pytest.raises(UnsupportedError, match=message):
            cusparselt_plans.library.__wrapped__()


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
        assert compressed.dtype == torch.uint8 and compressed.shape == (96 * 160 * dtype.itemsize // 2 + 96 * 160 // 8,)
        y = cusparselt.sparse_mm(q, compressed, None, 96, out)
        assert y.dtype == out and y.shape == (48, 96) and y.is_contiguous() and y.device.type == "cuda"
        with pytest.raises(ValueError, match="come as"):
            cusparselt.sparse_mm(q, compressed, None, 96, torch.float64)


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
            check_bitwise(y, exact.to(torch.int32))
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
def test_int8_sums_are_exact_where_float32_is_not(rng):
    combed = reference.prune(torch.randint(101, 128, (64, 28416), generator=rng).to(torch.int8), Pattern.parse("2:4"))
    x = torch.randint(101, 128, (16, 28416), generator=rng).to(torch.int8)
    exact = x.long() @ combed.long().t()
    assert exact.min() > 1 << 24
    y = cusparselt.sparse_mm(x.cuda(), cusparselt.compress(combed.cuda()), None, 64, torch.int32)
    check_bitwise(y.cpu(), exact.int())


@on_gpu
@pytest.mark.parametrize(("dtype", "out"), PRODUCTS, ids=str)
@pytest.mark.parametrize("text", ["2:4", "6:8"])
def test_every_type_is_within_the_policy(dtype, out, text, rng):
    if reason := cusparselt.unavailable("cuda", dtype):
        pytest.skip(reason)
    for m, n, k in ((16, 64, 128), (63, 96, 200), (1000, 512, 1544)):
        case = Case(text, m, n, k, dtype, rng)
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
    alpha = torch.rand(case.n, generator=rng).cuda() if cusparselt.scales_rows(dtype, out) else None
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
