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
        if first.get_device() == current_device():  # switching costs host time in every call
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


current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""The current CUDA device's index, once CUDA is initialised: what ``torch.cuda.current_device`` gives, in a tenth of its host time."""

current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", torch.cuda.current_stream)
"""The current stream of a CUDA device as a number: what ``torch.cuda.current_stream`` gives, in a tenth of its host time."""


def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """A function of size, strides and type that gives uninitialised memory on the current device of this kind.

    What the compiler's own code calls, where torch has it: half the host time of ``torch.empty``.
    """
    compilers = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if device.type == "cuda" and compilers is not None:
        return compilers
    return lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype, device=device)


_on_cuda = allocator(torch.device("cuda"))


def allocate(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised ``[rows, columns]`` on the device of ``like``, which must be the current one."""
    return _on_cuda((rows, columns), (columns, 1), dtype) if like.is_cuda else like.new_empty((rows, columns), dtype=dtype)


def runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can read and write ``dtype`` on this device: e4m3 needs compute capability 8.9."""
    return has_triton() and (dtype != torch.float8_e4m3fn or capability(device) >= (8, 9))
