"""SwiGLU and norms in the pass that quantises and lifts their output, instead of the compiler's kernels in front of it.

vLLM lets a configuration add a pass over its compiled graphs (``inductor_compile_config``, under the platform's ``pass_key``). This
pass looks for ``slidesparse::linear_unscaled`` of silu(gate) · up, or of a norm with a residual, with the scales that the product in front
may have left. It puts ``slidesparse::silu_mul_linear_unscaled`` or ``add_rms_norm_linear_unscaled`` there: [M, K] in 16 bits is neither
written nor read. What it does not find runs as it stands.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from ...compat.torch import graph_patterns
from ...compat.vllm import InductorPass, VllmConfig, add_pass, enable_fake_mode, fused_add_rms_norm, silu_and_mul
from ...errors import UnsupportedError
from ...gemm.op import add_rms_norm_linear_unscaled, linear_unscaled, silu_mul_linear_unscaled
from ...reference import scaled
from ..engine.shapes import follows_swiglu

_LOG = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own logger, whose handlers show it
_ANY = {"n": 17, "eps": 0.17}
"""Stand for the number of outputs and the norm's epsilon where the patterns are traced; no other number there may be equal to them."""


class FuseQuantisation(InductorPass):
    """The pass."""

    def __call__(self, graph: fx.Graph) -> None:
        """Put what stands in front of products into their ops, in place."""
        _patterns().apply(graph)

    def uuid(self) -> str:
        """What vLLM's and torch's compile caches know it by."""
        hashed = (sys.modules[__name__], scaled, silu_and_mul, fused_add_rms_norm)
        return InductorPass.hash_source(*(inspect.getsource(one) for one in hashed))


def fuses(config: VllmConfig | None) -> bool:
    """Whether what stands in front of products of ours is put into their ops; adds the pass to the configuration unless it is there.

    False where the user has put a pass of another kind into the one place that there is.
    """
    return config is not None and _can_match() and isinstance(add_pass(config, FuseQuantisation()), FuseQuantisation)


@cache
def _can_match() -> bool:
    """Whether torch has its matcher of graphs; says once what does not."""
    try:
        graph_patterns()
    except UnsupportedError as error:
        _LOG.warning("slidesparse: norms and activations are not fused with quantisation: %s", error)
        return False
    return True


def behind_swiglu(config: VllmConfig, layer: str) -> bool:
    """Whether the pass will find SwiGLU in front of the layer of that name."""
    settings, text = config.compilation_config, None if config.model_config is None else config.model_config.hf_text_config
    asked = settings.custom_ops  # vLLM's own kernel is not what the pass looks for
    custom = "+silu_and_mul" in asked or ("all" in asked and "-silu_and_mul" not in asked)
    return not custom and settings.backend in ("", "inductor") and follows_swiglu(layer, getattr(text, "hidden_act", None))


def _takes(match: Any, inputs: tuple[str, ...]) -> bool:
    """Whether the kernels take what was found: x and the residual [M, K] and its weight [K] in bfloat16, scales [M, 1] and [1, K]."""
    nodes = {name: match.kwargs.get(name) for name in inputs}  # numbers are there as such, and None is not
    found = {name: node.meta.get("val") for name, node in nodes.items() if isinstance(node, fx.Node)}
    if not all(isinstance(found.get(name), Tensor) for name in inputs) or found["x"].dim() != 2:
        return False
    m, k = found["x"].shape
    shapes = {"x": (m, k), "residual": (m, k), "weight": (k,), "scale": (m, 1), "channel": (1, k), "name": (1,)}
    types = {"scale": torch.float32, "channel": torch.float32, "name": torch.int64}
    return all(one.dtype == types.get(name, torch.bfloat16) and _same(one.shape, shapes[name]) for name, one in found.items())


def _same(shape: torch.Size, wanted: tuple[int | torch.SymInt, ...]) -> bool:
    known_true = graph_patterns().statically_known_true
    return len(shape) == len(wanted) and all(known_true(a == b) for a, b in zip(shape, wanted, strict=True))


@cache
@enable_fake_mode  # type: ignore[untyped-decorator]  # vLLM's
@torch.no_grad()
def _patterns() -> Any:
    matcher = graph_patterns()
    found, dtype = matcher.PatternMatcherPass(pass_name="slidesparse"), torch.bfloat16
    x, residual, weight, name = *torch.empty(2, 5, 64, dtype=dtype), torch.empty(64, dtype=dtype), torch.empty(1, dtype=torch.int64)
    token, channel = (torch.empty(shape, dtype=torch.float32) for shape in ((5, 1), (1, 64)))

    def add(search: Callable[..., Any], replacement: Callable[..., Any], *tensors: Tensor) -> None:
        names = inspect.signature(search).parameters
        check = partial(_takes, inputs=tuple(one for one in names if one not in _ANY))
        numbers = {one: _ANY[one] for one in names if one in _ANY}
        matcher.register_replacement(search, replacement, tensors, matcher.fwd_only, found, check, scalar_workaround=numbers)

    def norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, name: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        normed, total = fused_add_rms_norm(x, residual, weight, eps)
        return *linear_unscaled(normed, name, n), total

    # The first that matches counts: those that take most come first.
    add(
        lambda x, scale, channel, name, n: linear_unscaled(silu_and_mul(scaled(x, scale, channel, None, dtype)), name, n),
        silu_mul_linear_unscaled,
        x, token, channel, name,
    )  # fmt: skip
    add(
        lambda x, scale, name, n: linear_unscaled(silu_and_mul(scaled(x, scale, None, None, dtype)), name, n),
        lambda x, scale, name, n: silu_mul_linear_unscaled(x, scale, None, name, n),
        x, token, name,
    )  # fmt: skip
    add(
        lambda x, name, n: linear_unscaled(silu_and_mul(x), name, n),
        lambda x, name, n: silu_mul_linear_unscaled(x, None, None, name, n),
        x, name,
    )  # fmt: skip
    add(
        lambda x, residual, weight, eps, scale, channel, name, n: norm(
            scaled(x, scale, channel, None, dtype), residual, weight, eps, name, n
        ),
        add_rms_norm_linear_unscaled,
        x, residual, weight, token, channel, name,
    )  # fmt: skip
    add(
        lambda x, residual, weight, eps, scale, name, n: norm(scaled(x, scale, None, None, dtype), residual, weight, eps, name, n),
        lambda x, residual, weight, eps, scale, name, n: add_rms_norm_linear_unscaled(x, residual, weight, eps, scale, None, name, n),
        x, residual, weight, token, name,
    )  # fmt: skip
    add(
        norm,
        lambda x, residual, weight, eps, name, n: add_rms_norm_linear_unscaled(x, residual, weight, eps, None, None, name, n),
        x, residual, weight, name,
    )  # fmt: skip
    return found
