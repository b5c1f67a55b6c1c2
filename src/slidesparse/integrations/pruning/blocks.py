"""The repeated blocks of a model: which they are, and running them one after the other without the rest of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError, first_line
from .head import FAILURES, Head, replaced

_PROBE = 16
"""Tokens of the forward pass that shows how blocks hand over to each other."""
_HIDDEN = "hidden_states"


class _Enough(Exception):
    """Ends a forward pass behind the last block."""


@dataclass
class Call:
    """How the model calls one block: everything but the hidden states, which come first or under ``keyword``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None

    def to(self, device: torch.device) -> Call:
        """The same with every tensor on a device."""
        return Call(_moved(self.args, device), _moved(self.kwargs, device), self.keyword)

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Hidden states ``[B, T, hidden]`` behind the block."""
        if self.keyword is None:
            return hidden_states(block(hidden, *self.args, **self.kwargs))
        return hidden_states(block(*self.args, **{self.keyword: hidden}, **self.kwargs))


@dataclass
class Blocks:
    """The largest list of blocks with linear layers in a model; ``name`` is the list's, ``modules`` are in order."""

    model: nn.Module
    name: str
    modules: list[nn.Module]
    tuples: bool = False
    """Whether a block returns a tuple; `check` finds out."""
    head: Head | None = None
    """What makes logits of the hidden states behind the last block; `check` finds it, where the model has one."""

    @classmethod
    def of(cls, model: nn.Module) -> Blocks:
        """Find them.

        Raises:
            UnsupportedError: the model has no list of blocks with linear layers.
        """
        best, most = None, 0
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or (best and name.startswith(f"{best}.")):
                continue
            weights = sum(inner.weight.numel() for inner in module.modules() if isinstance(inner, nn.Linear))
            if weights > most:
                best, most = name, weights
        if best is None:
            raise UnsupportedError(f"{type(model).__name__} has no repeated blocks with linear layers: prune with --method magnitude")
        return cls(model, best, list(model.get_submodule(best).children()))

    def check(self, tokens: Tensor) -> None:
        """Whether every block gets what the block before it gives, and nothing else that depends on tokens; ``tokens [S, L]``.

        Raises:
            UnsupportedError: the model does not run, or its blocks cannot be run one by one.
        """
        self._check_apart()
        probe = tokens[:1, :_PROBE]
        calls = self._watch(probe)
        for other in (probe, probe.flip(1)):
            for index, (call,) in enumerate(self.enter(other, 1)[1]):
                if not _same((call.args, call.kwargs), (calls[index].args, calls[index].kwargs)):
                    self._refuse(f"block {index} of {self.name} gets more than hidden states from the tokens or from other blocks")

    def _check_apart(self) -> None:
        """No block's parameter or buffer is another's, too: blocks are pruned, and let go of, one by one."""
        owners: dict[int, int] = {}
        for index, block in enumerate(self.modules):
            for name, tensor in (*block.named_parameters(), *block.named_buffers()):
                owner = owners.setdefault(id(tensor), index)
                if owner != index:
                    self._refuse(f"blocks {owner} and {index} of {self.name} share {name}")

    def _watch(self, probe: Tensor) -> list[Call]:
        """The calls of all blocks in a forward pass of the model as it is."""
        given: list[Tensor] = []
        calls: list[Call] = []

        def before(index: int) -> Callable[..., None]:
            def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden, call = self._split(args, kwargs)
                if index != len(given) or (given and given[-1] is not hidden and not torch.equal(given[-1], hidden)):
                    self._refuse(f"block {index} of {self.name} gets other hidden states than the block before it gives")
                calls.append(call)

            return look

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.tuples = not isinstance(output, Tensor)
            given.append(hidden_states(output))

        handles = [block.register_forward_pre_hook(before(i), with_kwargs=True) for i, block in enumerate(self.modules)]
        handles += [block.register_forward_hook(after) for block in self.modules]
        try:
            with torch.no_grad():
                output = self._run(probe)
        finally:
            for handle in handles:
                handle.remove()
        if len(given) != len(self.modules):
            self._refuse(f"{len(given)} of {len(self.modules)} blocks of {self.name} ran")
        head = Head(self.model, self.modules, self.tuples)
        self.head = head if head.gives(given[-1], getattr(output, "logits", None)) else None
        return calls

    def _run(self, tokens: Tensor) -> Any:
        try:
            return self.model(input_ids=tokens, use_cache=False)
        except FAILURES as error:
            self._refuse(f"it does not run on {tokens.shape[1]} tokens ({first_line(error)})", error)

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """Hidden states and the rest of a block's arguments."""
        if args and isinstance(args[0], Tensor):
            return args[0], Call(args[1:], dict(kwargs), None)
        if not isinstance(kwargs.get(_HIDDEN), Tensor):
            self._refuse(f"the blocks of {self.name} are not called with hidden states")
        return kwargs[_HIDDEN], Call(args, {name: value for name, value in kwargs.items() if name != _HIDDEN}, _HIDDEN)

    def _refuse(self, told: str, cause: Exception | None = None) -> NoReturn:
        raise UnsupportedError(
            f"{type(self.model).__name__}: {told}: calibrated pruning cannot follow it, use --method magnitude"
        ) from cause

    @torch.no_grad()
    def enter(self, tokens: Tensor, size: int) -> tuple[list[Tensor], list[list[Call]]]:
        """What goes into the first block, ``[B, L, hidden]`` for each ``size`` of the samples ``tokens [S, L]``, and every block's calls.

        Calls are listed by block, then by batch; batches of one size share them.
        """
        hidden: list[Tensor] = []
        calls: list[list[Call]] = [[] for _ in self.modules]
        known: dict[int, int] = {}
        for number, batch in enumerate(tokens.split(size)):
            seen = known.setdefault(len(batch), number)
            with self._bypassed(hidden, calls, first_only=seen != number), suppress(_Enough):
                self._run(batch)
            if seen != number:
                for own in calls:
                    own.append(own[seen])
        return hidden, calls

    @contextmanager
    def _bypassed(self, hidden: list[Tensor], calls: list[list[Call]], *, first_only: bool) -> Iterator[None]:
        """While the model runs, blocks hand their input on; the first block's input and every block's call are noted."""
        last = 0 if first_only else len(self.modules) - 1

        def bypass(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                states, call = self._split(args, kwargs)
                if index == 0:
                    hidden.append(states)
                if not first_only:
                    calls[index].append(call)
                if index == last:
                    raise _Enough
                return (states,) if self.tuples else states

            return forward

        with replaced(self.modules, [bypass(index) for index in range(len(self.modules))]):
            yield


def hidden_states(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two blocks' arguments are equal, as far as tensors, numbers, text and what they are kept in can tell."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b if isinstance(a, bool | int | float | str) else True
