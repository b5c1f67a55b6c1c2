"""cuSPARSELt's C interface, as nvmath-python binds it: one handle per device, and plans kept in a bounded cache.

A plan is three matrix descriptors, a multiplication descriptor, an algorithm selection and the plan itself, all of host memory; making
one takes far longer than a call. The weights are the sparse first operand ``[N, K']``, so the library sees everything transposed:
``y [M, N]`` is its column-ordered ``[N, M]`` result.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import addressof, c_float, c_int32, c_void_p, sizeof
from dataclasses import dataclass
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from ..compat.nvmath import numbers
from ..errors import UnsupportedError
from .launch import allocate, allocator, current_stream

_ALIGNMENT = 16

# Host scalars that the library reads during every call.
_ONE, _ZERO = c_float(1.0), c_float(0.0)
_ONE_AT, _ZERO_AT = addressof(_ONE), addressof(_ZERO)


@dataclass(frozen=True)
class Algorithm:
    """A configuration of the library: its number and how K is split; 0 leaves a setting as the library has it, None chooses all.

    ``split_k`` is −1 (segments of K) or 1 on compute capability 9.0 and more, a number of slices before; ``split_k_mode`` is a
    ``cusparseLtSplitKMode_t``. The text form, ``alg=3,split_k=2,mode=1,buffers=1``, leaves out zeros and is empty for the library's
    own choice.
    """

    config_id: int | None = None
    split_k: int = 0
    split_k_mode: int = 0
    split_k_buffers: int = 0

    def __str__(self) -> str:
        if self.config_id is None:
            return ""
        settings = {"split_k": self.split_k, "mode": self.split_k_mode, "buffers": self.split_k_buffers}
        return ",".join([f"alg={self.config_id}", *(f"{name}={value}" for name, value in settings.items() if value)])

    @classmethod
    def parse(cls, text: str) -> Algorithm:
        """Read the text form.

        Raises:
            ValueError: it names no algorithm, an unknown setting, one twice, or no whole number.
        """
        if not text:
            return cls()
        settings: dict[str, int] = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            if not equals or name not in ("alg", "split_k", "mode", "buffers") or name in settings:
                raise ValueError(f"{text!r} is not an algorithm such as 'alg=3,split_k=2,mode=1,buffers=1'")
            try:
                settings[name] = int(value)
            except ValueError:
                raise ValueError(f"{text!r}: {name} is not a whole number") from None
        if settings.get("alg", -1) < 0:
            raise ValueError(f"{text!r} names no algorithm: it begins with alg=0 or a larger number")
        return cls(settings["alg"], settings.get("split_k", 0), settings.get("mode", 0), settings.get("buffers", 0))


class Multiplication(NamedTuple):
    """What a plan is made for: ``q [M, K'] dtype`` times sparse ``[N, K']`` → ``[M, N] out_dtype`` on a device's number."""

    device: int
    n: int
    k: int
    m: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    vector_alpha: bool
    algorithm: str


@cache
def library() -> ModuleType:
    """nvmath's bindings. torch has loaded libcusparseLt by then, and nvmath takes what is loaded: there is one copy of it.

    Raises:
        UnsupportedError: nvmath-python or the library is missing.
    """
    try:
        bindings = importlib.import_module("nvmath.bindings.cusparseLt")
        bindings.get_property(0)
    except ImportError as error:
        raise UnsupportedError(f"nvmath-python is not usable ({error}): pip install 'slidesparse[cuda]'") from error
    except RuntimeError as error:  # nvmath's own errors for a missing library, driver or function
        raise UnsupportedError(f"libcusparseLt cannot be loaded: {error}") from error
    return bindings


@cache
def handle(device: int) -> int:
    """The library's handle of a device, which must be the current one.

    Raises:
        UnsupportedError: the library refuses the device, or cannot be loaded.
    """
    bindings = library()
    try:
        return bindings.init()
    except (bindings.cuSPARSELtError, RuntimeError) as error:
        raise UnsupportedError(f"cuSPARSELt cannot be initialised: {error}") from error


class Sparse:
    """Descriptor of a 2:4 matrix ``[N, K']`` in row order, and the sizes of its compressed form and of the scratch that making it takes."""

    def __init__(self, device: int, n: int, k: int, dtype: torch.dtype) -> None:
        bindings, numbered, self.handle = library(), numbers(), handle(device)
        with refusals(f"a 2:4 matrix [{n}, {k}] of {dtype}"):
            arguments = (n, k, k, _ALIGNMENT, numbered.types[dtype], numbered.row_order, numbered.half_the_weights)
            self.descriptor = bindings.structured_descriptor_init(self.handle, *arguments)
            finalize(self, bindings.mat_descriptor_destroy, self.descriptor).atexit = False
            self.compressed_bytes, self.scratch_bytes = bindings.sp_mma_compressed_size2(self.handle, self.descriptor)

    def compress(self, slid: Tensor, compressed: Tensor) -> None:
        """Compress ``slid [N, K']`` on the current stream."""
        scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=slid.device)
        stream = torch.cuda.current_stream(slid.device).cuda_stream
        pointers = (slid.data_ptr(), compressed.data_ptr(), scratch.data_ptr(), stream)
        with refusals(f"compressing {list(slid.shape)} of {slid.dtype}"):
            library().sp_mma_compress2(self.handle, self.descriptor, 1, numbers().non_transpose, *pointers)


class LibraryPlan:
    """A multiplication made ready: what the library needs for it is destroyed, plan first, when nobody holds this any more.

    ``compressed_bytes`` is the size of the weights that it takes, ``workspace`` the bytes of scratch for one call.

    Raises:
        UnsupportedError: the library refuses the multiplication or the algorithm.
    """

    __slots__ = ("__weakref__", "_bindings", "_multiply", "_plan", "_selection", "_wanted", "compressed_bytes", "handle", "workspace")

    def __init__(self, wanted: Multiplication) -> None:
        self._wanted, self._bindings, self.handle = wanted, library(), handle(wanted.device)
        bindings, numbered = self._bindings, numbers()
        self._multiply = bindings.matmul
        with refusals(str(wanted)), ExitStack() as made:
            # The stack undoes in the opposite order, which is the one the library wants.
            description, self.compressed_bytes = _describe(made, self.handle, wanted)
            self._selection = bindings.matmul_alg_selection_init(self.handle, description, numbered.default_algorithm)
            made.callback(bindings.matmul_alg_selection_destroy, self._selection)
            algorithm = Algorithm.parse(wanted.algorithm)
            if algorithm.config_id is not None:
                self.set(numbered.config_id, algorithm.config_id)
            for attribute, value in (
                (numbered.split_k, algorithm.split_k),
                (numbered.split_k_mode, algorithm.split_k_mode),
                (numbered.split_k_buffers, algorithm.split_k_buffers),
            ):
                if value:
                    self.set(attribute, value)
            self._plan = bindings.matmul_plan_init(self.handle, description, self._selection)
            made.callback(bindings.matmul_plan_destroy, self._plan)
            self.workspace = bindings.matmul_get_workspace(self.handle, self._plan)
            # Not when the interpreter ends: the driver may be gone by then.
            finalize(self, made.pop_all().close).atexit = False

    def set(self, attribute: int, value: int) -> None:
        """Set a whole number of the algorithm selection."""
        number = c_int32(value)
        self._bindings.matmul_alg_set_attribute(self.handle, self._selection, attribute, addressof(number), sizeof(number))

    def get(self, attribute: int) -> int:
        """Read a whole number of the algorithm selection."""
        number = c_int32(0)
        self._bindings.matmul_alg_get_attribute(self.handle, self._selection, attribute, addressof(number), sizeof(number))
        return number.value

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm selected now."""
        numbered = numbers()
        settings = (numbered.config_id, numbered.split_k, numbered.split_k_mode, numbered.split_k_buffers)
        return Algorithm(*(self.get(attribute) for attribute in settings))

    def run(self, q: Tensor, compressed: Tensor, alpha: Tensor | None, y: Tensor, *, search_bytes: int | None = None) -> None:
        """Multiply into ``y [M, N]`` on the current stream. What it is given must be what the plan was made for.

        With ``search_bytes`` of scratch the library times its algorithms and selects the fastest; it waits for the device.
        """
        function, workspace = self._multiply, self.workspace
        if search_bytes is not None:
            function, workspace = self._bindings.matmul_search, max(search_bytes, workspace)
        # From the caching allocator: safe to free in stream order, private to a graph under capture.
        scratch = allocate(y, 1, workspace, torch.uint8) if workspace else None
        stream, out = c_void_p(current_stream(self._wanted.device)), y.data_ptr()
        try:
            function(
                self.handle, self._plan, _ONE_AT if alpha is None else alpha.data_ptr(), compressed.data_ptr(), q.data_ptr(), _ZERO_AT,
                out, out, 0 if scratch is None else scratch.data_ptr(), addressof(stream), 1,
            )  # fmt: skip
        except self._bindings.cuSPARSELtError as error:
            raise UnsupportedError(f"cuSPARSELt fails at {self._wanted}: {error}") from error


def bound_product(plan: LibraryPlan, device: torch.device, rows: int, n: int, dtype: torch.dtype, scaled: bool) -> Callable[..., Tensor]:
    """The product of a plan, ``[rows, n]`` into fresh memory, to be called with q, token scales, the slid copy, weight scales and bias."""
    empty = allocator(device)

    def product(q: Tensor, x_scale: Tensor | None, copy: tuple[Tensor, Tensor | None], scale: Tensor | None, bias: Tensor | None) -> Tensor:
        y = empty((rows, n), (n, 1), dtype)
        plan.run(q, copy[0], copy[1] if scaled else None, y)
        return y

    return product


class Plans:
    """The least recently used plans go first when there are more than ``bound``; who holds one keeps it."""

    def __init__(self, bound: int = 4096) -> None:
        self.bound = bound
        self._plans: OrderedDict[tuple[Any, ...], LibraryPlan] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def known(self, wanted: tuple[Any, ...]) -> LibraryPlan | None:
        """The plan for the fields of a `Multiplication`, if there is one."""
        with self._lock:
            plan = self._plans.get(wanted)
            if plan is not None:
                self._plans.move_to_end(wanted)
            return plan

    def make(self, wanted: tuple[Any, ...]) -> LibraryPlan:
        """The plan for the fields of a `Multiplication`, made for the current device if it is not known.

        Raises:
            UnsupportedError: the library refuses it, or it would have to be made while a CUDA graph is captured.
        """
        with self._lock:
            plan = self._plans.get(wanted)
            if plan is not None:  # another thread was faster
                return plan
            multiplication = Multiplication(*wanted)
            # The library's documents do not promise that making a plan leaves streams alone.
            if torch.cuda.is_current_stream_capturing():
                raise UnsupportedError(f"no plan yet for {multiplication}: run it once before capturing a CUDA graph")
            plan = self._plans[wanted] = LibraryPlan(multiplication)
            while len(self._plans) > self.bound:
                self._plans.popitem(last=False)
            return plan

    def clear(self) -> None:
        """Forget all plans."""
        with self._lock:
            self._plans.clear()


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn the library's errors into `UnsupportedError`, naming what was asked."""
    try:
        yield
    except library().cuSPARSELtError as error:
        raise UnsupportedError(f"cuSPARSELt refuses {what}: {error}") from error


def _describe(made: ExitStack, handle: int, wanted: Multiplication) -> tuple[int, int]:
    """The multiplication's descriptor, and the bytes of its compressed weights."""
    bindings, numbered = library(), numbers()

    def matrix(init: Callable[..., int], *arguments: int) -> int:
        descriptor = init(handle, *arguments)
        made.callback(bindings.mat_descriptor_destroy, descriptor)
        return descriptor

    _, n, k, m, dtype, out_dtype, vector_alpha, _ = wanted
    kind, out_kind, row_order = numbered.types[dtype], numbered.types[out_dtype], numbered.row_order
    weights = matrix(bindings.structured_descriptor_init, n, k, k, _ALIGNMENT, kind, row_order, numbered.half_the_weights)
    tokens = matrix(bindings.dense_descriptor_init, m, k, k, _ALIGNMENT, kind, row_order)
    out = matrix(bindings.dense_descriptor_init, n, m, n, _ALIGNMENT, out_kind, numbered.column_order)
    compute = numbered.compute_int32 if dtype == torch.int8 else numbered.compute_float32
    operands = (numbered.non_transpose, numbered.transpose, weights, tokens, out, out, compute)
    description = bindings.matmul_descriptor_init(handle, *operands)
    made.callback(bindings.matmul_descriptor_destroy, description)
    if vector_alpha:
        yes = c_int32(1)
        bindings.matmul_desc_set_attribute(handle, description, numbered.alpha_vector_scaling, addressof(yes), sizeof(yes))
    return description, bindings.sp_mma_compressed_size2(handle, weights)[0]
