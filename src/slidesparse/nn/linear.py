"""A linear layer that stores packed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightError
from ..format import BLOCK, Packed, Scheme, packed_tensors, scheme_named
from ..gemm import MEMORY, Choice, Execution, Weights, refuse_capture
from ..pack import check_packed, pack, restore
from ..pack.checks import check_scale
from ..pattern import Pattern
from ..quant import dequantize_nvfp4, nvfp4_global_scale, quantize_nvfp4, quantize_weight

_ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)


class SlideSparseLinear(nn.Module):
    """y = x Wᵀ + b with W ``[out_features, in_features]`` packed: ``[..., K]`` → ``[..., N]``, out of the type that came in.

    Buffers, as in the stored form: ``weight_values``, ``weight_keep``, ``weight_scale`` (8-bit and nvfp4), ``weight_global_scale``
    (nvfp4); parameter ``bias [N]``. They hold no valid weights until loaded. What the fast path needs besides is derived from them on
    first use and is no part of the state. The buffers keep their types under ``.to(dtype)``, ``.half()`` and ``.float()``.

    8-bit schemes quantise activations per token and sum exactly (int8) or in float32 (fp8). With a 16-bit scheme, activations of the
    weights' own type go through one linear in that type; any other mixture, such as bfloat16 weights in a float32 model, is computed
    in float32, which holds both exactly, and rounded once to the activations' type. For inference: 8-bit layers pass no gradients.

    Args:
        pattern: kept:group of the weights.
        scheme: how they are stored.
        dtype: type of the bias, the default dtype if not given.
        memory: ``fast`` keeps resident copies in the layouts that run best (on a GPU the packed weights then move to host memory),
            ``lean`` only the packed weights.

    Raises:
        ValueError: unknown scheme or memory policy, or K that pattern or scheme cannot hold.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: Pattern | str,
        scheme: Scheme | str,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        memory: str = "fast",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.pattern = Pattern.parse(pattern)
        self.scheme = scheme_named(scheme) if isinstance(scheme, str) else scheme
        if self.scheme.pair and in_features % BLOCK:
            raise ValueError(f"{self.scheme.name} needs in_features to be a multiple of {BLOCK}, got {in_features}")
        if memory not in MEMORY:
            raise ValueError(f"unknown memory policy {memory!r}: choose one of {', '.join(MEMORY)}")
        self.memory = memory
        self.backend: str | None = None
        """A backend that must run, for measurements; None lets the registry choose."""
        self.name = ""
        """The layer's name in its model, for error messages."""
        specs = packed_tensors(self.scheme, self.pattern, out_features, in_features)
        self._stored = tuple(spec.suffix for spec in specs)
        for spec in specs:
            self.register_buffer(spec.suffix, torch.zeros(spec.shape, dtype=spec.dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        self._execution: Execution | None = None

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        scheme: Scheme,
        *,
        pattern: Pattern | None = None,
        scale: Tensor | None = None,
        global_scale: Tensor | None = None,
        bias: Tensor | None = None,
        memory: str = "fast",
    ) -> SlideSparseLinear:
        """A layer on packed tensors, which it shares; ``pattern`` is the layer's where it is not that of stored values (nvfp4).

        Raises:
            WeightError: tensors that do not fit each other; see `check`.
        """
        k = packed.k * (2 if scheme.pair else 1)
        own = pattern or (replace(packed.pattern, unit=2) if scheme.pair else packed.pattern)
        dtype = None if bias is None else bias.dtype
        layer = cls(k, packed.n, bias is not None, pattern=own, scheme=scheme, dtype=dtype, device="meta", memory=memory)
        tensors = {"weight_values": packed.values, "weight_keep": packed.keep, "weight_scale": scale, "weight_global_scale": global_scale}
        for name in layer._stored:
            if tensors[name] is None:
                raise WeightError(f"scheme {scheme.name} needs {name}")
            layer._buffers[name] = tensors[name].detach()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.check()
        return layer

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        pattern: Pattern | str,
        scheme: Scheme | str,
        scale: Tensor | None = None,
        global_scale: Tensor | None = None,
        memory: str = "fast",
    ) -> SlideSparseLinear:
        """A layer from masked dense weights ``[N, K]``: floating point (quantised here), or the scheme's own values with their scales.

        Values with scales are 8-bit ``[N, K]`` with ``scale [N, 1]``, or nvfp4 pairs uint8 ``[N, K/2]`` with ``scale [N, K/16]`` and
        ``global_scale [1]``. Nothing is pruned.

        Raises:
            PatternError: a group has more non-zeros than the pattern keeps; names row, group and values.
            WeightError: NaN or Inf, a scale without which the weights mean nothing, or a value that does not fit 16 bits.
        """
        pattern = Pattern.parse(pattern)
        scheme = scheme_named(scheme) if isinstance(scheme, str) else scheme
        weight = weight.detach()
        if scale is not None:
            scale = scale.detach() if scheme.pair else scale.detach().to(torch.float32)
        elif weight.dtype == scheme.dtype and (scheme.dynamic or scheme.pair):
            raise WeightError(f"{scheme.name} weights need their scale")
        elif scheme.pair:
            pack(weight, replace(pattern, unit=2))  # before rounding hides a violation
            global_scale = torch.tensor([nvfp4_global_scale(float(weight.float().abs().amax()))], device=weight.device)
            weight, scale = quantize_nvfp4(weight, float(global_scale))
        else:
            pack(weight, pattern)
            weight, scale = quantize_weight(weight, scheme)
        packed = pack(weight, scheme.pattern_stored(pattern))
        return cls.from_packed(packed, scheme, pattern=pattern, scale=scale, global_scale=global_scale, bias=bias, memory=memory)

    @property
    def packed(self) -> Packed:
        """The packed weights, in stored values."""
        return Packed(
            self._buffers["weight_values"],
            self._buffers["weight_keep"],
            self.scheme.pattern_stored(self.pattern),
            self.scheme.k_stored(self.in_features),
        )

    @property
    def resident_bytes(self) -> int:
        """Bytes kept besides the stored tensors."""
        return 0 if self._execution is None else self._execution.resident_bytes

    @property
    def routes(self) -> tuple[tuple[int, Choice], ...]:
        """Who runs how many tokens at most, in rising order; empty before the first call."""
        return () if self._execution is None else self._execution.steps

    def dense_weight(self) -> Tensor:
        """The masked weights ``[N, K]`` with their scales applied, on the device that runs: float32, or the 16-bit scheme's own type."""
        device = self.packed.values.device if self._execution is None else self._execution.device
        held = self.packed
        dense = restore(replace(held, values=held.values.to(device), keep=held.keep.to(device)))
        scale = self._buffers.get("weight_scale")
        if self.scheme.pair:
            return dequantize_nvfp4(dense, scale.to(device), self._buffers["weight_global_scale"].to(device))
        return dense.to(torch.float32) * scale.to(device) if self.scheme.dynamic else dense

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, made anew at every access: for models that read a linear's weight besides calling it."""
        return self.dense_weight()

    def check(self) -> None:
        """Check shapes, types, keep-bit counts and scales before anything indexes from them.

        Raises:
            WeightError: names the layer and what is wrong.
        """
        for spec in packed_tensors(self.scheme, self.pattern, self.out_features, self.in_features):
            found = self._buffers[spec.suffix]
            if found.dtype != spec.dtype or tuple(found.shape) != spec.shape:
                raise WeightError(
                    f"{self._label}: {spec.suffix} is {found.dtype} {list(found.shape)}, {self.scheme.name} {self.pattern} "
                    f"[{self.out_features}, {self.in_features}] needs {spec.dtype} {list(spec.shape)}"
                )
        scale, global_scale = self._buffers.get("weight_scale"), self._buffers.get("weight_global_scale")
        try:
            check_packed(self.packed, scale if self.scheme.dynamic else None)
            if self.scheme.pair:
                check_scale(scale, tuple(scale.shape), zero_allowed=True)
                check_scale(global_scale.view(1, -1), (1, 1), "weight_global_scale")
        except WeightError as error:
            raise WeightError(f"{self._label}: {error}") from error

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` bfloat16, float16 or float32 → ``[..., N]`` of the same type.

        Raises:
            ValueError: another last dimension or type.
            WeightError: the packed tensors are damaged or were never loaded (checked on first use).
            UnsupportedError: the backend asked for cannot run this.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self._label}: input has {x.shape[-1]} features, the layer takes {self.in_features}")
        if x.dtype not in _ACTIVATIONS:
            raise ValueError(f"{self._label}: input is {x.dtype}; bfloat16, float16 and float32 are taken")
        if x.dim() != 2:  # views cost host time, so none is made in vain
            return self.forward(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        execution = self._ready()
        y = execution(x, self.bias)
        if not torch.compiler.is_compiling():
            self._release(execution)
        return y

    def prepare(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make what the first call with activations of this type on this device would make: routes and resident copies.

        Raises:
            WeightError: the packed tensors are damaged or were never loaded.
            UnsupportedError: the backend asked for cannot run this.
        """
        bias = None if self.bias is None else self.bias.dtype
        execution = self._ready()
        execution.prepare(dtype, torch.empty(0, device=device).device, bias)
        self._release(execution)

    def extra_repr(self) -> str:
        """in_features, out_features, bias, pattern, scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, scheme={self.scheme.name}"
        )

    @property
    def _label(self) -> str:
        return f"layer {self.name}" if self.name else f"SlideSparseLinear({self.in_features}, {self.out_features})"

    def _ready(self) -> Execution:
        """The execution for the buffers as they are now: loaders replace them, casts move them."""
        execution, held = self._execution, self._buffers
        scale, global_scale = held.get("weight_scale"), held.get("weight_global_scale")
        if (
            execution is None
            or execution.weights.packed.values is not held["weight_values"]
            or execution.weights.packed.keep is not held["weight_keep"]
            or execution.weights.scale is not scale
            or execution.weights.global_scale is not global_scale
            or (execution.backend, execution.memory) != (self.backend, self.memory)
        ):
            refuse_capture()
            self.check()
            weights = Weights(self.packed, self.scheme, scale, global_scale)
            execution = self._execution = Execution(weights, memory=self.memory, backend=self.backend)
        return execution

    def _release(self, execution: Execution) -> None:
        """Let the packed weights go to host memory once resident copies on a GPU serve every call."""
        moved = execution.release()
        if moved is not None:
            self._buffers["weight_values"], self._buffers["weight_keep"] = moved.packed.values, moved.packed.keep

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlideSparseLinear:
        """Move, but never cast, the stored tensors. Where the layer already runs on that device, nothing moves and copies stay."""
        before, execution = {name: self._buffers[name] for name in self._stored}, self._execution
        stays = execution is not None and fn(torch.empty(0, device=execution.device)).device == execution.device
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            if stays:
                self._buffers[name] = tensor
            elif after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        if not stays:
            self._execution = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._execution = None  # values may have been copied in place

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_execution": None}
