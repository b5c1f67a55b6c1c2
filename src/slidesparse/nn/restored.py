"""The tensor that stands for a packed layer's weight: to be read, not to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..compat.torch import without_subclasses
from ..errors import UnsupportedError

_WRITES = ("__set__", "__delete__", "requires_grad_")
"""What no version counts, and is not even tried."""


class RestoredWeight(torch.Tensor):
    """Weights restored from packed ones, ``[N, K]``: whatever would write into them, or into a view of them, raises.

    A write would change this tensor only, never the layer. Results that have memory of their own are plain tensors.
    """

    label: str

    @staticmethod
    def of(weight: Tensor, label: str, marks: Mapping[str, object] | None = None) -> RestoredWeight:
        """This tensor as the weight of a layer that messages call ``label``; ``marks`` are attributes that it gets."""
        found = weight.as_subclass(RestoredWeight)
        found.__dict__ |= {**(marks or {}), "label": label}
        return found

    @classmethod
    def __torch_function__(cls, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run ``func``, and see whether it wrote into one of these.

        Raises:
            UnsupportedError: it did; names the layer.
        """
        kwargs, untried = kwargs or {}, getattr(func, "__name__", "") in _WRITES
        given = [one for one in _leaves((args, kwargs)) if isinstance(one, RestoredWeight)]
        with without_subclasses():
            before = [one._version for one in given]
            result = None if untried else func(*args, **kwargs)
            changed = [one for one, version in zip(given, before, strict=True) if untried or one._version != version]
            if changed:
                raise UnsupportedError(
                    f"{changed[0].label}: its weight is restored from packed tensors at every access, and what is written into it is lost: "
                    "pack changed weights with SlideSparseLinear.from_dense"
                )
            if type(result) not in (Tensor, RestoredWeight):
                return result
            memory = result.untyped_storage().data_ptr()
            label = next((one.label for one in given if one.untyped_storage().data_ptr() == memory), None)
            return result.as_subclass(Tensor) if label is None else RestoredWeight.of(result, label)


def _leaves(given: object) -> Iterator[object]:
    """What stands in tuples, lists and dictionaries, however deep."""
    if isinstance(given, (tuple, list)):
        for one in given:
            yield from _leaves(one)
    elif isinstance(given, dict):
        yield from _leaves(list(given.values()))
    else:
        yield given
