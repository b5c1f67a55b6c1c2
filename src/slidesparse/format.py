"""What is on disk, versioned: schemes, tensor names and shapes, and the ``quantization_config`` of config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .errors import CheckpointError
from .pattern import Pattern
from .select import matches

QUANT_METHOD = "slidesparse"
VERSION = 1
MARKER = "slidesparse"
"""Key under which the portable dense twin names its pattern."""

BLOCK = 16
"""Weights per block scale of nvfp4."""

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers of one module that serving engines merge into one, which has one pattern, by the last part of the names."""


@dataclass(frozen=True)
class Scheme:
    """How a linear's weights are stored and its activations quantised.

    ``dtype`` is that of ``weight_values``; ``bound`` is Q of symmetric 8-bit quantisation (None: nothing is quantised per row);
    ``pair`` says that one stored value holds two weights along K.
    """

    name: str
    dtype: torch.dtype
    bound: float | None = None
    pair: bool = False

    @property
    def dynamic(self) -> bool:
        """Activations are quantised per token to ``dtype`` before the GEMM."""
        return self.bound is not None

    @cached_property
    def largest(self) -> float:
        """The bound Q of a scheme that quantises rows.

        Raises:
            ValueError: the scheme does not.
        """
        if self.bound is None:
            raise ValueError(f"scheme {self.name} does not quantise rows")
        return self.bound

    def k_stored(self, k: int) -> int:
        """Stored values in a dense row of ``k`` weights."""
        return k // 2 if self.pair else k

    def pattern_stored(self, pattern: Pattern) -> Pattern:
        """The pattern as it applies to stored values: for nvfp4 one value is one pair, so the unit becomes 1."""
        return Pattern(pattern.kept, pattern.group, pattern.n, pattern.l) if self.pair else pattern


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", torch.int8, bound=127.0),
        Scheme("fp8", torch.float8_e4m3fn, bound=448.0),
        Scheme("bf16", torch.bfloat16),
        Scheme("fp16", torch.float16),
        Scheme("nvfp4", torch.uint8, pair=True),
    )
}

FP32, FP64 = Scheme("fp32", torch.float32), Scheme("fp64", torch.float64)
"""Types without a packed form, so not among `SCHEMES`: 32-bit weights are read and pruned, 64-bit ones read and cast."""


def scheme_named(name: str) -> Scheme:
    """Look a scheme up.

    Raises:
        ValueError: unknown name.
    """
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}: choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def scheme_of_dtype(dtype: torch.dtype) -> Scheme | None:
    """The scheme whose stored dtype is ``dtype``, None if there is none (float32 must be cast first)."""
    return next((scheme for scheme in SCHEMES.values() if scheme.dtype == dtype and not scheme.pair), None)


@dataclass
class Packed:
    """One packed weight matrix (or a block of its rows): kept values in K order and one keep-bit per position.

    values ``[N, ceil(K/group)·kept]``, keep uint8 ``[N, ceil(ceil(K/group)·group/8)]``; ``k`` counts stored values of a dense row.
    """

    values: torch.Tensor
    keep: torch.Tensor
    pattern: Pattern
    k: int

    @property
    def n(self) -> int:
        """Rows (output features)."""
        return self.values.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of values and keep-bits together."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.keep))


@dataclass(frozen=True)
class TensorSpec:
    """Name suffix, dtype and shape of one stored tensor of a layer."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def dense_tensors(scheme: Scheme, n: int, k: int) -> tuple[TensorSpec, ...]:
    """Tensors of a dense ``[n, k]`` layer of a scheme, in compressed-tensors' names."""
    suffix = "weight_packed" if scheme.pair else "weight"
    return (TensorSpec(suffix, scheme.dtype, (n, scheme.k_stored(k))), *_scale_tensors(scheme, n, k))


def packed_tensors(scheme: Scheme, pattern: Pattern, n: int, k: int) -> tuple[TensorSpec, ...]:
    """Tensors of a packed ``[n, k]`` layer: ``weight_values``, ``weight_keep`` and, when quantised, the scales."""
    stored, k_stored = scheme.pattern_stored(pattern), scheme.k_stored(k)
    return (
        TensorSpec("weight_values", scheme.dtype, (n, stored.packed_k(k_stored))),
        TensorSpec("weight_keep", torch.uint8, (n, stored.keep_bytes(k_stored))),
        *_scale_tensors(scheme, n, k),
    )


def _scale_tensors(scheme: Scheme, n: int, k: int) -> tuple[TensorSpec, ...]:
    if scheme.dynamic:
        return (TensorSpec("weight_scale", torch.float32, (n, 1)),)
    if scheme.pair:
        return (
            TensorSpec("weight_scale", torch.float8_e4m3fn, (n, k // BLOCK)),
            TensorSpec("weight_global_scale", torch.float32, (1,)),
        )
    return ()


@dataclass
class PackedConfig:
    """The ``quantization_config`` of a packed checkpoint: everything a loader needs besides the tensors.

    ``ignore`` lists layers (names, globs, or regular expressions behind ``re:``) that stay dense; ``overrides`` gives single layers
    another pattern; ``in_features`` gives K of each layer whose last group is ragged, which the stored shapes do not tell.
    """

    pattern: Pattern
    scheme: Scheme
    ignore: list[str] = field(default_factory=list)
    overrides: dict[str, Pattern] = field(default_factory=dict)
    in_features: dict[str, int] = field(default_factory=dict)
    version: int = VERSION

    def pattern_of(self, layer: str) -> Pattern:
        """The pattern of one layer."""
        return self.overrides.get(layer, self.pattern)

    def ignores(self, layer: str) -> bool:
        """Whether the layer stays dense."""
        return matches(layer, self.ignore)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        scheme = self.scheme
        strategy = "channel" if scheme.dynamic else "tensor_group" if scheme.pair else None
        weights: dict[str, Any] = {"dtype": scheme.name}
        if strategy:
            weights |= {"strategy": strategy, "symmetric": True}
        activations = {"dtype": scheme.name, "strategy": "token", "dynamic": True, "symmetric": True} if scheme.dynamic else None
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            "pattern": str(self.pattern),
            "weights": weights,
            "activations": activations,
            "ignore": list(self.ignore),
            "overrides": {layer: str(pattern) for layer, pattern in self.overrides.items()},
            "in_features": dict(self.in_features),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PackedConfig:
        """Read the JSON form.

        Raises:
            CheckpointError: a newer version, or an entry that is missing or of the wrong kind; the message names it.
        """
        version = data.get("version")
        if type(version) is not int or version < 1:
            raise CheckpointError(f"quantization_config.version must be a positive integer, got {version!r}")
        if version > VERSION:
            raise CheckpointError(
                f"checkpoint format version {version} is newer than this slidesparse reads ({VERSION}): upgrade slidesparse"
            )
        weights = data.get("weights")
        if not isinstance(weights, dict) or not isinstance(weights.get("dtype"), str):
            raise CheckpointError(f"quantization_config.weights must be an object with a dtype, got {weights!r}")
        ignore, overrides, in_features = data.get("ignore") or [], data.get("overrides") or {}, data.get("in_features") or {}
        if not isinstance(ignore, list) or not all(isinstance(entry, str) for entry in ignore):
            raise CheckpointError(f"quantization_config.ignore must be a list of layer names, got {ignore!r}")
        for key, table, kind in (("overrides", overrides, str), ("in_features", in_features, int)):
            if not isinstance(table, dict) or not all(type(value) is kind and value for value in table.values()):
                raise CheckpointError(f"quantization_config.{key} must map layer names to {kind.__name__}, got {table!r}")
        try:
            scheme = scheme_named(weights["dtype"])
            pattern = Pattern.parse(data.get("pattern", ""))
            parsed = {layer: Pattern.parse(text) for layer, text in overrides.items()}
        except ValueError as error:
            raise CheckpointError(f"quantization_config: {error}") from error
        if any(value < 1 for value in in_features.values()):
            raise CheckpointError(f"quantization_config.in_features must be positive, got {in_features!r}")
        for text in (pattern, *parsed.values()):
            if scheme.pair and text.unit != 2:
                raise CheckpointError(
                    f"quantization_config: {scheme.name} stores pairs of weights, pattern {text} is one of single weights"
                )
        found = cls(pattern, scheme, list(ignore), parsed, dict(in_features), version)
        _refuse_other_arithmetic(data, found.to_dict(), scheme)
        return found


def _refuse_other_arithmetic(data: dict[str, Any], known: dict[str, Any], scheme: Scheme) -> None:
    """What a config says of weights and activations must be what layers compute; what it leaves out is."""
    for part in ("weights", "activations"):
        given, own = data.get(part, known[part]), known[part]
        if not isinstance(given, dict) or own is None:
            wrong = {} if given == own else {f"quantization_config.{part}": (given, own)}
        else:
            pairs = {name: (value, own.get(name)) for name, value in given.items()}
            wrong = {f"quantization_config.{part}.{name}": pair for name, pair in pairs.items() if pair[0] != pair[1]}
        for name, (value, needed) in wrong.items():
            raise CheckpointError(f"{name} is {value!r}, which is not implemented: {scheme.name} layers compute with {needed!r}")


def merged_name(layer: str) -> str:
    """The name of the layer that serving engines merge this one into (``….q_proj`` → ``….qkv_proj``); its own if they do not."""
    head, dot, last = layer.rpartition(".")
    return next((f"{head}{dot}{whole}" for whole, parts in MERGED.items() if last in parts), layer)
