"""The card and the software on which times depend."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache

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

    def differences(self, other: Machine) -> dict[str, tuple[str, str]]:
        """Fields that differ, each with its value here and in ``other``."""
        mine, others = asdict(self), asdict(other)
        return {name: (mine[name], others[name]) for name in mine if mine[name] != others[name]}


def this_machine() -> Machine:
    """The current CUDA device and the software here."""
    return _machine(torch.cuda.current_device())


@cache
def _machine(index: int) -> Machine:
    library = "" if cusparselt.unavailable(torch.device("cuda", index)) else cusparselt.version()
    return Machine(torch.cuda.get_device_name(index), _driver(), torch.version.cuda or "", torch.__version__, _triton(), library)


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


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
