"""Launching Triton kernels with little host time.

``kernel[grid](...)`` binds and specialises every argument anew, 45 µs a call on a server's CPU. A `Launch` holds all of a launch but its
tensors: from the second call on, it calls the compiled kernel with their addresses. Launches that differ in nothing that Triton compiles
for share a compiled kernel, so that a new number of tokens costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat.torch import current_device, current_stream, empty_on_cuda, tracing_state, watched

__all__ = [
    "CALLS", "Launch", "Producer", "allocate", "allocator", "can_bypass_dispatcher", "current_device", "current_stream", "tracing_state",
]  # fmt: skip

_PLAIN = (Tensor, torch.nn.Parameter)

CALLS = 1 << 14
"""How many launches of a kernel are kept: one for every number of tokens and kind of layer that ran lately."""


def can_bypass_dispatcher(x: Tensor) -> bool:
    """Whether kernels may be launched on a tensor past the dispatcher: it is on CUDA, and no compiler, mode or tracer looks."""
    return x.is_cuda and type(x) in _PLAIN and not torch.compiler.is_compiling() and not watched()


def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """A function of size, strides and type that gives uninitialised memory on the current device of this kind.

    On CUDA it is the function that torch's compiled code calls, where torch has it: half the host time of ``torch.empty``.
    """
    if device.type == "cuda" and empty_on_cuda is not None:
        return empty_on_cuda
    return lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype, device=device)


_on_cuda = allocator(torch.device("cuda"))


def allocate(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised ``[rows, columns]`` on the device of ``like``, which must be the current one."""
    return _on_cuda((rows, columns), (columns, 1), dtype) if like.is_cuda else like.new_empty((rows, columns), dtype=dtype)


class Launch:
    """``kernel[grid](*tensors, *numbers, **constants)``, to be called with the tensors; their types, and which are None, never change.

    Functions that make a `Launch` are cached by everything else that decides it. ``numbers`` follow the tensors among the kernel's
    parameters; ``constants`` are its compile-time parameters and launch options. Kernels run on the current stream of the current device,
    which must be the tensors'.
    """

    __slots__ = ("_compiled", "_constants", "_grid", "_held", "_kernel", "_numbers")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple, constants: Mapping[str, Any]) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, (*grid, 1, 1)[:3], numbers, constants
        self._compiled: dict[int, tuple[Callable, tuple, tuple]] = {}
        self._held: list[Any] = []

    @property
    def asked(self) -> tuple[Any, tuple, Mapping[str, Any]]:
        """The kernel, its numbers, and its constants with the options of the launch."""
        return self._kernel, self._numbers, self._constants

    def __call__(self, *tensors: Any) -> None:
        """Launch on tensors, descriptors of tensors, or None."""
        addresses, key, device = [], 0, -1
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                address, device = tensor.data_ptr(), tensor.get_device()
                addresses.append(address)
                # Triton compiles anew for addresses that are not multiples of 16, and refuses tensors of the host.
                key = (key << 16) | ((device + 2) << 1) | (address & 15 != 0)
            else:
                addresses.append(tensor)
        found = self._compiled.get(key)
        if found is None:
            self._compile(key, tensors)
            return
        run, before, after = found
        run(*self._grid, current_stream(device), *before, *addresses, *after)

    def _compile(self, key: int, tensors: tuple) -> None:
        """Launch for the first time and keep what later launches need; Triton compiles unless a compiled kernel of this kind is there."""
        kind = self._kind(key, tensors)
        known = _COMPILED.get(kind)
        compiled = known or self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if compiled is None:  # the interpreter compiles nothing
            return
        from ..compat.triton import direct

        launch = direct(self._kernel, compiled)
        if launch is None:  # Triton binds and launches in every call
            return
        self._compiled[key] = launch.run, launch.before, self._after(launch.parameters[len(tensors) :])
        if known is not None:
            self(*tensors)
        elif kind is None:
            self._held.append(compiled)
        else:
            _COMPILED[kind] = compiled

    def _after(self, parameters: Sequence[str]) -> tuple:
        """The arguments behind the tensors, for the parameters there."""
        return (*self._numbers, *(self._constants[name] for name in parameters[len(self._numbers) :]))

    def _kind(self, key: int, tensors: tuple) -> tuple | None:
        """Everything that Triton compiles for; None where this is not known, as with descriptors."""
        types = [tensor.dtype if isinstance(tensor, Tensor) else tensor for tensor in tensors]
        if not all(kind is None or isinstance(kind, torch.dtype) for kind in types):
            return None
        # It folds ones, and asks of whole numbers whether 16 divides them and 32 bits hold them.
        numbers = [(n == 1, n % 16 == 0, n.bit_length() > 31) if type(n) is int else type(n) for n in self._numbers]
        return (self._kernel, key, *types, *numbers, *sorted(self._constants.items()))


class Producer:
    """A launch with its outputs: ``function(*first, *outputs, *rest)`` into fresh memory, which is returned.

    ``outputs`` are size, strides and type of each; ``at`` is how many arguments come in front of them, all by default.
    """

    __slots__ = ("_at", "_empty", "_function", "_outputs")

    def __init__(self, function: Callable, device: torch.device, outputs: tuple[tuple, ...], at: int | None = None) -> None:
        self._function, self._empty, self._outputs, self._at = function, allocator(device), outputs, at

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...] | Tensor:
        """The outputs, or the only one."""
        empty, at = self._empty, self._at
        outputs = tuple([empty(*output) for output in self._outputs])
        if at is None:
            self._function(*inputs, *outputs)
        else:
            self._function(*inputs[:at], *outputs, *inputs[at:])
        return outputs if len(outputs) > 1 else outputs[0]


_COMPILED: dict[tuple | None, Any] = {}
"""Triton's compiled kernels by `Launch._kind`, kept alive: later versions of Triton unload kernels without a reference."""
