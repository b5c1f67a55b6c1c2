"""Bring a model with packed layers onto a device, ready to run, and say what that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from sys import maxsize

import torch
from torch import nn

from ..gemm import MEMORY
from .linear import SlideSparseLinear


@dataclass
class Placement:
    """Where the linears of a model run: bytes by place, and how many layers run which routes.

    ``resident`` counts copies derived from the packed weights, ``packed`` the packed weights on the device, ``host`` those moved to host
    memory, all in bytes; ``routes`` counts layers by text such as ``dense:tensorwise ≤ 64, dense:rowwise``.
    """

    device: torch.device
    memory: str
    layers: int
    resident: int
    packed: int
    host: int
    routes: Counter[str]

    def __str__(self) -> str:
        if not self.layers:
            return f"no packed layers on {self.device}"
        routes = "; ".join(f"{count} × {route}" for route, count in self.routes.most_common())
        places = ((self.resident, "resident copies"), (self.packed, "packed"), (self.host, "packed in host memory"))
        sizes = ", ".join(f"{nbytes / 1e9:.2f} GB {what}" for nbytes, what in places if nbytes)
        return f"{self.layers} packed layers on {self.device}, memory policy {self.memory}: {sizes}; {routes}"


def place(
    model: nn.Module, device: torch.device | str, *, dtype: torch.dtype | None = None, memory: str = "fast",
    tokens: Collection[int] | None = None,
) -> Placement:  # fmt: skip
    """Move ``model`` to ``device``, choose the routes of its packed layers for activations of ``dtype``, and make what they need.

    Without this call the same happens at the first forward pass; a CUDA graph needs it before, and so does
    ``torch.compile(mode="reduce-overhead")``, which makes them: what is made in a first pass would lie in its graphs' memory.

    Args:
        dtype: of the activations; by default the type of the model's first floating parameter.
        memory: one of `slidesparse.gemm.MEMORY`.
        tokens: the numbers of tokens of the calls that matter: every layer keeps the layout that runs them fastest; by default all that
            the plan measured.

    Raises:
        ValueError: unknown memory policy, or a number of tokens below 1.
        WeightError: damaged packed weights; names the layer.
    """
    if memory not in MEMORY:
        raise ValueError(f"unknown memory policy {memory!r}: choose one of {', '.join(MEMORY)}")
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    device = torch.empty(0, device=device).device
    layers = [module for module in model.modules() if isinstance(module, SlideSparseLinear)]
    if tokens is not None and any(m < 1 for m in tokens):
        raise ValueError(f"numbers of tokens are positive, got {list(tokens)}")
    for layer in layers:
        layer.memory, layer.tokens = memory, tokens
    model.to(device)
    for layer in layers:
        layer.prepare(dtype, device)
    routes = Counter(", ".join(str(route) if most == maxsize else f"{route} ≤ {most}" for most, route in layer.routes) for layer in layers)
    host = sum(layer.packed.nbytes for layer in layers if layer.packed.values.device != device)
    packed = sum(layer.packed.nbytes for layer in layers) - host
    return Placement(device, memory, len(layers), sum(layer.resident_bytes for layer in layers), packed, host, routes)
