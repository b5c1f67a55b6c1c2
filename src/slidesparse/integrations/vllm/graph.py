"""What of a packed linear stands in vLLM's graph, where its compiler fuses it: scales and bias, behind the product.

Sparse tensor cores give products without token scales. A pass over the output that applies the scales costs up to a fifth of the product.
In the graph the scales join residual and norm, or the rotation of queries and keys; SwiGLU takes them into the next op (`fusion`).
Quantisation stays in the op: in the graph, the compiler's kernels took longer than this package's and vLLM's (int8 on an H100,
docs/dev/notes.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ... import __version__
from ...compat.vllm import CompilationMode, VllmConfig
from ...gemm.op import linear_unscaled
from ...gemm.versions import kernel_versions
from ...reference import scaled

_CACHE_KEY = "slidesparse_layers"
_PACKAGE = "package"
"""No layer's name: those begin with the model's."""


def compiles(config: VllmConfig | None) -> bool:
    """Whether a model of this configuration goes through vLLM's compiler, if not with all its parts."""
    return config is not None and config.compilation_config.mode == CompilationMode.VLLM_COMPILE


def enter_cache_key(configs: Iterable[VllmConfig | None], layer: str, how: str) -> bool:
    """Let vLLM's compile cache tell graphs apart: how a layer stands in them depends on plans, which it does not see, and on this package.

    What ops leave to the graph is the package's affair, so its version and those of its kernels are told, too. The cache's key covers
    ``additional_config``. A model inside another is built with a configuration of its own: both are told. False where settings are of a
    kind that cannot be added to.
    """
    told = {id(config): config for config in configs if config is not None}.values()
    if not all(isinstance(config.additional_config, dict) for config in told):
        return False
    for config in told:
        entered = config.additional_config.get(_CACHE_KEY, {}) | {layer: how, _PACKAGE: [__version__, *sorted(kernel_versions().items())]}
        config.additional_config = config.additional_config | {_CACHE_KEY: entered}
    return True


def open_linear(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x [M, K]`` → ``[M, N]``: the layer's product, scales and bias in float32, rounded."""
    y, x_scale = linear_unscaled(x, layer.slidesparse_name, layer.slidesparse_outputs)
    return scaled(y, x_scale, layer.slidesparse_scale, bias, x.dtype)
