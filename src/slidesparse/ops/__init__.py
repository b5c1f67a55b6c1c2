"""Fused kernels as torch.library ops: exact, usable under torch.compile and CUDA graphs, with the oracle where no kernel runs."""

from .quantize import lift, quantize, quantize_lift

__all__ = ["lift", "quantize", "quantize_lift"]
