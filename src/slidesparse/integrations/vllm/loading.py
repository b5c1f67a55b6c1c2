"""What vLLM loaded, on its way out: held until every layer is ready, so that none of its blocks ends up under a smaller tensor.

While vLLM loads, torch's allocator splits no block of more than 20 MB, and gives one to a tensor that is up to 20 MB smaller: a hole for as
long as that tensor lives. Giving blocks back to the driver after every layer would help, but is forbidden in the pool of vLLM's sleep mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

import torch
from torch import Tensor, nn

ROOM = 8
"""A layer's copies, and what is made on the way to them, take less than so many times its loaded tensors."""


class Loading:
    """The layers that wait for their weights, and tensors of others, held while some wait and memory is not short."""

    def __init__(self) -> None:
        self._waiting: WeakSet[nn.Module] = WeakSet()
        self.held: list[Tensor] = []

    def begins(self, layer: nn.Module) -> None:
        """The layer has parameters to load weights into."""
        self._waiting.add(layer)

    def ends(self, layer: nn.Module, loaded: Iterable[Tensor]) -> None:
        """The layer is ready, and does not need these tensors; once no layer waits, none is held."""
        self._waiting.discard(layer)
        self.held += (tensors := list(loaded))
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if not self._waiting or any(free_bytes(device) < ROOM * nbytes for device in {tensor.device for tensor in tensors}):
            self.held.clear()


LOADING = Loading()


def free_bytes(device: torch.device) -> int:
    """What the driver could still give to new blocks: nothing where torch has no allocator of blocks."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
