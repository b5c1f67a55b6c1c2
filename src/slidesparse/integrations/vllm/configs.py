"""What vLLM asks of a quantization configuration: which checkpoints are ours, and which of their layers."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from ...compat.vllm import (
    CompressedTensorsConfig,
    LinearBase,
    ParallelLMHead,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedLinearMethod,
)
from ...errors import UnsupportedError
from ...format import MARKER, QUANT_METHOD, PackedConfig, Scheme, scheme_named
from ...nn.source import text_of
from ..engine.claims import Claims, part_names
from .methods import DenseLinearMethod, PackedLinearMethod

_LOG = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own logger, whose handlers show it


class _Chosen:
    """What both configurations share: the name, and vLLM's way to choose them."""

    claims: Claims
    packed_modules_mapping: dict[str, list[str]]

    def get_name(self) -> str:
        """The name under which vLLM knows it."""
        return QUANT_METHOD

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, **kwargs: Any) -> str | None:
        """Take compressed-tensors checkpoints that are marked, unless the user says otherwise, and any other if the user says so."""
        if hf_quant_cfg.get("quant_method") != "compressed-tensors":
            return None
        marked = user_quant is None and isinstance(hf_quant_cfg.get(MARKER), dict)
        return QUANT_METHOD if marked or user_quant == QUANT_METHOD else None

    def _parts(self, prefix: str) -> tuple[str, ...]:
        return part_names(prefix, self.packed_modules_mapping)


class SlideSparseConfig(_Chosen, QuantizationConfig):
    """Packed checkpoints, and 16-bit dense ones whose weights obey a pattern (``packed`` is None)."""

    def __init__(self, packed: PackedConfig | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.claims = Claims.of_marker(None) if packed is None else Claims.of_packed(packed)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Read the ``quantization_config`` of config.json.

        Raises:
            CheckpointError: see `PackedConfig.from_dict`.
            UnsupportedError: nvfp4.
        """
        if config.get("quant_method") == "compressed-tensors":
            return MaskedCompressedTensorsConfig.from_config(config)
        packed = PackedConfig.from_dict(config)
        if packed.scheme.pair:
            raise UnsupportedError(f"{packed.scheme.name} checkpoints are not served by vLLM yet: run them with transformers")
        return cls(packed)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """16-bit twins carry their marker at the top of config.json."""
        if self.packed is None:
            self.claims = Claims.of_marker(getattr(hf_config, MARKER, None))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take vLLM's names for those of the checkpoint."""
        self.claims = self.claims.renamed(lambda name: next(iter(hf_to_vllm_mapper.apply_list([name])), None))

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """16-bit weights are multiplied by activations of their own type."""
        if self.packed is not None and not self.packed.scheme.dynamic:
            return [self.packed.scheme.dtype]
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The first with 2:4 tensor cores."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json tells everything."""
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ours for linear layers that do not stay dense; vLLM's own for everything else."""
        parts = self._parts(prefix)
        if isinstance(layer, ParallelLMHead) and self.packed is not None and not self._dense_head(prefix):
            raise UnsupportedError(f"{prefix} is packed, which vLLM cannot load: convert the checkpoint without it")
        if isinstance(layer, RoutedExperts):
            _report_experts()
        if not isinstance(layer, LinearBase):
            return None
        if self.claims.stays_dense(prefix, parts):
            return UnquantizedLinearMethod()
        if self.packed is None:
            return DenseLinearMethod(None, self.claims, prefix, parts)
        return PackedLinearMethod(self.packed.scheme, self.claims, prefix, parts)

    def _dense_head(self, prefix: str) -> bool:
        return self.claims.stays_dense(prefix, (prefix,)) or self.claims.stays_dense("lm_head", ("lm_head",))


class MaskedCompressedTensorsConfig(_Chosen, CompressedTensorsConfig):
    """compressed-tensors checkpoints: W8A8 linear layers are packed at load, everything else is done as vLLM does it."""

    claims = Claims()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedTensorsConfig:
        """Read the ``quantization_config`` of config.json, marked or not.

        Raises:
            CheckpointError: the marker is not of its form.
        """
        made = super().from_config(config)
        made.claims = Claims.of_marker(config[MARKER]) if MARKER in config else Claims()
        return made

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take vLLM's names for those of the checkpoint."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.claims = self.claims.renamed(lambda name: next(iter(hf_to_vllm_mapper.apply_list([name])), None))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ours for linear layers in W8A8, per channel or tensor, with dynamic symmetric activations per token."""
        if isinstance(layer, RoutedExperts):
            _report_experts()
        parts = self._parts(prefix)
        if isinstance(layer, LinearBase) and not self.transform_config and not self.claims.stays_dense(prefix, parts):
            arguments = self.get_scheme_dict(layer, prefix)
            scheme = _w8a8(arguments)
            if scheme is not None:
                return DenseLinearMethod(scheme, self.claims, prefix, parts, per_part=text_of(arguments["weights"].strategy) == "tensor")
            if arguments is not None:
                _report_other(prefix.rpartition(".")[2])
        return super().get_quant_method(layer, prefix)


def _w8a8(arguments: dict[str, Any] | None) -> Scheme | None:
    """The scheme that computes what compressed-tensors' arguments ask for, None if none does."""
    given = arguments or {}
    weights, inputs = given.get("weights"), given.get("input_activations")
    if weights is None or inputs is None or given.get("output_activations") is not None:
        return None
    kind = text_of(weights.type)
    asked = (weights.num_bits, weights.symmetric, weights.dynamic, inputs.num_bits, inputs.symmetric, inputs.dynamic)
    same = kind == text_of(inputs.type) and text_of(inputs.strategy) == "token" and text_of(weights.strategy) in ("channel", "tensor")
    if asked != (8, True, False, 8, True, True) or not same:
        return None
    return scheme_named({"int": "int8", "float": "fp8"}[kind])


@cache
def _report_experts() -> None:
    _LOG.warning("slidesparse: expert layers are not packed: they are loaded and run dense, as vLLM has them")


@cache
def _report_other(layer: str) -> None:
    _LOG.warning("slidesparse: %s is not W8A8 with dynamic symmetric activations per token: it runs as vLLM has it", layer)
