"""The least Triton kernel: whether it compiles and runs tells whether the others can."""

from __future__ import annotations

import triton
import triton.language as tl

from ..compat.triton import TritonError

__all__ = ["TritonError", "probe_kernel"]


@triton.jit
def probe_kernel(out):
    """Write 1 to the only element of ``out``."""
    tl.store(out, 1)
