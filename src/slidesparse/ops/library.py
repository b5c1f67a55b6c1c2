"""The ``slidesparse`` namespace of ``torch.library`` ops, and the one way to put an op into it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("slidesparse", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)


def define(schema: str, *, cuda: Callable, fake: Callable, oracle: Callable | None = None) -> Callable:
    """Add an op, and return it as a function: ``cuda`` runs on CUDA tensors, ``oracle`` (if any) on all others, ``fake`` gives shapes.

    Kernels run on the device of the op's first tensor, whichever device is current.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    if oracle is not None:
        _LIBRARY.impl(name, oracle, "CompositeExplicitAutograd")

    def on_its_device(first: Tensor, *arguments: object) -> object:
        if first.device.index == torch.cuda.current_device():  # switching costs host time in every call
            return cuda(first, *arguments)
        with torch.cuda.device(first.device):
            return cuda(first, *arguments)

    _LIBRARY.impl(name, on_its_device, "CUDA")
    torch.library.register_fake(f"slidesparse::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.slidesparse, name).default

    def call(first: Tensor, *arguments: object) -> object:
        # The dispatcher costs 4 µs of host time in every call, for nothing where nobody looks.
        if unwatched(first):
            return on_its_device(first, *arguments)
        return op(first, *arguments)

    return call


def unwatched(x: Tensor) -> bool:
    """Whether kernels may be launched on a tensor without telling the dispatcher: it is one on CUDA, and nobody traces or looks."""
    return x.is_cuda and type(x) in _PLAIN and not torch.compiler.is_compiling() and not _watched()


def _watched() -> bool:
    """Whether a mode, a function transform or a profiler must see ops."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd._profiler_enabled()


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled here."""
    return importlib.util.find_spec("triton") is not None


def capability(device: torch.device | None = None) -> tuple[int, int]:
    """Compute capability of a CUDA device, by default the current one; (0, 0) where there is none."""
    if not torch.cuda.is_available():
        return 0, 0
    index = None if device is None else device.index
    return _capability(torch.cuda.current_device() if index is None else index)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def current_stream(device: int) -> int:
    """The current stream of a CUDA device as a number: what ``torch.cuda.current_stream`` gives, in a tenth of its host time."""
    return torch._C._cuda_getCurrentRawStream(device)


# What the compiler's own code calls; half the host time of torch.empty.
_empty_strided = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def allocate(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised ``[rows, columns]`` on the device of ``like``, which must be the current one."""
    if like.is_cuda and _empty_strided is not None:
        return _empty_strided((rows, columns), (columns, 1), dtype)
    return like.new_empty((rows, columns), dtype=dtype)


def runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can read and write ``dtype`` on this device: e4m3 needs compute capability 8.9."""
    return has_triton() and (dtype != torch.float8_e4m3fn or capability(device) >= (8, 9))
