"""A linear layer that stores packed weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from threading import RLock
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..compat.torch import tracing_state
from ..errors import UnsupportedError, WeightError
from ..format import BLOCK, Packed, Scheme, packed_tensors, scheme_named
from ..gemm import MEMORY, Route, Runner, Weights, refuse_capture
from ..gemm.op import LAYER_GONE, handle, linear
from ..packing import check_packed, find_violation, pack, restore
from ..packing.checks import check_scale
from ..pattern import Pattern
from ..quantization import dequantize_nvfp4, nvfp4_global_scale, quantize_nvfp4, quantize_weight
from .restored import RestoredWeight

_ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)

_Stored = tuple[tuple[str, Tensor, int], ...]
"""Stored tensors by name, with their versions, which count what was written into them."""

_MAKING = RLock()
"""Held while a layer is made ready: threads whose first calls meet share its copies."""


class SlideSparseLinear(nn.Module):
    """y = x Wᵀ + b with W ``[out_features, in_features]`` packed: ``[..., K]`` → ``[..., N]``, out of the type that came in.

    Buffers, as in the stored form: ``weight_values``, ``weight_keep``, ``weight_scale`` (8-bit and nvfp4), ``weight_global_scale``
    (nvfp4); parameter ``bias [N]``. They hold no valid weights until loaded. What the fast path needs besides is derived from them on
    first use and is no part of the state. The buffers keep their types under ``.to(dtype)``, ``.half()`` and ``.float()``.

    8-bit schemes quantise activations per token and sum exactly (int8) or in float32 (fp8). With a 16-bit scheme, activations of the
    weights' own type go through one linear in that type; any other mixture, such as bfloat16 weights in a float32 model, is computed
    in float32, which holds both exactly, and rounded once to the activations' type. Gradients reach the activations, as those of a
    linear with `dense_weight`, and the bias, but not the packed weights; there are no second derivatives.

    Args:
        pattern: kept:group of the weights.
        scheme: how they are stored.
        dtype: type of the bias, the default dtype if not given.
        memory: ``fast`` keeps resident copies in the layouts that run best (on a GPU the packed weights then move to host memory),
            ``lean`` only the packed weights.

    Raises:
        ValueError: unknown scheme or memory policy, or K that pattern or scheme cannot hold.
    """

    weight_values: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, pattern: Pattern | str, scheme: Scheme | str,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None, memory: str = "fast",
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.pattern = Pattern.parse(pattern)
        self.scheme = scheme_named(scheme) if isinstance(scheme, str) else scheme
        if self.scheme.pair and in_features % BLOCK:
            raise ValueError(f"{self.scheme.name} needs in_features to be a multiple of {BLOCK}, got {in_features}")
        if memory not in MEMORY:
            raise ValueError(f"unknown memory policy {memory!r}: choose one of {', '.join(MEMORY)}")
        self.memory = memory
        self.route: str | None = None
        """A route that must run, ``LAYOUT``, ``LAYOUT:KERNEL`` or ``LAYOUT:KERNEL:VARIANT``; None lets the plan choose."""
        self.tokens: Collection[int] | None = None
        """The numbers of tokens that choose the layouts; None: all that the plan measured."""
        self.dtype = dtype or torch.get_default_dtype()
        """The type of the model around the layer, of `weight`."""
        self.weight_marks: dict[str, object] = {}
        """Attributes that every `weight` gets, for frameworks that mark tensors."""
        self.name = ""
        """The layer's name in its model, for error messages."""
        specs = packed_tensors(self.scheme, self.pattern, out_features, in_features)
        self._stored = tuple(spec.suffix for spec in specs)
        for spec in specs:
            self.register_buffer(spec.suffix, torch.zeros(spec.shape, dtype=spec.dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        self._made: tuple[Runner, _Stored] | None = None
        self._checked: tuple[tuple[ref[Tensor], int], ...] = ()
        self._named: Tensor = _name(self)

    @classmethod
    def from_packed(
        cls, packed: Packed, scheme: Scheme, *, pattern: Pattern | None = None, scale: Tensor | None = None,
        global_scale: Tensor | None = None, bias: Tensor | None = None, dtype: torch.dtype | None = None, memory: str = "fast",
    ) -> SlideSparseLinear:  # fmt: skip
        """A layer on packed tensors, which it shares; ``pattern`` is the layer's where it is not that of stored values (nvfp4).

        ``dtype`` is the model's; by default that of the bias, or of 16-bit values, or else the default dtype.

        Raises:
            WeightError: tensors that do not fit each other; see `check`.
        """
        k = packed.k * (2 if scheme.pair else 1)
        own = pattern or (replace(packed.pattern, unit=2) if scheme.pair else packed.pattern)
        dtype = dtype or (None if scheme.dynamic or scheme.pair else scheme.dtype) if bias is None else bias.dtype
        layer = cls(k, packed.n, bias is not None, pattern=own, scheme=scheme, dtype=dtype, device="meta", memory=memory)
        tensors = {"weight_values": packed.values, "weight_keep": packed.keep, "weight_scale": scale, "weight_global_scale": global_scale}
        for name in layer._stored:
            tensor = tensors[name]
            if tensor is None:
                raise WeightError(f"scheme {scheme.name} needs {name}")
            layer._buffers[name] = tensor.detach()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.check()
        return layer

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None = None, *, pattern: Pattern | str, scheme: Scheme | str, scale: Tensor | None = None,
        global_scale: Tensor | None = None, memory: str = "fast",
    ) -> SlideSparseLinear:  # fmt: skip
        """A layer from masked dense weights ``[N, K]``: floating point (quantised here), or the scheme's own values with their scales.

        Values with scales are 8-bit ``[N, K]`` with ``scale [N, 1]``, or nvfp4 pairs uint8 ``[N, K/2]`` with ``scale [N, K/16]`` and
        ``global_scale [1]``. Nothing is pruned.

        Raises:
            PatternError: a group has more non-zeros than the pattern keeps; names row, group and values.
            WeightError: NaN or Inf, a scale without which the weights mean nothing, or a value that does not fit 16 bits.
        """
        pattern = Pattern.parse(pattern)
        scheme = scheme_named(scheme) if isinstance(scheme, str) else scheme
        dtype = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else None
        weight = weight.detach()
        if scale is not None:
            scale = scale.detach() if scheme.pair else scale.detach().to(torch.float32)
        elif weight.dtype == scheme.dtype and (scheme.dynamic or scheme.pair):
            raise WeightError(f"{scheme.name} weights need their scale")
        else:
            if violation := find_violation(weight, replace(pattern, unit=2) if scheme.pair else pattern):
                raise violation  # before rounding hides it
            if scheme.pair:
                global_scale = torch.tensor([nvfp4_global_scale(float(weight.float().abs().amax()))], device=weight.device)
                weight, scale = quantize_nvfp4(weight, float(global_scale))
            else:
                weight, scale = quantize_weight(weight, scheme)
        packed = pack(weight, scheme.pattern_stored(pattern))
        tensors = {"scale": scale, "global_scale": global_scale, "bias": bias}
        return cls.from_packed(packed, scheme, pattern=pattern, **tensors, dtype=dtype, memory=memory)

    @property
    def packed(self) -> Packed:
        """The packed weights, in stored values."""
        values, keep = self._tensors["weight_values"], self._tensors["weight_keep"]
        return Packed(values, keep, self.scheme.pattern_stored(self.pattern), self.scheme.k_stored(self.in_features))

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        held = ((name, self._buffers[name]) for name in self._stored)
        return {name: tensor for name, tensor in held if tensor is not None}

    @property
    def resident_bytes(self) -> int:
        """Bytes kept besides the stored tensors."""
        return 0 if self._runner is None else self._runner.resident_bytes

    @property
    def routes(self) -> tuple[tuple[int, Route], ...]:
        """Who runs how many tokens at most, in rising order; empty before the first call."""
        return () if self._runner is None else self._runner.routes

    def dense_weight(self) -> Tensor:
        """The masked weights ``[N, K]`` with their scales applied, on the device that runs: float32, or the 16-bit scheme's own type."""
        held = self.packed
        device = self._running_on or held.values.device
        dense = restore(replace(held, values=held.values.to(device), keep=held.keep.to(device)))
        scales = {name: tensor.to(device) for name, tensor in self._tensors.items() if name.endswith("_scale")}
        if self.scheme.pair:
            return dequantize_nvfp4(dense, scales["weight_scale"], scales["weight_global_scale"])
        return dense.to(torch.float32) * scales["weight_scale"] if self.scheme.dynamic else dense

    @property
    def weight(self) -> Tensor:
        """`dense_weight` in the model's type, made anew at every access: for models that read a linear's weight besides calling it.

        It refuses to be written into, see `RestoredWeight`; under torch.compile it is a plain tensor.
        """
        with torch.inference_mode(False):  # tensors of that mode do not know when they were written into
            weight = self.dense_weight().to(self.dtype)
        return weight if torch.compiler.is_compiling() else RestoredWeight.of(weight, self._label, self.weight_marks)

    def check(self) -> None:
        """Check shapes, types, keep-bit counts and scales before anything indexes from them, once for every state of the tensors.

        Raises:
            WeightError: names the layer and what is wrong.
        """
        state = self._state()
        if state and len(self._checked) == len(state):
            pairs = zip(state, self._checked, strict=True)
            if all(now() is then() and version == checked for (now, version), (then, checked) in pairs):
                return
        held = self._tensors
        for spec in packed_tensors(self.scheme, self.pattern, self.out_features, self.in_features):
            found = held[spec.suffix]
            if found.dtype != spec.dtype or tuple(found.shape) != spec.shape:
                raise WeightError(
                    f"{self._label}: {spec.suffix} is {found.dtype} {list(found.shape)}, {self.scheme.name} {self.pattern} "
                    f"[{self.out_features}, {self.in_features}] needs {spec.dtype} {list(spec.shape)}"
                )
        try:
            check_packed(self.packed, held["weight_scale"] if self.scheme.dynamic else None)
            if self.scheme.pair:
                scale = held["weight_scale"]
                check_scale(scale, (scale.shape[0], scale.shape[1]), zero_allowed=True)
                check_scale(held["weight_global_scale"].view(1, -1), (1, 1), "weight_global_scale")
        except WeightError as error:
            raise WeightError(f"{self._label}: {error}") from error
        self._checked = state

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` bfloat16, float16 or float32 → ``[..., N]`` of the same type.

        Raises:
            ValueError: another last dimension or type.
            WeightError: the packed tensors are damaged or were never loaded (checked on first use).
            UnsupportedError: the route asked for cannot run this.
        """
        if tracing_state():  # torch.jit.trace records ops, and sizes as tensors
            return linear(x.reshape(-1, self.in_features), self._named, self.bias, self.out_features).view(*x.shape[:-1], self.out_features)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self._label}: input has {x.shape[-1]} features, the layer takes {self.in_features}")
        if x.dtype not in _ACTIVATIONS:
            raise ValueError(f"{self._label}: input is {x.dtype}; bfloat16, float16 and float32 are taken")
        if x.dim() != 2:  # views cost host time, so none is made in vain
            return self.forward(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        if torch.compiler.is_compiling():
            return linear(x, self._named, self.bias, self.out_features)
        bias = self._parameters.get("bias")  # the attribute of a parameter costs more host time than the rest of this function
        return self._ready(x.dtype, x.device)(x, self.bias if bias is None else bias)

    def prepare(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make what the first call with activations of this type on this device would make: routes and resident copies.

        Raises:
            WeightError: the packed tensors are damaged or were never loaded.
            UnsupportedError: the route asked for cannot run this.
        """
        device = torch.empty(0, device=device).device
        self._ready(dtype, device).prepare(dtype, device, None if self.bias is None else self.bias.dtype)

    def extra_repr(self) -> str:
        """in_features, out_features, bias, pattern, scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, scheme={self.scheme.name}"
        )

    @property
    def _label(self) -> str:
        return f"layer {self.name}" if self.name else f"SlideSparseLinear({self.in_features}, {self.out_features})"

    @property
    def _running_on(self) -> torch.device | None:
        """The device of the last call's activations; None before the first call."""
        return None if self._runner is None or self._runner.ready is None else self._runner.ready.device

    @property
    def _runner(self) -> Runner | None:
        return None if self._made is None else self._made[0]

    def _ready(self, dtype: torch.dtype, device: torch.device) -> Runner:
        """The runner for the stored tensors as they are now: loaders replace them, casts move them, others write into them.

        Raises:
            UnsupportedError: a stored tensor is to have a gradient.
        """
        made, held = self._made, self._buffers
        values, scale = held["weight_values"], held.get("weight_scale")
        if (values is not None and values.requires_grad) or (scale is not None and scale.requires_grad):
            name = next(name for name, tensor in self._tensors.items() if tensor.requires_grad)
            raise UnsupportedError(f"{self._label}: packed weights take no gradient: call {name}.requires_grad_(False)")
        if made is not None:
            runner, stored = made
            for name, tensor, version in stored:
                if held[name] is not tensor or tensor._version != version:
                    break
            else:
                if (runner.asked, runner.memory, runner.tokens) == (self.route, self.memory, self.tokens):
                    return runner
        return self._made_ready(made, dtype, device)

    def _made_ready(self, made: tuple[Runner, _Stored] | None, dtype: torch.dtype, device: torch.device) -> Runner:
        """A new runner, made ready for these types. Packed weights that no route reads are then in host memory.

        An offloaded layer, whose stored tensors come for a call and go after it, keeps no copies: its packed weights run. They are checked
        in the first call.
        """
        refuse_capture()
        with _MAKING:
            if self._made is not made:  # another thread was faster
                return self._ready(dtype, device)
            offloaded = self._offloaded
            if not offloaded:
                for name, tensor in self._tensors.items():  # outside inference mode tensors know when they were written into
                    self._buffers[name] = _tracked(tensor)
            if not (offloaded and self._checked):
                self.check()
            held = self._tensors
            weights = Weights(self.packed, self.scheme, held.get("weight_scale"), held.get("weight_global_scale"))
            self._let_go()  # the copies of before go before others are made
            made = None
            runner = Runner(weights, memory="lean" if offloaded else self.memory, route=self.route, tokens=self.tokens)
            runner.prepare(dtype, device, None if self.bias is None else self.bias.dtype)
            if not offloaded:
                self._buffers |= {"weight_values": runner.weights.packed.values, "weight_keep": runner.weights.packed.keep}
                self._checked = self._state()
                self._made = runner, tuple((name, tensor, tensor._version) for name, tensor in self._tensors.items())
        return runner

    def _let_go(self) -> None:
        """Give up the copies, once no stream reads them.

        Compiled graphs, which save the layer's name for their backward pass, have torch refuse this pass: it would read other weights.
        """
        made, self._made = self._made, None
        if made is not None:
            made[0].let_go()
            if not self._named.is_inference():
                increment_version(self._named)

    @property
    def _offloaded(self) -> bool:
        """Whether a hook of accelerate's brings the stored tensors for every call and takes them away after it."""
        hook = self.__dict__.get("_hf_hook")
        return any(getattr(one, "offload", False) and getattr(one, "offload_buffers", False) for one in (hook, *getattr(hook, "hooks", ())))

    def _state(self) -> tuple[tuple[ref[Tensor], int], ...]:
        """The stored tensors and how often each was written into; nothing where that is not known."""
        held = self._tensors.values()
        return () if any(tensor.is_inference() for tensor in held) else tuple((ref(tensor), tensor._version) for tensor in held)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlideSparseLinear:
        """Move, but never cast, the stored tensors. Where the layer already runs on that device, nothing moves and copies stay."""
        before, device = self._tensors, self._running_on
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        stays = device is not None and fn(torch.empty(0, device=device)).device == device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, after in self._tensors.items():
            if stays:
                self._buffers[name] = before[name]
            elif after.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(after.device)
        if not stays:
            self._let_go()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._let_go()
        self._checked = ()  # where tensors are offloaded, only this tells that they are others

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None, "_checked": (), "_named": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self._named = _name(self)


def _tracked(tensor: Tensor) -> Tensor:
    """The tensor, or where it was made in inference mode, a copy of it that counts what is written into it."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _name(layer: SlideSparseLinear) -> Tensor:
    """The tensor that names the layer to compilers, which does not keep the layer alive."""
    found = ref(layer)

    def ready(dtype: torch.dtype, device: torch.device) -> Runner:
        layer = found()
        if layer is None:
            raise UnsupportedError(LAYER_GONE)
        return layer._ready(dtype, device)

    return handle(layer, ready)
