"""The ``slidesparse`` namespace of ``torch.library`` ops, and the one way to put an op into it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from subprocess import SubprocessError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat.versions import installed, numbers
from ..errors import UnsupportedError
from .launch import can_bypass_dispatcher, current_device

_LOG = logging.getLogger(__name__)
_LIBRARY = torch.library.Library("slidesparse", "FRAGMENT")


def define(
    schema: str,
    *,
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    oracle: Callable[..., Any] | None = None,
    differentiable: bool = False,
) -> Callable[..., Any]:
    """Add an op, and return it as a function: ``cuda`` runs on CUDA tensors, ``oracle`` (if any) on all others, ``fake`` gives shapes.

    Kernels run on the device of the op's first tensor, whichever device is current. The function refuses to be recorded by autograd unless
    the op is ``differentiable``: quantised values have no gradient, and autograd does not know what kernels do.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    if oracle is not None:
        _LIBRARY.impl(name, oracle, "CompositeExplicitAutograd")

    def on_its_device(first: Tensor, *arguments: Any) -> Any:
        if first.get_device() == current_device():  # switching costs host time in every call
            return cuda(first, *arguments)
        with torch.cuda.device(first.device):
            return cuda(first, *arguments)

    _LIBRARY.impl(name, on_its_device, "CUDA")
    torch.library.register_fake(f"slidesparse::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.slidesparse, name).default

    def call(first: Tensor, *arguments: Any) -> Any:
        if first.requires_grad and not differentiable and torch.is_grad_enabled():
            raise UnsupportedError(f"slidesparse::{name} passes no gradient: call it under torch.no_grad(), or a whole layer, which does")
        # The dispatcher costs 4 µs of host time in every call, for nothing where nobody looks.
        if can_bypass_dispatcher(first):
            return on_its_device(first, *arguments)
        return op(first, *arguments)

    return call


def has_triton() -> bool:
    """Whether kernels can be compiled here."""
    return triton_fault() is None


def triton_fault() -> str | None:
    """Why Triton compiles no kernels here, None if it does: on a GPU the least of them was run, elsewhere Triton need only be there.

    It needs a C compiler and NVIDIA's assembler besides, which are found missing only when it compiles.

    Raises:
        torch.OutOfMemoryError: no memory is left on the GPU to try it.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return None
    return _tried()


@cache
def _tried() -> str | None:
    try:
        from .kernels_probe import TritonError, probe_kernel
    except (ImportError, OSError, RuntimeError) as error:
        return _told(error)
    try:
        out = torch.zeros(1, dtype=torch.int32, device="cuda")
        probe_kernel[(1,)](out)
        return None if out.item() == 1 else _told(RuntimeError("a kernel wrote nothing"))
    except torch.OutOfMemoryError:
        raise  # tells nothing of Triton
    except (OSError, RuntimeError, AssertionError, SubprocessError, TritonError) as error:  # it asserts that there is a driver, too
        return _told(error)


def _told(error: Exception) -> str:
    fault = f"triton cannot compile here: {' '.join(str(error).split()) or type(error).__name__}"
    _LOG.warning("%s; kernels of torch run instead", fault)
    return fault


class Card(NamedTuple):
    """Stands for a CUDA device that is not there, where launches are only listed."""

    capability: tuple[int, int]
    type: str = "cuda"


def capability(device: torch.device | Card | None = None) -> tuple[int, int]:
    """Compute capability of a device, by default the current CUDA one; (0, 0) of others and where there is none."""
    if isinstance(device, Card):
        return device.capability
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return 0, 0
    index = None if device is None else device.index
    return _capability(torch.cuda.current_device() if index is None else index)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can read and write ``dtype`` on this device."""
    return has_triton() and (dtype != torch.float8_e4m3fn or writes_e4m3(capability(device)))


@cache
def writes_e4m3(capability: tuple[int, int]) -> bool:
    """Whether Triton's kernels round to e4m3 once: from compute capability 9.0 on, and on 8.9 by Triton 3.9 and newer.

    Older ones round float32 to float16 first, towards zero.
    """
    return capability >= (9, 0) or (capability == (8, 9) and numbers(installed("triton")) >= (3, 9))


@cache
def fuses(capability: tuple[int, int]) -> bool:
    """Whether Triton's kernels round a product and what is added to it once, not each: on 10.0 and newer by Triton 3.6.

    Its assembler makes one instruction of a product and a sum of two float32 each, although told not to.
    """
    return capability >= (10, 0) and numbers(installed("triton")) < (3, 7)


@cache
def one(device: torch.device) -> Tensor:
    """The float32 number one, ``[]``, on a device.

    It must not be asked for first while a CUDA graph is captured, whose memory it would live in.
    """
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.float32, device=device)
