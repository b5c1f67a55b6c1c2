"""A compiled kernel onto the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import UnsupportedError
from .compiler import Binary

if TYPE_CHECKING:
    from cuda.core import Kernel


def load(binary: Binary) -> Kernel:
    """The kernel, to be given to ``cuda.core.launch``; loads the cubin anew at every call, so keep what it returns.

    The driver keeps it as a library, not in one context: it runs on every device of the architecture.

    Raises:
        UnsupportedError: the current CUDA device is of another architecture.
    """
    from cuda.core import Device, ObjectCode

    major, minor = torch.cuda.get_device_capability()
    # sm_90a is for exactly 9.0; a plain sm_80 runs on every later minor version too.
    built = binary.arch.removeprefix("sm_")
    exact = built[-1:].isalpha()
    built_major, built_minor = divmod(int(built.rstrip("af")), 10)
    if built_major != major or (built_minor != minor if exact else built_minor > minor):
        raise UnsupportedError(f"kernel {binary.name!r} is built for {binary.arch}, {torch.cuda.get_device_name()} is sm_{major}{minor}")
    # The device's primary context, which torch uses too; this also initialises the driver.
    Device(torch.cuda.current_device()).set_current()
    return ObjectCode.from_cubin(binary.cubin, name=binary.name).get_kernel(binary.name)
