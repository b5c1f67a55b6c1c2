"""Linear layers in vLLM: parameters in the form of the checkpoint, loaded by rank, checked, and made ready to run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from sys import maxsize
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...compat.vllm import (
    ChannelQuantScaleParameter,
    CUDAGraphMode,
    LinearMethodBase,
    ModelWeightParameter,
    PerTensorScaleParameter,
    RowParallelLinear,
    get_current_vllm_config_or_none,
    load_data,
    register_weight_loader_v2_supported_method,
)
from ...errors import PatternError, UnsupportedError, WeightError
from ...format import QUANT_METHOD, Packed, Scheme, packed_tensors, scheme_of_dtype
from ...gemm import Problem, Runner, Weights
from ...gemm.op import handle, linear, warm
from ...packing import Shard
from ..engine.claims import Claims
from ..engine.policy import Decision
from ..engine.rank_weights import blank, cut, made_up, pack
from ..vllm_facts import ENOUGH
from .dense import Apply, can_give_back, decided, give_back
from .fusion import fuses, sees_swiglu
from .graph import compiles, enter_cache_key
from .loading import LOADING, let_go

_LOG = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own logger, whose handlers show it


@dataclass(frozen=True)
class Settings:
    """What the user set under ``slidesparse`` in vLLM's ``additional_config``, and what the adapter needs of the rest.

    ``memory`` and ``route`` are those of `Runner`; ``random`` weights take the place of a checkpoint's (``--load-format dummy``);
    ``captured`` are the numbers of tokens for which vLLM captures CUDA graphs; up to ``replayed`` it replays them for steps of any kind,
    not of decoding only; ``most`` is how many a step can have.
    """

    memory: str = "fast"
    route: str | None = None
    random: bool = False
    captured: tuple[int, ...] = ()
    replayed: int = 0
    most: int = maxsize

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
        asked = dict((additional.get(QUANT_METHOD) if isinstance(additional, dict) else None) or {})
        if unknown := asked.keys() - {"memory", "route"}:
            raise UnsupportedError(f"additional_config.slidesparse knows memory and route, not {', '.join(sorted(unknown))}")
        sizes, mode = tuple(config.compilation_config.cudagraph_capture_sizes or ()), config.compilation_config.cudagraph_mode
        replayed = 0 if mode is None or mode.mixed_mode() == CUDAGraphMode.NONE else max(sizes, default=0)
        random, most = str(config.load_config.load_format) == "dummy", config.scheduler_config.max_num_batched_tokens
        return cls(**asked, random=random, captured=sizes, replayed=replayed, most=most)


class PackedParameter(ModelWeightParameter):
    """Stored values or keep-bits: rows are split as vLLM splits them, columns into the groups that the rank's shard touches."""

    def __init__(self, *, shard: Shard, bits: bool, **kwargs: Any) -> None:
        super().__init__(input_dim=1, output_dim=0, **kwargs)
        self._part = shard.keep if bits else shard.values

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Load the rank's part of every row."""
        load_data(self, self._part(loaded_weight))


class SlideSparseLinearMethod(LinearMethodBase):
    """A linear layer on packed weights; subclasses say in which form the checkpoint holds them."""

    scheme: Scheme

    def __init__(self, scheme: Scheme | None, claims: Claims, layer: str, parts: tuple[str, ...]) -> None:
        self.claims, self.layer, self.parts = claims, layer, parts
        self.settings = Settings.current()
        self.config = get_current_vllm_config_or_none()
        """That of the model that is being built, which may be one inside another."""
        # Now, since vLLM copies the configuration's passes as soon as the model's layers are made. Layers of 16 bits quantise nothing.
        self.fuses = scheme is not None and scheme.dynamic and compiles(self.config) and fuses(self.config)
        self.stock: Apply | None = None
        """What runs the layer where vLLM does."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., K]`` → ``[..., N]``."""
        let_go()
        if self.stock is not None:
            return self.stock(layer, x, bias)
        if x.dim() != 2:
            return self.apply(layer, x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], layer.slidesparse_outputs)
        return linear(x, layer.slidesparse_name, bias, layer.slidesparse_outputs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the loaded weights, make the copies that the plan's routes read, and let go of what was loaded.

        Raises:
            WeightError, PatternError: damaged or missing weights, or such as obey no pattern; names the layer.
        """
        try:
            weights, margins = self._weights(layer)
        except PatternError as error:
            raise error.reworded(f"layer {self.layer}: {error}") from error
        except WeightError as error:
            raise WeightError(f"layer {self.layer}: {error}") from error
        loaded = [weights.packed.values, weights.packed.keep]
        for name in ("weight", "weight_values", "weight_keep", "weight_scale"):
            if hasattr(layer, name):
                loaded.append(getattr(layer, name).data)
                delattr(layer, name)
        try:
            self._make_ready(layer, weights, margins)
        finally:
            LOADING.ends(layer, loaded)

    def _make_ready(self, layer: Any, weights: Weights, margins: tuple[int, int]) -> None:
        """Decide who runs the layer, and make the copies that its routes read."""
        configs, device = (self.config, get_current_vllm_config_or_none()), weights.packed.values.device
        bias = getattr(layer, "bias", None)
        if layer.skip_bias_add or (isinstance(layer, RowParallelLinear) and layer.tp_rank > 0):
            bias = None  # vLLM adds it elsewhere
        problem = weights.problem(layer.params_dtype, device, None if bias is None else bias.dtype)
        behind = self.fuses and layer.params_dtype == torch.bfloat16 and sees_swiglu(self.config, self.layer)
        decision = self._decision(problem, device, behind)
        if decision.why is not None and enter_cache_key(configs, self.layer, "vllm"):
            dense = ops.restore(weights.packed)[:, margins[0] : weights.k - margins[1]]
            self.stock = give_back(layer, self.scheme, dense.contiguous(), weights.channel_scale)
            _report(self.layer, weights, f"vLLM's own dense kernels: {decision.why}")
            return
        enter_cache_key(configs, self.layer, QUANT_METHOD)
        settings = self.settings
        runner = Runner(weights, memory=settings.memory, route=settings.route, plan=decision.plan, unread="meta")
        ready = runner.prepare(layer.params_dtype, device, problem.bias)
        name = handle(layer, lambda dtype, device: runner, margins)
        layer.register_buffer("slidesparse_name", name, persistent=False)
        layer.slidesparse_outputs = weights.packed.n
        _report(self.layer, weights, _told(runner))
        if compiles(self.config) and settings.replayed < min(ENOUGH, settings.most):
            _say_graphs(settings.replayed)
        if device.type == "cuda":
            warm(name, ready, settings.captured)

    def _decision(self, problem: Problem, device: torch.device, swiglu: bool) -> Decision:
        """Who runs the layer; this package where the user has chosen how, or vLLM has no kernel for it."""
        if self.settings.route is not None or self.settings.memory != "fast" or not can_give_back(self.scheme, device):
            return Decision(None)
        return decided(problem, most=self.settings.most, swiglu=swiglu)

    def _weights(self, layer: Any) -> tuple[Weights, tuple[int, int]]:
        raise NotImplementedError

    def _start(self, layer: Any, columns: int, k: int) -> int:
        """The first of the rank's columns."""
        return layer.tp_rank * columns if columns != k else 0


@register_weight_loader_v2_supported_method
class PackedLinearMethod(SlideSparseLinearMethod):
    """The packed form: ``weight_values``, ``weight_keep`` and, at 8 bits, ``weight_scale``."""

    def __init__(self, scheme: Scheme, claims: Claims, layer: str, parts: tuple[str, ...]) -> None:
        super().__init__(scheme, claims, layer, parts)
        self.scheme = scheme
        self.pattern = claims.stored_pattern(layer, parts)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters for the rank's rows, and of each the groups that its columns touch."""
        LOADING.begins(layer)
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

    def _weights(self, layer: Any) -> tuple[Weights, tuple[int, int]]:
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
        super().__init__(scheme, claims, layer, parts)
        self.claimed, self.per_part = scheme, per_part

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The parameters that vLLM's own methods make for such a checkpoint."""
        LOADING.begins(layer)
        scheme = self.claimed or scheme_of_dtype(params_dtype)
        if scheme is None:
            raise UnsupportedError(f"layer {self.layer}: weights of {params_dtype} have no packed form: give --dtype bfloat16 or float16")
        self.scheme = scheme
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

    def _weights(self, layer: Any) -> tuple[Weights, tuple[int, int]]:
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


def _told(runner: Runner) -> str:
    routes = [f"{route} up to {most} tokens" for most, route in runner.routes[:-1]]
    last = str(runner.routes[-1][1])
    return f"{', '.join(routes)}, then {last}" if routes else last


def _report(layer: str, weights: Weights, routes: str) -> None:
    """Say once for every kind of layer who runs it."""
    _report_routes(layer.rpartition(".")[2], weights.packed.n, weights.k, str(weights.packed.pattern), weights.scheme.name, routes)


@cache
def _report_routes(layer: str, n: int, k: int, pattern: str, scheme: str, routes: str) -> None:
    _LOG.info("slidesparse: %s %d × %d, %s %s: %s", layer, n, k, scheme, pattern, routes)


@cache
def _say_graphs(replayed: int) -> None:
    """Say once that larger graphs keep steps from waiting for the host."""
    _LOG.info(
        "slidesparse: steps of more than %d tokens, but too few to keep the GPU busy, wait for the host, and products of ours cost it "
        "more than vLLM's: --max-cudagraph-capture-size %d replays them",
        replayed, ENOUGH,
    )  # fmt: skip
