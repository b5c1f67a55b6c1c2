"""cuSPARSELt without the library: plans are made, kept and destroyed in order, algorithms are read, and wrong ones never chosen."""

from __future__ import annotations

import gc
import itertools
import logging
from ctypes import c_char, c_float, c_int32, c_void_p

import pytest
import torch

from slidesparse.compat.nvmath import Numbers
from slidesparse.errors import UnsupportedError
from slidesparse.ops import cusparselt_plans, cusparselt_search
from slidesparse.ops.cusparselt import Algorithm
from slidesparse.ops.cusparselt_plans import LibraryPlan, Multiplication, Plans

TYPES = {torch.int8: 3, torch.bfloat16: 14}
NUMBERS = Numbers(
    TYPES, non_transpose=0, transpose=1, row_order=2, column_order=1, compute_int32=0, compute_float32=2, half_the_weights=0,
    default_algorithm=0, alpha_vector_scaling=5, config_id=0, config_max_id=1, search_iterations=2, split_k=3, split_k_mode=4,
    split_k_buffers=5,
)  # fmt: skip
"""Those of cusparseLt.h and library_types.h, version 0.8."""
WANTED = Multiplication(0, 64, 96, 16, torch.int8, torch.bfloat16, True, "alg=3,split_k=2")


class Recorder:
    """Stands in for nvmath's bindings: multiplies what its descriptions say lies where, and holds destruction to the library's order.

    It compresses nothing: the weights are read as they would be slid.
    """

    class cuSPARSELtError(Exception):
        pass

    def __init__(self) -> None:
        # Far above enumeration values, which stand among the arguments too.
        self.failing, self.numbers = "", itertools.count(1000)
        self.needs: dict[int, tuple[int, ...]] = {}
        self.made: dict[int, tuple] = {}
        self.set: dict[int, dict[int, int]] = {}
        self.streams: list[int] = []

    def make(self, name: str, *arguments: int) -> int:
        if name == self.failing:
            raise self.cuSPARSELtError("NOT_SUPPORTED")
        number = next(self.numbers)
        self.needs[number] = tuple(one for one in arguments[1:] if one in self.needs)
        self.made[number], self.set[number] = arguments[1:], {}
        return number

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
        self.set[target][attribute] = c_int32.from_address(at).value

    matmul_desc_set_attribute = matmul_alg_set_attribute = set_attribute

    def matmul_get_workspace(self, handle: int, plan: int) -> int:
        return 128

    def sp_mma_compressed_size2(self, handle: int, descriptor: int) -> tuple[int, int]:
        return 3840, 0

    def matrix(self, descriptor: int, address: int) -> torch.Tensor:
        """The described matrix that begins at an address, as a view of the memory there."""
        rows, columns, leading, _, kind, order, *_ = self.made[descriptor]
        dtype = next(dtype for dtype, number in TYPES.items() if number == kind)
        lines = columns if order == NUMBERS.column_order else rows
        flat = torch.frombuffer((c_char * (lines * leading * dtype.itemsize)).from_address(address), dtype=dtype).view(lines, leading)
        return flat[:, :rows].t() if order == NUMBERS.column_order else flat[:, :columns]

    def matmul(self, handle, plan, alpha, a, b, beta, c, d, workspace, streams, count) -> None:
        description, _ = self.made[plan]
        of_a, of_b, *descriptors, sums = self.made[description]
        left, right, addend, out = map(self.matrix, descriptors, (a, b, c, d))
        left, right = (one.t() if kind == NUMBERS.transpose else one for one, kind in ((left, of_a), (right, of_b)))
        assert plan in self.needs and workspace and count == 1 and sums == NUMBERS.compute_int32
        rows = out.shape[0] if self.set[description].get(NUMBERS.alpha_vector_scaling) else 1
        factors = torch.tensor([c_float.from_address(alpha + 4 * row).value for row in range(rows)]).view(-1, 1)
        times = c_float.from_address(beta).value
        out.copy_((left.int() @ right.int()).float() * factors + (times * addend.float() if times else 0))
        self.streams.append(c_void_p.from_address(streams).value)


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(cusparselt_plans, "library", lambda: made)
    monkeypatch.setattr(cusparselt_plans, "handle", lambda device: 1)
    monkeypatch.setattr(cusparselt_plans, "numbers", lambda: NUMBERS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


@pytest.mark.parametrize("vector", [True, False])
def test_a_plan_multiplies_and_a_call_takes_the_current_stream(recorder, monkeypatch, vector):
    monkeypatch.setattr(cusparselt_plans, "current_stream", lambda device: 77)
    plan = LibraryPlan(WANTED._replace(vector_alpha=vector))
    q, weight = (torch.randint(-128, 128, (rows, 96), dtype=torch.int8) for rows in (16, 64))
    alpha, y = torch.rand(64) + 0.5 if vector else None, torch.full((16, 64), torch.nan, dtype=torch.bfloat16)
    plan.run(q, weight, alpha, y)
    sums = (q.int() @ weight.int().t()).float()
    assert torch.equal(y, (sums * alpha if vector else sums).bfloat16())
    assert recorder.streams == [77] and (plan.workspace, plan.compressed_bytes) == (128, 3840)
    del plan
    gc.collect()
    assert not recorder.needs


def test_a_plan_has_the_algorithm_asked_for(recorder):
    for text in ("alg=3,split_k=2", "alg=7,split_k=-1,mode=2"):
        plan, algorithm = LibraryPlan(WANTED._replace(algorithm=text)), Algorithm.parse(text)
        wanted = {NUMBERS.config_id: algorithm.config_id, NUMBERS.split_k: algorithm.split_k, NUMBERS.split_k_mode: algorithm.split_k_mode}
        chosen = [found for number, found in recorder.set.items() if number in recorder.needs and NUMBERS.alpha_vector_scaling not in found]
        assert {name: value for name, value in wanted.items() if value} in chosen
        del plan
        gc.collect()


@pytest.mark.parametrize("failing", ["dense_descriptor_init", "matmul_descriptor_init", "matmul_alg_selection_init", "matmul_plan_init"])
def test_a_refused_plan_leaves_nothing_behind_and_says_what_was_asked(recorder, failing):
    recorder.failing = failing
    with pytest.raises(UnsupportedError, match=r"n=64, k=96, m=16.*alg=3.*NOT_SUPPORTED"):
        LibraryPlan(WANTED)
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
    assert {(one.split_k, one.split_k_mode) for one in cusparselt_search.splits(whole, (8, 9))} == {(2, 1), (2, 2), (4, 1), (4, 2)}
    assert list(cusparselt_search.splits(whole, (9, 0))) == [Algorithm(4, -1)]
    assert all(one.split_k == 0 for one in cusparselt_search.splits(whole, (10, 0)))
    assert not [*cusparselt_search.splits(Algorithm(4, -1), (9, 0)), *cusparselt_search.splits(Algorithm(), (9, 0))]


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


class Imitation:
    """A plan that multiplies by torch: algorithm 0 forgets the last step of K, 1 a column, 3 does not exist; higher ones are faster."""

    clock = 0.0

    def __init__(self, wanted: Multiplication) -> None:
        self.wanted, self.picked = wanted, Algorithm.parse(wanted.algorithm)
        if self.picked.config_id == 3:
            raise UnsupportedError("there is no algorithm 3")

    def get(self, attribute: int) -> int:
        return 5

    def set(self, attribute: int, value: int) -> None:
        pass

    @property
    def algorithm(self) -> Algorithm:
        return self.picked

    def run(self, q, weights, alpha, y, *, search_bytes=None) -> None:
        if search_bytes is not None:
            self.picked = Algorithm(4, 1)
            return
        number = self.picked.config_id
        product = q.double() @ weights.double().t()
        if number == 0:
            product -= q[:, -32:].double() @ weights[:, -32:].double().t()
        product = product if alpha is None else product * alpha
        if number == 1:
            y[:, :-1] = product[:, :-1]
        else:
            y.copy_(product)
        Imitation.clock += 10 - (number or 0) + (5 if self.picked.split_k else 0)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = Imitation.clock

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.mark.parametrize(
    ("dtype", "out"),
    [(torch.int8, torch.int32), (torch.int8, torch.bfloat16), (torch.float8_e4m3fn, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_a_search_returns_the_fastest_that_are_right_and_names_the_others(dtype, out, monkeypatch, caplog, rng):
    properties = type("", (), {"multi_processor_count": 132})
    for module, name, value in (
        (cusparselt_search, "LibraryPlan", Imitation),
        (cusparselt_search, "capability", lambda device: (9, 0)),
        (cusparselt_plans, "library", lambda: Recorder),
        (cusparselt_search, "numbers", lambda: NUMBERS),
        (torch.cuda, "Event", Event),
        (torch.cuda, "synchronize", lambda: None),
        (torch.cuda, "get_device_properties", lambda device: properties),
    ):
        monkeypatch.setattr(module, name, value)
    shapes = ((48, 6400), (64, 6400))
    if dtype == torch.int8:
        q, weights = (torch.randint(-127, 128, shape, generator=rng).to(dtype) for shape in shapes)
    else:
        q, weights = (torch.randn(shape, generator=rng).to(dtype) for shape in shapes)
    alpha = torch.rand(64, generator=rng) if out == torch.bfloat16 and dtype == torch.int8 else None
    with caplog.at_level(logging.WARNING):
        found = cusparselt_search.search(q, weights, alpha, 64, out)
    assert found == [Algorithm(5), Algorithm(4), Algorithm(2), Algorithm(5, -1)]
    assert [record.args[0] for record in caplog.records] == [Algorithm(0), Algorithm(1)]
    assert cusparselt_search.search(q[:0], weights, alpha, 64, out) == []
