"""vLLM serves packed checkpoints, portable dense twins and masked dense checkpoints, through its entry point for plugins.

vLLM loads this package in every process (entry point ``vllm.general_plugins``) and calls `register`, which makes the quantization
method ``slidesparse`` known. A tensor-parallel rank holds the rows or columns that vLLM gives it, exactly, and quantises its own
activations. Expert layers, embeddings and heads run as vLLM has them, and so does every layer that no plan makes faster.
"""

from __future__ import annotations

from ...compat.vllm import register_method
from ...format import QUANT_METHOD
from .configs import SlideSparseConfig
from .dense import offer_kernel


def register() -> None:
    """Make the method known to vLLM, and vLLM's dense kernels to plans; does nothing the second time."""
    if register_method(QUANT_METHOD, SlideSparseConfig):
        offer_kernel()
