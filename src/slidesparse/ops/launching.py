"""Launching Triton kernels with little host time.

``kernel[grid](...)`` binds and specialises every argument anew, 45 µs a call on a server's CPU. A `Call` is a launch worked out once, all
but its tensors: the second time, the compiled kernel is called with their addresses. Calls that differ in nothing that Triton compiles
for share what it compiled, so that a number of tokens that was not met before costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .library import current_stream

CALLS = 1 << 14
"""How many calls of a kernel are kept: one for every number of tokens and kind of layer that was met lately."""


class Call:
    """``kernel[grid](*tensors, *numbers, **constants)``, to be called with the tensors, whose types and absences never change.

    Functions that make one are cached by whatever decides the rest. ``numbers`` follow the tensors among the kernel's parameters;
    ``constants`` are its compile-time parameters and launch options. Kernels run on the current stream of the current device, which must
    be the tensors'.
    """

    __slots__ = ("_compiled", "_constants", "_grid", "_held", "_kernel", "_numbers")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple, constants: Mapping[str, Any]) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, (*grid, 1, 1)[:3], numbers, constants
        self._compiled: dict[int, tuple[Callable, tuple, tuple]] = {}
        self._held: list[Any] = []

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
        """The first launch, and what the next ones need: by Triton's own road, which compiles, unless that was gone before."""
        kind = self._kind(key, tensors)
        known = _COMPILED.get(kind)
        compiled = known or self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if compiled is None:  # the interpreter compiles nothing
            return
        # No metadata for hooks, and no hooks around the launch.
        before = (compiled.function, compiled.packed_metadata, None, None, None)
        self._compiled[key] = compiled.run, before, self._after(len(tensors))
        if known is not None:
            self(*tensors)
        elif kind is None:
            self._held.append(compiled)
        else:
            _COMPILED[kind] = compiled

    def _after(self, tensors: int) -> tuple:
        """The arguments behind so many tensors."""
        names = self._kernel.arg_names[tensors + len(self._numbers) :]
        return (*self._numbers, *(self._constants[name] for name in names))

    def _kind(self, key: int, tensors: tuple) -> tuple | None:
        """What Triton compiles for; None where that cannot be told, as of descriptors."""
        types = [tensor.dtype if isinstance(tensor, Tensor) else tensor for tensor in tensors]
        if not all(kind is None or isinstance(kind, torch.dtype) for kind in types):
            return None
        # It folds ones, and asks of whole numbers whether 16 divides them and 32 bits hold them.
        numbers = [(n == 1, n % 16 == 0, n.bit_length() > 31) if type(n) is int else type(n) for n in self._numbers]
        return (self._kernel, key, *types, *numbers, *sorted(self._constants.items()))


_COMPILED: dict[tuple | None, Any] = {}
"""Triton's compiled kernels by `Call._kind`, held: a later Triton unloads what nobody holds."""
