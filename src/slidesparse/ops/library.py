"""The ``slidesparse`` namespace of ``torch.library`` ops, and the one way to put an op into it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("slidesparse", "FRAGMENT")


def define(schema: str, *, cuda: Callable, fake: Callable, oracle: Callable | None = None) -> None:
    """Add an op: ``cuda`` runs on CUDA tensors, ``oracle`` (if any) on all others, ``fake`` gives shapes and types only.

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


def runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can read and write ``dtype`` on this device: e4m3 needs compute capability 8.9."""
    return has_triton() and (dtype != torch.float8_e4m3fn or capability(device) >= (8, 9))
