"""vLLM serves packed checkpoints, portable dense twins and masked dense checkpoints, through its entry point for plugins.

vLLM loads this module in every process (entry point ``vllm.general_plugins``) and calls `register`, which makes the quantization
method ``slidesparse`` known. A tensor-parallel rank holds the rows or columns that vLLM gives it, exactly, and quantises its own
activations. Expert layers, embeddings and heads run as vLLM has them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import vllm
from torch import Tensor, nn

from ..errors import PatternError, UnsupportedError, WeightError
from ..format import MARKER, QUANT_METHOD, Packed, PackedConfig, Scheme, packed_tensors, scheme_named
from ..gemm import Execution, Weights
from ..gemm.prepared import linear, prepare, warm
from ..pack import Shard
from ..quant import scheme_of_dtype
from .claims import Claims, check_version, part_names
from .rank_weights import blank, cut, made_up, pack

check_version(vllm.__version__)

# Only now: of an older vLLM, these could fail with a less helpful message.
from vllm.config import get_current_vllm_config_or_none  # noqa: E402
from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.linear import (  # noqa: E402
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config  # noqa: E402
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter  # noqa: E402

_LOG = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own logger, whose handlers show it


@dataclass(frozen=True)
class Settings:
    """What the user set under ``slidesparse`` in vLLM's ``additional_config``, and what the adapter needs of the rest.

    ``memory`` and ``backend`` are those of `Execution`; ``random`` weights take the place of a checkpoint's (``--load-format dummy``);
    ``captured`` are the numbers of tokens for which vLLM captures CUDA graphs.
    """

    memory: str = "fast"
    backend: str | None = None
    random: bool = False
    captured: tuple[int, ...] = ()

    @classmethod
    def current(cls) -> Settings:
        """Those of the model that is being built.

        Raises:
            UnsupportedError: an unknown setting.
        """
        config = get_current_vllm_config_or_none()
        if config is None:
            return cls()
        additional = config.additional_config
        chosen = dict((additional.get(QUANT_METHOD) if isinstance(additional, dict) else None) or {})
        if unknown := chosen.keys() - {"memory", "backend"}:
            raise UnsupportedError(f"additional_config.slidesparse knows memory and backend, not {', '.join(sorted(unknown))}")
        sizes = tuple(config.compilation_config.cudagraph_capture_sizes or ())
        return cls(**chosen, random=str(config.load_config.load_format) == "dummy", captured=sizes)


class PackedParameter(ModelWeightParameter):
    """Stored values or keep-bits: rows are split as vLLM splits them, columns into the groups that the rank's shard touches."""

    def __init__(self, *, shard: Shard, bits: bool, **kwargs: Any) -> None:
        super().__init__(input_dim=1, output_dim=0, **kwargs)
        self._part = shard.keep if bits else shard.values

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Load the rank's part of every row."""
        self._assert_and_load(self._part(loaded_weight))


class SlideSparseLinearMethod(LinearMethodBase):
    """A linear layer on prepared weights; subclasses say in which form the checkpoint holds them."""

    def __init__(self, claims: Claims, layer: str, parts: tuple[str, ...]) -> None:
        self.claims, self.layer, self.parts = claims, layer, parts
        self.settings = Settings.current()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., K]`` → ``[..., N]``."""
        n = layer.slidesparse_outputs
        if x.dim() == 2:
            return linear(x, layer.slidesparse_name, bias, n)
        return linear(x.reshape(-1, x.shape[-1]), layer.slidesparse_name, bias, n).view(*x.shape[:-1], n)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check the loaded weights, make the copies that the plan's routes read, and let go of what was loaded.

        Raises:
            WeightError, PatternError: damaged or missing weights, or such as obey no pattern; names the layer.
        """
        try:
            weights, margins = self._weights(layer)
        except PatternError as error:
            raise PatternError(f"layer {self.layer}: {error}", row=error.row, group=error.group, values=error.values) from error
        except WeightError as error:
            raise WeightError(f"layer {self.layer}: {error}") from error
        for name in ("weight", "weight_values", "weight_keep", "weight_scale"):
            if hasattr(layer, name):
                delattr(layer, name)
        execution = Execution(weights, memory=self.settings.memory, backend=self.settings.backend)
        bias = getattr(layer, "bias", None)
        if layer.skip_bias_add or (isinstance(layer, RowParallelLinear) and layer.tp_rank > 0):
            bias = None  # vLLM adds it elsewhere
        kind = None if bias is None else bias.dtype
        name = prepare(layer, execution, layer.params_dtype, weights.packed.values.device, kind, margins=margins)
        layer.register_buffer("slidesparse_name", name, persistent=False)
        layer.slidesparse_outputs = weights.packed.n
        _report(self.layer, weights, execution)
        if weights.packed.values.device.type == "cuda":
            warm(name, self.settings.captured)

    def _weights(self, layer: nn.Module) -> tuple[Weights, tuple[int, int]]:
        raise NotImplementedError

    def _start(self, layer: nn.Module, columns: int, k: int) -> int:
        """The first of the rank's columns."""
        return layer.tp_rank * columns if columns != k else 0


@register_weight_loader_v2_supported_method
class PackedLinearMethod(SlideSparseLinearMethod):
    """The packed form: ``weight_values``, ``weight_keep`` and, at 8 bits, ``weight_scale``."""

    def __init__(self, scheme: Scheme, claims: Claims, layer: str, parts: tuple[str, ...]) -> None:
        super().__init__(claims, layer, parts)
        self.scheme = scheme
        self.pattern = claims.stored_pattern(layer, parts)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters for the rank's rows, and of each the groups that its columns touch."""
        self.claims.check_width(self.layer, self.parts, input_size)
        start = self._start(layer, input_size_per_partition, input_size)
        self.shard = Shard(self.pattern, input_size, start, start + input_size_per_partition)
        loader = extra_weight_attrs["weight_loader"]
        for spec in packed_tensors(self.scheme, self.pattern, sum(output_partition_sizes), self.shard.covered):
            if spec.suffix == "weight_scale":
                scale = torch.full(spec.shape, torch.nan, dtype=spec.dtype)
                parameter = ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=loader)
            else:
                bits = spec.suffix == "weight_keep"
                data = torch.zeros(spec.shape, dtype=spec.dtype) if bits else blank(spec.shape, spec.dtype)
                parameter = PackedParameter(shard=self.shard, bits=bits, data=data, weight_loader=loader)
            layer.register_parameter(spec.suffix, parameter)

    def _weights(self, layer: nn.Module) -> tuple[Weights, tuple[int, int]]:
        values, keep = layer.weight_values.data, layer.weight_keep.data
        if self.settings.random:
            packed, scale = made_up(values.shape[0], self.shard, self.scheme, values.device)
        else:
            scale = layer.weight_scale.data if self.scheme.dynamic else None
            packed = cut(Packed(values, keep, self.pattern, self.shard.covered), scale, self.shard)
        return Weights(packed, self.scheme, scale), self.shard.margins


@register_weight_loader_v2_supported_method
class DenseLinearMethod(SlideSparseLinearMethod):
    """Dense weights, packed once they are loaded: int8 or e4m3 with scales per channel or per part, or the model's 16-bit type."""

    def __init__(self, scheme: Scheme | None, claims: Claims, layer: str, parts: tuple[str, ...], *, per_part: bool = False) -> None:
        super().__init__(claims, layer, parts)
        self.scheme, self.per_part = scheme, per_part

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The parameters that vLLM's own methods make for such a checkpoint."""
        scheme = self.scheme = self.scheme or scheme_of_dtype(params_dtype)
        if scheme is None:
            raise UnsupportedError(f"layer {self.layer}: weights of {params_dtype} have no packed form: give --dtype bfloat16 or float16")
        self.k, self.start = input_size, self._start(layer, input_size_per_partition, input_size)
        self.widths = list(output_partition_sizes)
        rows, loader = sum(self.widths), extra_weight_attrs["weight_loader"]
        data = blank((rows, input_size_per_partition), scheme.dtype)
        layer.register_parameter("weight", ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader))
        if scheme.dynamic and self.per_part:
            data = torch.full((len(self.widths),), torch.nan, dtype=torch.float32)
            layer.register_parameter("weight_scale", PerTensorScaleParameter(data=data, weight_loader=loader))
        elif scheme.dynamic:
            data = torch.full((rows, 1), torch.nan, dtype=torch.float32)
            layer.register_parameter("weight_scale", ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader))

    def _weights(self, layer: nn.Module) -> tuple[Weights, tuple[int, int]]:
        weight, scale = layer.weight.data, layer.weight_scale.data if self.scheme.dynamic else None
        if scale is not None and self.per_part:
            scale = scale.repeat_interleave(torch.tensor(self.widths, device=scale.device)).view(-1, 1)
        candidates = self.claims.patterns(self.parts)
        if self.settings.random:
            shard = Shard(candidates[0], self.k, self.start, self.start + weight.shape[1])
            packed, scale = made_up(weight.shape[0], shard, self.scheme, weight.device)
        else:
            packed, shard = pack(weight, scale, self.k, self.start, candidates)
        return Weights(packed, self.scheme, scale), shard.margins


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
                return DenseLinearMethod(scheme, self.claims, prefix, parts, per_part=_text(arguments["weights"].strategy) == "tensor")
            if arguments is not None:
                _report_other(prefix.rpartition(".")[2])
        return super().get_quant_method(layer, prefix)


def _w8a8(arguments: dict[str, Any] | None) -> Scheme | None:
    """The scheme that computes what compressed-tensors' arguments ask for, None if none does."""
    weights, inputs = (arguments or {}).get("weights"), (arguments or {}).get("input_activations")
    if weights is None or inputs is None or arguments.get("output_activations") is not None:
        return None
    kind = _text(weights.type)
    asked = (weights.num_bits, weights.symmetric, weights.dynamic, inputs.num_bits, inputs.symmetric, inputs.dynamic)
    same = kind == _text(inputs.type) and _text(inputs.strategy) == "token" and _text(weights.strategy) in ("channel", "tensor")
    if asked != (8, True, False, 8, True, True) or not same:
        return None
    return scheme_named({"int": "int8", "float": "fp8"}[kind])


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def register() -> None:
    """Make the method known to vLLM; does nothing the second time."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(SlideSparseConfig)


def _report(layer: str, weights: Weights, execution: Execution) -> None:
    """Say once for every kind of layer who runs it."""
    routes = ", ".join(f"{choice} up to {most} tokens" for most, choice in execution.steps[:-1])
    last = str(execution.steps[-1][1])
    _report_routes(layer.rpartition(".")[2], weights.packed.n, weights.k, str(weights.packed.pattern), weights.scheme.name, routes, last)


@cache
def _report_routes(layer: str, n: int, k: int, pattern: str, scheme: str, routes: str, last: str) -> None:
    routed = f"{routes}, then {last}" if routes else last
    _LOG.info("slidesparse: %s %d × %d, %s %s: %s", layer, n, k, scheme, pattern, routed)


@cache
def _report_experts() -> None:
    _LOG.warning("slidesparse: expert layers are not packed: they are loaded and run dense, as vLLM has them")


@cache
def _report_other(layer: str) -> None:
    _LOG.warning("slidesparse: %s is not W8A8 with dynamic symmetric activations per token: it runs as vLLM has it", layer)
