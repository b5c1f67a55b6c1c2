"""What a backend is asked to compute: the problem of one layer and its stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import Packed, Scheme
from ..pattern import Pattern


@dataclass(frozen=True)
class Problem:
    """One whole linear but for its number of tokens: ``x [M, k]`` → ``y [M, n]``, in and out of type ``dtype``.

    ``k`` counts weights; ``device`` is a device type; ``bias`` is the bias's dtype, None without one.
    """

    n: int
    k: int
    pattern: Pattern
    scheme: Scheme
    device: str
    dtype: torch.dtype
    bias: torch.dtype | None = None

    @property
    def native(self) -> bool:
        """The weights' own 16-bit type is that of activations and bias: one library call, fp32 sums, one rounding."""
        return self.dtype == self.scheme.dtype and self.bias in (None, self.dtype)

    @property
    def scales_sums(self) -> bool:
        """Whether bare products come with the weight scales applied: every product of int8 does so for nothing, not every one of fp8."""
        return self.scheme.dtype == torch.int8

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of resident dense weights: the narrowest that holds them exactly and whose products sum exactly enough.

        int8 stays int8 (int32 sums), fp8 stays fp8 on CUDA; elsewhere its products are exact in float32. 16-bit weights stay as they
        are unless activations or bias have another type, when all are widened to float32; nvfp4 weights are e2m1 · e4m3 / fp32, which
        only float32 holds.
        """
        kept = self.scheme.dtype == torch.int8 or self.native or (self.scheme.dynamic and self.device == "cuda")
        if kept:
            return self.scheme.dtype
        return torch.float32


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
        return Problem(self.packed.n, self.k, self.packed.pattern, self.scheme, device.type, dtype, bias)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors themselves: the resident tensors of the ``packed`` layout."""
        named = {"values": self.packed.values, "keep": self.packed.keep, "scale": self.scale, "global_scale": self.global_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, problem: Problem, tensors: Mapping[str, Tensor]) -> Weights:
        """Undo `tensors`."""
        scheme = problem.scheme
        packed = Packed(tensors["values"], tensors["keep"], scheme.pattern_stored(problem.pattern), scheme.k_stored(problem.k))
        return cls(packed, scheme, tensors.get("scale"), tensors.get("global_scale"))
