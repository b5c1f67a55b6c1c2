"""Fused kernels as torch.library ops: exact, usable under torch.compile and CUDA graphs, with the oracle where no kernel runs."""

from .expand import restore, slide
from .fused import rms_norm_quantize, silu_mul_quantize
from .launches import shipped_launches
from .library import capability, has_triton, triton_fault
from .quantize import lift, quantize, quantize_lift
from .rescale import rescale
from .w8a8 import w8a8

__all__ = [
    "capability",
    "has_triton",
    "lift",
    "quantize",
    "quantize_lift",
    "rescale",
    "restore",
    "rms_norm_quantize",
    "shipped_launches",
    "silu_mul_quantize",
    "slide",
    "triton_fault",
    "w8a8",
]
