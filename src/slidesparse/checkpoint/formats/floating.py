"""16-, 32- or 64-bit weights, as models are published: every float matrix that no other format takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..layers import FLOATS, Block, Layer, float_scheme, matrices
from ..tensorfile import TensorInfo, TensorReader

_QUANTISED = ("I8", "U8", "U32", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4")
"""Types that mean weights only beside scales."""


class Floating(Layer):
    """A layer with nothing but its weights."""

    holds, plain, may_stay = "16- or 32-bit weights", True, ("packed", "dense")

    def _read(self, reader: TensorReader, ranges: Iterable[tuple[int, int]]) -> Iterator[Block]:
        return (Block(first, reader.read_rows(self.main, first, last)) for first, last in ranges)


def find(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Layer]:
    """Float matrices by layer; refuses one with scales of a format that config.json does not name."""
    layers: dict[str, Layer] = {}
    for name, suffix, info in matrices(tensors):
        if info.dtype_name in FLOATS and suffix == "weight":
            layers[name] = Floating(name, info.shape[0], info.shape[1], float_scheme(info), {suffix: info})
        elif f"{name}.weight_scale" in tensors or info.dtype_name in _QUANTISED or suffix == "qweight":
            told = f"tensor {info.name} is quantised ({info.dtype_name}), but config.json does not say how"
            raise CheckpointError(f"{info.path}: {told}: start from the 16-bit checkpoint")
    return layers
