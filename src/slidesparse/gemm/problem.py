"""What a kernel is asked to compute: the problem of one layer, and its stored weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..format import Packed, Scheme
from ..pattern import Pattern


@dataclass(frozen=True)
class Problem:
    """One whole linear, for any number of tokens: ``x [M, k]`` → ``y [M, n]``, in and out of type ``dtype``.

    ``k`` counts weights and ``pattern`` is the layer's, of pairs for nvfp4. ``capability`` is the compute capability of the CUDA device,
    (0, 0) on others. ``bias`` is the bias's dtype, None without one.
    """

    n: int
    k: int
    pattern: Pattern
    scheme: Scheme
    capability: tuple[int, int]
    dtype: torch.dtype
    bias: torch.dtype | None = None

    @property
    def cuda(self) -> bool:
        """Whether a CUDA device runs it."""
        return self.capability > (0, 0)

    @property
    def native(self) -> bool:
        """The weights' own 16-bit type is that of activations and bias: one library call, fp32 sums, one rounding."""
        return self.dtype == self.scheme.dtype and self.bias in (None, self.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of dense weights: the narrowest that holds them exactly and whose products sum exactly enough.

        int8 stays int8 (int32 sums), fp8 stays fp8 on CUDA; elsewhere its products are exact in float32. 16-bit weights stay as they
        are unless activations or bias have another type, when all are widened to float32. nvfp4 weights before the division by their global
        scale are exact in both 16-bit types: in that of the activations, or else in bfloat16.
        """
        if self.scheme.pair:
            return torch.bfloat16 if self.dtype == torch.float32 else self.dtype
        kept = self.scheme.dtype == torch.int8 or self.native or (self.scheme.dynamic and self.cuda)
        return self.scheme.dtype if kept else torch.float32


@dataclass(frozen=True)
class Weights:
    """A layer's weights as stored: ``scale`` is float32 ``[N, 1]`` (nvfp4: e4m3 ``[N, K/16]``), ``global_scale`` float32 ``[1]``."""

    packed: Packed
    scheme: Scheme
    scale: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def k(self) -> int:
        """Weights per row."""
        return self.packed.k * (2 if self.scheme.pair else 1)

    @property
    def channel_scale(self) -> Tensor | None:
        """The scale that acts on output channels, float32 ``[N, 1]``: that of the 8-bit schemes."""
        return self.scale if self.scheme.dynamic else None

    def problem(self, dtype: torch.dtype, device: torch.device, bias: torch.dtype | None) -> Problem:
        """The problem that activations and a bias of these types pose."""
        capability = ops.capability(device) if device.type == "cuda" else (0, 0)
        pattern = replace(self.packed.pattern, unit=2) if self.scheme.pair else self.packed.pattern
        return Problem(self.packed.n, self.k, pattern, self.scheme, capability, dtype, bias)

    def to(self, device: torch.device) -> Weights:
        """The same weights on that device."""
        packed = replace(self.packed, values=self.packed.values.to(device), keep=self.packed.keep.to(device))
        scale, factor = (None if tensor is None else tensor.to(device) for tensor in (self.scale, self.global_scale))
        return replace(self, packed=packed, scale=scale, global_scale=factor)
