"""Logits from hidden states behind a model's last block, by the model's own forward pass: norm, scales and caps are those of its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

PIECE = 512
"""Tokens whose logits are there together: with a vocabulary of 150,000 each such matrix takes 0.3 GB in float32."""
_CLOSE = 0.02
"""Largest difference between two ways to the same logits, as a part of the largest logit: 16-bit sums differ in their last digits."""
FAILURES = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, ImportError)
"""What models raise that cannot run as they are asked to; among them are tensors on two devices, and memory that ran out."""


class Head:
    """What a model does behind its last block; hidden states ``[B, T, hidden]`` → logits ``[B, T, vocabulary]``."""

    def __init__(self, model: Any, blocks: list[nn.Module], tuples: bool) -> None:
        self.model, self.blocks, self.tuples = model, blocks, tuples
        self.parts: set[nn.Module] = set()
        """Modules outside the blocks that run; `gives` finds them."""

    @torch.no_grad()
    def gives(self, hidden: Tensor, logits: Any) -> bool:
        """Whether it gives the ``logits`` of a forward pass from the ``hidden`` states behind the last block, of each token by itself."""
        if not isinstance(logits, Tensor) or logits.shape[:-1] != hidden.shape[:-1]:
            return False
        half = hidden.shape[1] // 2
        inside = {module for block in self.blocks for module in block.modules()}
        outside = [module for module in self.model.modules() if module not in inside]
        handles = [module.register_forward_pre_hook(lambda module, args: self.parts.add(module)) for module in outside]
        try:
            found = torch.cat([self(hidden[:, half:]), self(hidden[:, :half])], 1)
        except FAILURES:
            return False  # the class takes no embeddings, or ones of another width
        finally:
            for handle in handles:
                handle.remove()
        wanted = logits.roll(-half, 1)
        return found.shape == logits.shape and bool((found - wanted).abs().max() <= _CLOSE * logits.abs().max())

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits; gradients reach the hidden states."""
        given = (hidden,) if self.tuples else hidden
        with replaced(self.blocks, [lambda *args, **kwargs: given] * len(self.blocks)):
            output: Tensor = self.model(inputs_embeds=hidden.detach(), use_cache=False).logits
        return output

    def to(self, device: torch.device) -> Head:
        """The same; of the model, the modules that run move, each with its own parameters and buffers."""
        for module in self.parts:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
        return self

    def divergence(self, hidden: Tensor, target: Tensor) -> Tensor:
        """KL divergence, in nats, of the logits from those of the ``target`` states, both ``[B, T, hidden]``: mean over the tokens.

        Logits are made in pieces of `PIECE` tokens, and once more for the gradients.
        """
        total = torch.zeros((), device=hidden.device)
        for own, wanted in zip(hidden.split(1), target.split(1), strict=True):
            for piece, same in zip(own.split(PIECE, 1), wanted.split(PIECE, 1), strict=True):
                total = total + checkpoint(self._piece, piece, same, use_reentrant=False, preserve_rng_state=False)
        return total / (hidden.shape[0] * hidden.shape[1])

    def _piece(self, hidden: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self(target).float().log_softmax(-1)
        return kl_div(self(hidden).float().log_softmax(-1), wanted, reduction="sum", log_target=True)


@contextmanager
def replaced(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Modules run other functions for a while; a ``forward`` that a module had for itself, as hooks set one, comes back."""
    before = [{name: value for name, value in vars(module).items() if name == "forward"} for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            vars(module).update(own)
