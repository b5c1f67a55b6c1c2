"""Reading a dense linear layer: plain 16- or 32-bit weights, or the quantised ones that compressed-tensors leaves in nn.Linear."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..format import BLOCK, SCHEMES, Scheme, scheme_of_dtype
from ..pattern import Pattern


class NotConvertible(Exception):
    """A layer stays dense, and why; ``fault`` where an explicit request should fail instead."""

    def __init__(self, reason: str, *, fault: bool = False) -> None:
        super().__init__(reason)
        self.fault = fault


@dataclass(frozen=True)
class DenseSource:
    """A linear's weights ``[N, K]`` (nvfp4: pairs uint8 ``[N, K/2]``), their scales if they are quantised, the scheme to store them in."""

    module: nn.Linear
    weight: Tensor
    scheme: Scheme
    scale: Tensor | None = None
    global_scale: Tensor | None = None

    def pattern_stored(self, pattern: Pattern) -> Pattern:
        """The pattern as it applies to `weight`: pairs count as one only where they are stored as one."""
        if self.scheme.pair and self.scale is None:
            return self.pattern_as_named(pattern)
        return self.scheme.pattern_stored(pattern)

    def pattern_as_named(self, pattern: Pattern) -> Pattern:
        """The pattern as the layer names it: that of pairs where the scheme stores pairs."""
        return replace(pattern, unit=2) if self.scheme.pair else pattern


def read_linear(module: nn.Linear, target: Scheme | None, *, tied: bool) -> DenseSource:
    """The weights of a linear layer, to be stored as ``target`` (None: as they are).

    Raises:
        NotConvertible: says why the layer has to stay as it is.
    """
    if type(module) is not nn.Linear:
        raise NotConvertible(f"is a {type(module).__name__}, not a plain nn.Linear")
    if tied:
        raise NotConvertible("shares its weight with another layer")
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotConvertible("has forward hooks, which the packed layer would lose")
    weight = module._parameters.get("weight")
    stored = weight if weight is not None else getattr(module, "weight_packed", None)
    if stored is None:
        raise NotConvertible("has no weight")
    if stored.device.type == "meta":
        raise NotConvertible("has no data yet (meta device)")
    if stored.dtype in (torch.bfloat16, torch.float16, torch.float32):
        scheme = target or scheme_of_dtype(stored.dtype)
        if scheme is None:
            raise NotConvertible("float32 weights have no stored form: pass scheme='bf16', 'fp16', 'int8' or 'fp8'", fault=True)
        if scheme.pair and module.in_features % BLOCK:
            raise NotConvertible(f"K = {module.in_features} is not a multiple of {BLOCK}, which {scheme.name} needs", fault=True)
        return DenseSource(module, stored.detach(), scheme)
    return _quantized(module, stored.detach(), target)


def _quantized(module: nn.Linear, weight: Tensor, target: Scheme | None) -> DenseSource:
    pair = weight.dtype == torch.uint8
    scheme = SCHEMES["nvfp4"] if pair else scheme_of_dtype(weight.dtype)
    scale = getattr(module, "weight_scale", None)
    if scheme is None or scale is None:
        raise NotConvertible(f"holds {weight.dtype} weights without a scale that says what they mean", fault=True)
    if target is not None and target is not scheme:
        raise NotConvertible(f"is already quantised as {scheme.name}, {target.name} was asked for", fault=True)
    _check_arithmetic(module, scheme)
    scale, n = scale.detach(), weight.shape[0]
    if pair:
        global_scale = getattr(module, "weight_global_scale", None)
        if global_scale is None or scale.dtype != torch.float8_e4m3fn or tuple(scale.shape) != (n, module.in_features // BLOCK):
            raise NotConvertible("is packed in 4 bits, but not as NVFP4", fault=True)
        return DenseSource(module, weight, scheme, scale, global_scale.detach().to(torch.float32).reshape(1))
    if scale.numel() not in (1, n):
        raise NotConvertible(f"has scales {list(scale.shape)}; one per output channel is supported", fault=True)
    return DenseSource(module, weight, scheme, scale.to(torch.float32).reshape(-1, 1).expand(n, 1).contiguous())


def _check_arithmetic(module: nn.Linear, scheme: Scheme) -> None:
    """compressed-tensors says on the module how activations are quantised; only what our schemes compute may be swapped."""
    zero_point = getattr(module, "weight_zero_point", None)
    if zero_point is not None and bool((zero_point.detach().float() != 0).any()):
        raise NotConvertible("has weights with zero points", fault=True)
    arguments = getattr(module, "quantization_scheme", None)
    if arguments is None:
        return
    inputs = arguments.input_activations
    if scheme.pair:
        if inputs is not None:
            raise NotConvertible("quantises its activations to 4 bits; NVFP4 weights with 16-bit activations are supported", fault=True)
        return
    kind = "int" if scheme.dtype == torch.int8 else "float"
    found = None if inputs is None else (inputs.num_bits, text_of(inputs.type), text_of(inputs.strategy), inputs.symmetric, inputs.dynamic)
    if found != (8, kind, "token", True, True):
        described = "leaves its activations as they are" if inputs is None else f"quantises activations as {found}"
        raise NotConvertible(f"{described}; dynamic symmetric per-token {kind} 8-bit is supported", fault=True)


def text_of(value: Any) -> str:
    """What compressed-tensors means by a value: the text itself, or a member of an enumeration."""
    return str(getattr(value, "value", value))
