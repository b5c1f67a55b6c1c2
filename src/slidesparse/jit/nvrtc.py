"""Which NVRTC compiles: found among the packages that come with torch, told apart from every other by its content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..errors import UnsupportedError

_ENDS = 1 << 16


@dataclass(frozen=True)
class Toolchain:
    """The NVRTC of this process.

    Attributes:
        version: such as 13.0.
        identity: a hash that differs between any two builds of NVRTC, also of one version.
    """

    version: str
    identity: str

    @property
    def release(self) -> tuple[int, int]:
        """Such as (13, 0)."""
        major, minor = self.version.split(".")
        return int(major), int(minor)


@cache
def toolchain() -> Toolchain:
    """Load NVRTC, once in a process; needs neither a GPU nor a driver.

    Raises:
        UnsupportedError: cuda-core or NVRTC is missing, or NVRTC is not of the CUDA major that torch was built with.
    """
    try:
        import cuda.core  # noqa: F401 - compiling and the cache need it
        from cuda.bindings import nvrtc
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
    except ImportError as error:
        raise UnsupportedError(f"kernels cannot be compiled: {error}; pip install 'slidesparse[cuda]'") from error
    major = int(torch.version.cuda.partition(".")[0]) if torch.version.cuda else 13
    remedy = f"pip install {'nvidia-cuda-nvrtc' if major >= 13 else f'nvidia-cuda-nvrtc-cu{major}'} 'cuda-bindings=={major}.*'"
    try:
        path = Path(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except DynamicLibNotFoundError as error:
        raise UnsupportedError(f"kernels cannot be compiled: NVRTC is not installed; {remedy}") from error
    _, here, minor = nvrtc.nvrtcVersion()
    if torch.version.cuda and here != major:
        raise UnsupportedError(f"kernels cannot be compiled: NVRTC is {here}.{minor}, torch has CUDA {torch.version.cuda}; {remedy}")
    return Toolchain(f"{here}.{minor}", _identity(path))


def _identity(path: Path) -> str:
    """Hash of a library's size and both its ends, where its tables and its build ID are: reading all of 140 MB takes too long."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256(str(size).encode())
        for start in (0, max(size - _ENDS, 0)):
            file.seek(start)
            digest.update(file.read(_ENDS))
    return digest.hexdigest()
