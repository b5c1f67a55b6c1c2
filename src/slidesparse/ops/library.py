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
        with torch.cuda.device(first.device):
            return cuda(first, *arguments)

    _LIBRARY.impl(name, on_its_device, "CUDA")
    torch.library.register_fake(f"slidesparse::{name}", fake, lib=_LIBRARY)


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled here."""
    return importlib.util.find_spec("triton") is not None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can read and write ``dtype`` on this device: e4m3 needs compute capability 8.9."""
    return has_triton() and (dtype != torch.float8_e4m3fn or capability(device) >= (8, 9))
