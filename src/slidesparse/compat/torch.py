"""Private names of torch: what they save is host time in every call, or a pass over a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedError
from .versions import lacks


def found(name: str) -> Any:
    """What torch has under this dotted name; None where this one has nothing of the name."""
    home: object = torch
    for part in name.split("."):
        home = getattr(home, part, None)
    return home


def from_module(module: str, name: str) -> Any:
    """What a module of torch calls so; None where there is no such module or name."""
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


tracing_state: Callable[[], object | None] = found("_C._get_tracing_state") or (lambda: torch.jit.is_tracing() or None)
"""What ``torch.jit.trace`` has recorded; None where it records nothing: what ``torch.jit.is_tracing`` asks, in half its host time."""

current_device: Callable[[], int] = found("_C._cuda_getDevice") or torch.cuda.current_device
"""The current CUDA device's index, once CUDA is initialised: what ``torch.cuda.current_device`` gives, in a tenth of its host time."""

current_stream: Callable[[int], int] = found("_C._cuda_getCurrentRawStream") or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)
"""The current stream of a CUDA device as a number: what ``torch.cuda.current_stream`` gives, in a tenth of its host time."""

empty_on_cuda: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] | None = found("_C._dynamo.guards._empty_strided_cuda")
"""What torch's compiled code calls for uninitialised memory of size, strides and type on the current CUDA device; None without it."""


def _watching() -> Callable[[], bool]:
    """What tells whether a mode, a function transform or a tracer must see ops; without the names that tell it, one may always be there."""
    modes, functions = found("_C._len_torch_dispatch_stack"), found("_C._len_torch_function_stack")
    transform, tracing = found("_C._functorch.peek_interpreter_stack"), found("_C._get_tracing_state")
    stack = from_module("torch.overrides", "_get_current_function_mode_stack")
    default_device = from_module("torch.utils._device", "DeviceContext")
    if None in (modes, functions, transform, tracing, stack, default_device):
        return lambda: True

    def watched() -> bool:
        if modes() or transform() is not None or tracing() is not None:
            return True
        return bool(functions()) and any(type(mode) is not default_device for mode in stack())

    return watched


watched = _watching()
"""Whether a mode, a function transform or a tracer must see ops.

A default device asks nothing of tensors that are there, and profilers see kernels, which are to be those that run without them.
"""


def _public_scaled_mm(
    q: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    kind = F.ScalingType.RowWise if x_scale.dim() else F.ScalingType.TensorWise
    return F.scaled_mm(q, weight, x_scale, kind, w_scale, kind, bias=bias, output_dtype=out_dtype, use_fast_accum=use_fast_accum)


scaled_mm: Callable[..., Tensor] = found("_scaled_mm") or _public_scaled_mm
"""``q [M, K]`` times ``weight [K, N]``, both e4m3, scaled by rows ``[M, 1]`` and columns ``[1, N]`` or by one number each, plus a bias.

The public ``torch.nn.functional.scaled_mm`` is Python above another op, 1.7 µs of host time in every call; it runs where torch has
dropped the private function.
"""


def _no_int_mm(a: Tensor, b: Tensor) -> Tensor:
    raise NotImplementedError(lacks("torch", "_int_mm"))


int_mm: Callable[[Tensor, Tensor], Tensor] = found("_int_mm") or _no_int_mm
"""Exact sums of int8 ``[M, K]`` times ``[K, N]`` in int32."""
HAS_INT_MM = int_mm is not _no_int_mm
"""Whether torch has it."""


cslt_compress: Callable[[Tensor], Tensor] | None = found("_cslt_compress")
"""2:4 weights ``[N, K]`` as cuSPARSELt wants them, by torch's own road, a rival in benchmarks; None where torch has it not."""
cslt_sparse_mm: Callable[..., Tensor] | None = found("_cslt_sparse_mm")
"""Such weights times ``[K, M]``; with ``transpose_result`` the outcome is ``[M, N]``. None where torch has it not."""


def without_subclasses() -> Any:
    """A context in which tensor subclasses' own ``__torch_function__`` is not asked.

    Raises:
        UnsupportedError: this torch has none.
    """
    context = found("_C.DisableTorchFunctionSubclass")
    if context is None:
        raise UnsupportedError(lacks("torch", "_C.DisableTorchFunctionSubclass"))
    return context()


class GraphPatterns(NamedTuple):
    """What a pass over a compiled graph is made of, each under torch's name."""

    PatternMatcherPass: Any
    fwd_only: Any
    register_replacement: Any
    statically_known_true: Callable[[Any], bool]


@cache
def graph_patterns() -> GraphPatterns:
    """torch's matcher of graphs; it is imported here, since its import takes seconds.

    Raises:
        UnsupportedError: a name is missing; says which.
    """
    parts = {}
    for name in GraphPatterns._fields:
        module = "torch.fx.experimental.symbolic_shapes" if name == "statically_known_true" else "torch._inductor.pattern_matcher"
        parts[name] = from_module(module, name)
        if parts[name] is None:
            raise UnsupportedError(lacks("torch", f"{module}.{name}"))
    return GraphPatterns(**parts)
