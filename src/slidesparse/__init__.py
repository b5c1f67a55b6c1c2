"""slidesparse: language models pruned to (2N-2):2N structured sparsity, packed, smaller, and the same answers.

The public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "Packed": "format",
    "Pattern": "pattern",
    "Recipe": "checkpoint",
    "SlideSparseError": "errors",
    "SlideSparseLinear": "nn",
    "convert": "integrations.conversion",
    "inspect": "checkpoint",
    "load": "integrations.transformers",
    "pack": "packing",
    "pack_model": "nn",
    "place": "nn",
    "prune": "pruning",
    "quantize_weight": "quantization",
    "restore": "packing",
    "restore_model": "nn",
    "tune": "gemm.tune",
    "use_plan": "gemm",
    "verify": "integrations.conversion",
}

__all__ = [
    "Packed",
    "Pattern",
    "Recipe",
    "SlideSparseError",
    "SlideSparseLinear",
    "convert",
    "inspect",
    "load",
    "pack",
    "pack_model",
    "place",
    "prune",
    "quantize_weight",
    "restore",
    "restore_model",
    "tune",
    "use_plan",
    "verify",
]

if TYPE_CHECKING:
    from .checkpoint import Recipe, inspect
    from .errors import SlideSparseError
    from .format import Packed
    from .gemm import use_plan
    from .gemm.tune import tune
    from .integrations.conversion import convert, verify
    from .integrations.transformers import load
    from .nn import SlideSparseLinear, pack_model, place, restore_model  # type: ignore[no-redef]  # a module has the same name
    from .packing import pack, restore
    from .pattern import Pattern
    from .pruning import prune
    from .quantization import quantize_weight


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slidesparse' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
