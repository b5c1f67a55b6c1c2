"""slidesparse: language models pruned to (2N-2):2N structured sparsity, packed, smaller, and the same answers.

The public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Packed": "format",
    "Pattern": "pattern",
    "Recipe": "checkpoint",
    "SlideSparseError": "errors",
    "SlideSparseLinear": "nn",
    "accelerate": "nn",
    "convert": "integrations.conversion",
    "inspect": "checkpoint",
    "load": "integrations.transformers",
    "place": "nn",
    "tune": "gemm.tune",
    "use_plan": "gemm",
    "verify": "integrations.conversion",
}
_ROOMS = ("pack", "prune", "quant")  # pure functions on tensors, reached as slidesparse.pack.pack and so on

__all__ = [
    "Packed",
    "Pattern",
    "Recipe",
    "SlideSparseError",
    "SlideSparseLinear",
    "accelerate",
    "convert",
    "inspect",
    "load",
    "pack",
    "place",
    "prune",
    "quant",
    "tune",
    "use_plan",
    "verify",
]

if TYPE_CHECKING:
    from . import pack, prune, quant
    from .checkpoint import Recipe, inspect
    from .errors import SlideSparseError
    from .format import Packed
    from .gemm import use_plan
    from .gemm.tune import tune
    from .integrations.conversion import convert, verify
    from .integrations.transformers import load
    from .nn import SlideSparseLinear, accelerate, place
    from .pattern import Pattern


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'slidesparse' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
