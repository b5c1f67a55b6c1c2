"""SwiGLU in the pass that quantises and lifts its output, instead of a kernel of the compiler's in front of it.

vLLM lets a configuration add a pass over its compiled graphs (``inductor_compile_config``, under the platform's ``pass_key``). Ours looks
for ``slidesparse::sums`` of silu(gate) · up, with the scales that the product in front may have left, and puts
``slidesparse::silu_mul_sums`` there: [M, K] in 16 bits is neither written nor read. What it does not find runs as it stands.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from ...gemm.handover import follows_swiglu
from ...gemm.prepared import silu_mul_sums, sums
from .graph import scaled

_ANY = 17
"""Stands for the number of outputs where the patterns are traced; no other number there may be equal to it."""


class GateInProduct(InductorPass):
    """The pass; ``found`` is how many products it has put behind their gates."""

    found = 0

    def __call__(self, graph: fx.Graph) -> None:
        GateInProduct.found += _patterns().apply(graph)

    def uuid(self) -> str:
        """What vLLM's and torch's compile caches know it by."""
        return InductorPass.hash_source(inspect.getsource(sys.modules[__name__]), inspect.getsource(scaled))


def gates(config: VllmConfig | None, layer: str) -> bool:
    """Whether SwiGLU in front of the layer of that name will be in its op; adds the pass to the configuration unless it is there.

    False where the user has put a pass of another kind into the one place that there is.
    """
    if config is None or config.model_config is None:
        return False
    text = config.model_config.hf_text_config
    if not follows_swiglu(layer, getattr(text, "hidden_act", None)):
        return False
    passes = config.compilation_config.inductor_compile_config
    return isinstance(passes.setdefault(current_platform.pass_key, GateInProduct()), GateInProduct)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As vLLM's layer is traced: ``[M, 2K]`` → ``[M, K]``."""
    k = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :k]) * gate_up[..., k:]


@cache
@enable_fake_mode
@torch.no_grad()
def _patterns() -> PatternMatcherPass:
    found, dtype = PatternMatcherPass(pass_name="slidesparse"), torch.bfloat16

    def behind_both(gate_up: Tensor, scale: Tensor, channel: Tensor, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return sums(silu_mul(scaled(gate_up, scale, channel, None, dtype)), name, n)

    def behind_scaled(gate_up: Tensor, scale: Tensor, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return sums(silu_mul(scaled(gate_up, scale, None, None, dtype)), name, n)

    def scaled_in_one(gate_up: Tensor, scale: Tensor, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return silu_mul_sums(gate_up, scale, None, name, n)

    def behind(gate_up: Tensor, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return sums(silu_mul(gate_up), name, n)

    def in_one(gate_up: Tensor, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return silu_mul_sums(gate_up, None, None, name, n)

    def add(search: Callable, replacement: Callable, *tensors: Tensor) -> None:
        register_replacement(search, replacement, tensors, fwd_only, found, scalar_workaround={"n": _ANY})

    gate_up, name = torch.empty(5, 64, dtype=dtype), torch.empty(1, dtype=torch.int64)
    token, channel = torch.empty(5, 1), torch.empty(1, 64)
    # The first that matches counts: those that take most come first.
    add(behind_both, silu_mul_sums, gate_up, token, channel, name)
    add(behind_scaled, scaled_in_one, gate_up, token, name)
    add(behind, in_one, gate_up, name)
    return found
