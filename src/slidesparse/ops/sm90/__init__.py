"""A product for compute capability 9.0 with scales and the bias inside, written in CUDA C++ and compiled at first use."""

from .launch import Gemm, loaded, unavailable
from .layout import tile, tiled_bytes, untile
from .predict import H200, RATES, Rates, predicted_us
from .variants import VARIANTS, Types, Variant, constants, fits, source

__all__ = [
    "H200",
    "RATES",
    "VARIANTS",
    "Gemm",
    "Rates",
    "Types",
    "Variant",
    "constants",
    "fits",
    "loaded",
    "predicted_us",
    "source",
    "tile",
    "tiled_bytes",
    "unavailable",
    "untile",
]
