"""SwiGLU and norms in the pass that quantises and lifts their output, instead of the compiler's kernels in front of it.

vLLM lets a configuration add a pass over its compiled graphs (``inductor_compile_config``, under the platform's ``pass_key``). This
pass looks for ``slidesparse::linear`` of silu(gate) · up, or of a norm with a residual, and puts ``slidesparse::silu_mul_linear`` or
``add_rms_norm_linear`` there: [M, K] in 16 bits is neither written nor read. What it does not find runs as it stands.
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
from ...gemm.op import add_rms_norm_linear, linear, silu_mul_linear
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
        hashed = (sys.modules[__name__], silu_and_mul, fused_add_rms_norm)
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


def sees_swiglu(config: VllmConfig, layer: str) -> bool:
    """Whether the pass will find SwiGLU in front of the layer of that name."""
    settings, text = config.compilation_config, None if config.model_config is None else config.model_config.hf_text_config
    asked = settings.custom_ops  # vLLM's own kernel is not what the pass looks for
    custom = "+silu_and_mul" in asked or ("all" in asked and "-silu_and_mul" not in asked)
    return not custom and settings.backend in ("", "inductor") and follows_swiglu(layer, getattr(text, "hidden_act", None))


def _takes(match: Any, inputs: tuple[str, ...]) -> bool:
    """Whether the kernels take what was found: ``inputs``, in bfloat16, x and the residual [M, K] and the norm's weight [K]."""
    nodes = {name: match.kwargs.get(name) for name in inputs}
    values = {name: node.meta.get("val") for name, node in nodes.items() if isinstance(node, fx.Node)}
    found = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if len(found) < len(inputs) or found["x"].dim() != 2:
        return False
    m, k = found["x"].shape
    shapes = {"x": (m, k), "residual": (m, k), "weight": (k,)}
    return all(one.dtype == torch.bfloat16 and _same(one.shape, shapes[name]) for name, one in found.items())


def _same(shape: torch.Size, wanted: tuple[int | torch.SymInt, ...]) -> bool:
    known_true = graph_patterns().statically_known_true
    return len(shape) == len(wanted) and all(known_true(a == b) for a, b in zip(shape, wanted, strict=True))


@cache
@enable_fake_mode  # type: ignore[untyped-decorator]  # vLLM's
@torch.no_grad()
def _patterns() -> Any:
    matcher = graph_patterns()
    found, dtype = matcher.PatternMatcherPass(pass_name="slidesparse"), torch.bfloat16
    x, residual, weight, bias = *torch.empty(2, 5, 64, dtype=dtype), *torch.empty(2, 64, dtype=dtype)
    name = torch.empty(1, dtype=torch.int64)

    def add(search: Callable[..., Any], replacement: Callable[..., Any], *tensors: Tensor) -> None:
        names = inspect.signature(search).parameters
        check = partial(_takes, inputs=tuple(one for one in names if one in ("x", "residual", "weight")))
        numbers = {one: _ANY[one] for one in names if one in _ANY}
        matcher.register_replacement(search, replacement, tensors, matcher.fwd_only, found, check, scalar_workaround=numbers)

    def norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, name: Tensor, bias: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        normed, total = fused_add_rms_norm(x, residual, weight, eps)
        return linear(normed, name, bias, n), total

    add(
        lambda x, name, bias, n: linear(silu_and_mul(x), name, bias, n),
        lambda x, name, bias, n: silu_mul_linear(x, name, bias, n),
        x, name, bias,
    )  # fmt: skip
    add(
        lambda x, name, n: linear(silu_and_mul(x), name, None, n),
        lambda x, name, n: silu_mul_linear(x, name, None, n),
        x, name,
    )  # fmt: skip
    add(norm, add_rms_norm_linear, x, residual, weight, name, bias)
    add(
        lambda x, residual, weight, eps, name, n: norm(x, residual, weight, eps, name, None, n),
        lambda x, residual, weight, eps, name, n: add_rms_norm_linear(x, residual, weight, eps, name, None, n),
        x, residual, weight, name,
    )  # fmt: skip
    return found
