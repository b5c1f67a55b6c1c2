"""A linear layer as it lies in a file, whatever the format: its tensors, its rows block by block, what cannot be done with it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from .. import packing
from ..errors import CheckpointError, WeightError
from ..format import FP32, FP64, Packed, Scheme, TensorSpec, scheme_of_dtype
from ..pattern import Pattern
from ..quantization import check_finite
from .tensorfile import TensorInfo, TensorReader

FLOATS = ("F64", "F32", "F16", "BF16")

WEIGHTS_IN = ("weight", "weight_packed", "weight_values", "compressed")
"""Suffixes of tensors that hold weights, in every format."""

WITH_WEIGHTS = ("weight_scale", "weight_global_scale", "weight_keep", "bitmask")
"""Suffixes of tensors without which the weights of some format mean nothing."""

OF_QUANTISED = re.compile(
    r"(weight|bias|input|output|[qkv])_(scale|scale_inv|global_scale|zero_point|g_idx|shape)|g_idx|row_offsets|bitmask"
)
"""Suffixes of tensors that quantised layers have, and no others."""

# Small enough that a block and its intermediates stay in the second-level cache; on a GPU large enough to hide a few dozen launches.
_WEIGHTS, _GPU_WEIGHTS = 1 << 18, 1 << 24


@dataclass
class Block:
    """Rows ``first … first + rows - 1`` of a layer: dense stored values ``[rows, K_stored]`` and the scales that belong to them.

    ``packed`` is the block as stored when the layer is packed and the block on the CPU.
    """

    first: int
    values: Tensor
    scale: Tensor | None = None
    packed: Packed | None = None


@dataclass(frozen=True)
class Layer:
    """One linear layer ``[n, k]``; ``pattern`` is set when packed.

    ``tensors`` are the layer's own by suffix, the one with the weights first. Each format is a subclass in a file of its own, and says:

    - what its layer ``holds``, in words;
    - whether these are ``plain`` weights of 16 or 32 bits, and nothing else;
    - in which forms of output they ``may_stay`` as they are: no loader expects quantised ones in a packed checkpoint;
    - whether they are converted ``by_default``, when nobody names them;
    - whether one that is not converted must be ``restored`` to ordinary weights;
    - whether it is a ``vector`` of one row, which can only be restored.
    """

    name: str
    n: int
    k: int
    scheme: Scheme
    tensors: dict[str, TensorInfo]
    pattern: Pattern | None = None

    holds: ClassVar[str]
    plain: ClassVar[bool] = False
    may_stay: ClassVar[tuple[str, ...]] = ()
    by_default: ClassVar[bool] = True
    restored: ClassVar[bool] = False
    vector: ClassVar[bool] = False

    @property
    def main(self) -> TensorInfo:
        """The tensor with the weights."""
        return next(iter(self.tensors.values()))

    @property
    def one_scale(self) -> bool:
        """Whether one scale is that of every row, of which there are several."""
        info = self.tensors.get("weight_scale")
        return info is not None and self.scheme.dynamic and math.prod(info.shape) == 1 < self.n

    @property
    def stored_pattern(self) -> Pattern:
        """The pattern of a packed layer, as stored values obey it.

        Raises:
            CheckpointError: the layer is not packed.
        """
        if self.pattern is None:
            raise CheckpointError(f"{self.main.path}: layer {self.name} is not packed")
        return self.scheme.pattern_stored(self.pattern)

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales included."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same weights in dense form, with the same element type."""
        scales = sum(info.nbytes for suffix, info in self.tensors.items() if "scale" in suffix)
        return self.n * self.scheme.k_stored(self.k) * self.scheme.dtype.itemsize + scales

    @property
    def read_scheme(self) -> Scheme:
        """The scheme of the values that `blocks` gives."""
        return self.scheme

    def refusal(self, scheme: str | None, method: str | None) -> str | None:
        """Why the layer cannot be pruned by a method or stored in a scheme (None: as it is); None if it can."""
        own = self.scheme
        if not (own.dynamic or own.pair):
            return None
        if scheme not in (None, own.name):
            return f"is {own.name} already: quantise to {scheme} from the 16-bit checkpoint"
        return "is nvfp4 already: prune the 16-bit checkpoint" if own.pair and method else None

    def blocks(self, reader: TensorReader, device: str = "cpu") -> Iterator[Block]:
        """The layer's rows in order as dense values on ``device``.

        This is where weights come in, and the one place where each of them is looked at: what follows may trust them.

        Raises:
            CheckpointError: NaN or Inf, or packed tensors or scales that contradict the configuration; names layer and row.
        """
        try:
            for block in self._read(reader, self.row_ranges(device)):
                check_finite(block.values, first_row=block.first)
                if device != "cpu":
                    block = Block(block.first, block.values.to(device), None if block.scale is None else block.scale.to(device))
                yield block
        except WeightError as error:
            raise CheckpointError(f"{self.main.path}: layer {self.name}: {error}") from error

    def row_ranges(self, device: str = "cpu") -> Iterator[tuple[int, int]]:
        """First and last row (exclusive) of every block."""
        step = max(1, (_WEIGHTS if device == "cpu" else _GPU_WEIGHTS) // max(self.k, 1))
        return ((first, min(first + step, self.n)) for first in range(0, self.n, step))

    def _read(self, reader: TensorReader, ranges: Iterable[tuple[int, int]]) -> Iterator[Block]:
        """The blocks of these rows on the CPU."""
        raise NotImplementedError

    def _scale(self, reader: TensorReader, first: int, last: int) -> Tensor | None:
        """The scales of some rows, checked."""
        info = self.tensors.get("weight_scale")
        if info is None:
            return None
        scale = reader.read(info).reshape(1, 1).expand(last - first, 1) if self.one_scale else reader.read_rows(info, first, last)
        scale = scale.float().reshape(last - first, 1) if self.scheme.dynamic else scale
        packing.check_scale(scale, (last - first, scale.shape[1]), zero_allowed=self.scheme.pair, first_row=first)
        return scale


def matrices(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str, TensorInfo]]:
    """Layer, suffix and tensor wherever one has the name and the dimensions of dense weights."""
    for tensor, info in tensors.items():
        name, _, suffix = tensor.rpartition(".")
        if suffix in ("weight", "weight_packed", "qweight") and len(info.shape) == 2 and name:
            yield name, suffix, info


def float_scheme(info: TensorInfo) -> Scheme:
    """The scheme of plain weights, those too wide to be packed among them."""
    return scheme_of_dtype(info.dtype) or (FP32 if info.dtype == FP32.dtype else FP64)


def tensors_of(layer: str, suffixes: Iterable[str], tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Those of a layer's tensors that are there, by suffix."""
    return {suffix: tensors[f"{layer}.{suffix}"] for suffix in suffixes if f"{layer}.{suffix}" in tensors}


def check_tensors(layer: Layer, specs: tuple[TensorSpec, ...], scales: tuple[str, ...], why: str = "") -> None:
    """Hold a layer's tensors against what they should be; ``scales`` are types that scales may have, ``why`` says what asks for the shapes.

    Raises:
        CheckpointError: a tensor is missing, or of another shape or type; names it.
    """
    for spec in specs:
        info = layer.tensors.get(spec.suffix)
        if info is None:
            raise CheckpointError(f"{layer.main.path}: layer {layer.name} has no {spec.suffix}")
        flat = spec.suffix == "weight_scale" and layer.scheme.dynamic and info.shape == spec.shape[:1]
        if info.shape != spec.shape and not flat:
            raise CheckpointError(f"{info.path}: {info.name} has shape {list(info.shape)}, expected {list(spec.shape)}{why}")
        if spec.suffix in WEIGHTS_IN and info.dtype != spec.dtype:
            raise CheckpointError(f"{info.path}: {info.name} is {info.dtype_name}, config.json says {layer.scheme.name}")
        allowed = {"weight_keep": ("U8",), "weight_scale": scales}.get(spec.suffix, (info.dtype_name,))
        if info.dtype_name not in allowed:
            raise CheckpointError(f"{info.path}: {info.name} is {info.dtype_name}, expected {' or '.join(allowed)}")


def check_quantised(path: Path, tensors: Mapping[str, TensorInfo], told: str, key: str) -> None:
    """Where config.json tells of quantised weights, something in the files must be; ``told`` says how, ``key`` is where it stands.

    Raises:
        CheckpointError: the weights were dequantised, and the configuration left over.
    """
    plain = (*FLOATS, "I64", "BOOL")
    if all(info.dtype_name in plain and "weight_scale" not in name for name, info in tensors.items()):
        raise CheckpointError(
            f"{path}: config.json says that weights are quantised {told}, but no tensor is: remove its {key} to read them as they are"
        )


def check_zero_points(layer: str, info: TensorInfo) -> None:
    """Zero points that are all zero say nothing; others shift the weights, which no kernel here undoes."""
    with TensorReader() as reader:
        if bool((reader.read(info).float() != 0).any()):
            raise CheckpointError(f"{info.path}: layer {layer} has zero points other than 0 (asymmetric weights), which are not supported")
