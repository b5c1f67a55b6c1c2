"""vLLM serves packed checkpoints, portable dense twins and masked dense checkpoints, through its entry point for plugins.

vLLM loads this package in every process (entry point ``vllm.general_plugins``) and calls `register`, which makes the quantization
method ``slidesparse`` known. A tensor-parallel rank holds the rows or columns that vLLM gives it, exactly, and quantises its own
activations. Expert layers, embeddings and heads run as vLLM has them, and so does every layer that no plan makes faster.
"""

from __future__ import annotations

import vllm

from ...format import QUANT_METHOD
from ..engine.claims import check_version

check_version(vllm.__version__)

# Only now: of an older vLLM, these could fail with a less helpful message.
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config  # noqa: E402

from .configs import SlideSparseConfig  # noqa: E402
from .dense import offer_kernel  # noqa: E402


def register() -> None:
    """Make the method known to vLLM, and vLLM's dense kernels to plans; does nothing the second time."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(SlideSparseConfig)
        offer_kernel()
