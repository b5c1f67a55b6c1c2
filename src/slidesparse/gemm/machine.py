"""What a measured plan depends on: the card, its software, and the sources of our own kernels."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources

import torch

from ..ops import cusparselt


@dataclass(frozen=True)
class Machine:
    """A card and the software that times depend on."""

    gpu: str
    driver: str
    cuda: str
    torch: str
    triton: str
    cusparselt: str
    kernels: str

    def differences(self, other: Machine) -> dict[str, tuple[str, str]]:
        """Fields that differ: mine and the other's."""
        mine, others = asdict(self), asdict(other)
        return {name: (mine[name], others[name]) for name in mine if mine[name] != others[name]}


def this_machine() -> Machine:
    """The current CUDA device and the software here."""
    return _machine(torch.cuda.current_device())


@cache
def _machine(index: int) -> Machine:
    library = "" if cusparselt.unavailable(torch.device("cuda", index)) else cusparselt.version()
    return Machine(
        torch.cuda.get_device_name(index), _driver(), torch.version.cuda or "", torch.__version__, _triton(), library, kernels_hash()
    )


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


_NOT_TIMED = ("__init__.py", "library.py", "launching.py", "fused.py", "kernels_fused.py")
"""Sources that decide host time only, which plans leave out, or of ops that no linear runs."""


@cache
def kernels_hash() -> str:
    """A hash of the sources of the ops that linears run, lines of comment left out."""
    digest = hashlib.sha256()
    for file in sorted(resources.files("slidesparse.ops").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py") and file.name not in _NOT_TIMED:
            lines = file.read_text(encoding="utf-8").splitlines()
            digest.update("\n".join(line.rstrip() for line in lines if not line.lstrip().startswith("#")).encode())
    return digest.hexdigest()[:12]


def _driver() -> str:
    """The driver's version; empty where the management library does not tell."""
    try:
        from cuda.bindings import nvml
    except ImportError:
        return ""
    try:
        nvml.init_v2()
        return str(nvml.system_get_driver_version())
    except (nvml.NvmlError, RuntimeError, OSError, AttributeError):
        return ""
