"""BitNet b1.58 (arXiv 2402.17764): ternary weights, four to a byte, or the master weights that become ternary when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, WeightError
from ...format import QUANT_METHOD, SCHEMES, Scheme
from ...quantization import check_finite
from ..layers import FLOATS, Block, Layer, float_scheme, matrices, tensors_of
from ..tensorfile import TensorInfo, TensorReader

METHOD = "bitnet"


class _BitNet(Layer):
    @property
    def read_scheme(self) -> Scheme:
        return SCHEMES["int8"]

    def refusal(self, scheme: str | None, method: str | None) -> str | None:
        return None if scheme == "int8" else "is BitNet: its ternary weights go through --scheme int8, in one convert or quantize step"


@dataclass(frozen=True)
class Ternary(_BitNet):
    """A layer of the hub's ternary files; ``inverse_scale``: its scale divides instead of multiplying."""

    inverse_scale: bool = True
    holds = "BitNet ternary weights, four to a byte"

    def _read(self, reader: TensorReader, ranges: Iterable[tuple[int, int]]) -> Iterator[Block]:
        scale = reader.read(self.tensors["weight_scale"]).float().reshape(-1)
        if scale.numel() != 1:
            raise WeightError(f"weight_scale holds {scale.numel()} values, BitNet has one per tensor")
        scale = 1.0 / scale if self.inverse_scale else scale
        for first, last in ranges:
            yield Block(first, self._rows(reader, first, last), scale.expand(last - first, 1).contiguous())

    def _rows(self, reader: TensorReader, first: int, last: int) -> Tensor:
        """Rows of the unpacked matrix; each quarter of it lies in one bit pair of all packed rows."""
        quarter = self.n // 4
        pieces = []
        while first < last:
            part = first // quarter
            stop = min(last, (part + 1) * quarter)
            packed = reader.read_rows(self.main, first - part * quarter, stop - part * quarter)
            pieces.append(unpack_ternary(packed).view(4, stop - first, self.k)[part])
            first = stop
        return torch.cat(pieces)


class Master(_BitNet):
    """A layer of 16- or 32-bit weights, read as ternary ones with their mean magnitude as scale."""

    holds, may_stay = "BitNet master weights", ("packed", "dense")

    def _read(self, reader: TensorReader, ranges: Iterable[tuple[int, int]]) -> Iterator[Block]:
        sums = (float(reader.read_rows(self.main, *rows).abs().sum(dtype=torch.float64)) for rows in self.row_ranges())
        mean = sum(sums) / max(self.n * self.k, 1)
        for first, last in ranges:
            weight = reader.read_rows(self.main, first, last)
            check_finite(weight, first_row=first)
            yield Block(first, ternarize(weight, mean), torch.full((last - first, 1), max(mean, 1e-5), dtype=torch.float32))


def find(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Layer]:
    """Layers of a BitNet model by name; refuses layers with norms of their own, missing scales, and biases that a scale would act on."""
    quantization = config.get("quantization_config") or {}
    method, inverse = quantization.get("quant_method"), quantization.get("linear_class", "bitlinear") == "bitlinear"
    if method == METHOD and quantization.get("use_rms_norm"):
        raise CheckpointError(f"{path}: BitNet layers with their own RMSNorm (use_rms_norm) are not supported")
    if method == QUANT_METHOD or METHOD not in (method, config.get("model_type")):
        return {}
    layers: dict[str, Layer] = {}
    for name, suffix, info in matrices(tensors):
        own = tensors_of(name, (suffix, "weight_scale"), tensors)
        if suffix == "weight" and info.dtype_name in FLOATS:
            layers[name] = Master(name, info.shape[0], info.shape[1], float_scheme(info), {suffix: info})
        elif suffix == "weight" and info.dtype_name == "U8":
            if "weight_scale" not in own:
                raise CheckpointError(f"{info.path}: ternary tensor {info.name} has no weight_scale")
            if not inverse and f"{name}.bias" in tensors:
                raise CheckpointError(
                    f"{info.path}: {name}.bias would be scaled with the ternary weights (autobitlinear); that is not supported"
                )
            layers[name] = Ternary(name, info.shape[0] * 4, info.shape[1], SCHEMES["int8"], own, inverse_scale=inverse)
    return layers


def ternarize(weight: Tensor, mean: float) -> Tensor:
    """round(w / mean|w|) clamped to ±1, as int8 ``[N, K]``.

    ``mean`` is the mean magnitude of the whole tensor, at least 1e-5 as in the published models.
    """
    return (weight.to(torch.float32) / torch.tensor(max(mean, 1e-5), device=weight.device)).round().clamp(-1, 1).to(torch.int8)


def unpack_ternary(packed: Tensor) -> Tensor:
    """Weights of the hub's ternary files, four to a byte: uint8 ``[N/4, K]`` → int8 ``[N, K]``; row i of block b stands in bits 2b.

    Raises:
        WeightError: a code other than 0, 1, 2 (that is −1, 0, 1).
    """
    codes = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    if bool((codes == 3).any()):
        row, column = (int(i) for i in (codes == 3).nonzero()[0])
        raise WeightError(f"ternary weight: code 3 at row {row}, column {column}; only 0, 1 and 2 mean something")
    return codes.to(torch.int8) - 1
