"""CUDA C++ to kernels at first use: compiled by NVRTC, kept in the user's cache, loaded by cuda-core; no toolkit and no host compiler.

A source is one text, complete in itself: ``#include`` finds nothing, neither CUDA's headers nor files, so the text and its constants are
all that a cached kernel depends on besides the compiler. Importing this package imports neither cuda-core nor NVRTC.
"""

from .compiler import Binary, Job, Resources, compile, compile_all
from .loading import load
from .nvrtc import Toolchain, toolchain

__all__ = ["Binary", "Job", "Resources", "Toolchain", "compile", "compile_all", "load", "toolchain"]
