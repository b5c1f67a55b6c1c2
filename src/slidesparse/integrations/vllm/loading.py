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
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        nbytes = sum(storage.nbytes() for storage in storages.values())
        waits = any(map(has_memory, self._waiting))
        if not waits or any(free_bytes(device) < ROOM * nbytes for device in {tensor.device for tensor in tensors}):
            self.held.clear()

    def over(self) -> None:
        """No layer is waited for, ready or not."""
        self._waiting.clear()
        self.held.clear()


LOADING = Loading()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def let_go() -> None:
    """A layer runs, so loading is over. Compiled code calls this while it is traced, and never when it runs."""
    if LOADING.held:
        LOADING.over()


def has_memory(layer: nn.Module) -> bool:
    """False of a layer on the meta device: vLLM puts those there that the model can do without, and makes none of them ready."""
    return not any(parameter.is_meta for parameter in layer.parameters())


def free_bytes(device: torch.device) -> int:
    """What the driver could still give to new blocks: nothing where torch has no allocator of blocks."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
