"""Products of float32 that are products of float32, whatever torch was allowed to round their inputs to."""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
from torch import Tensor

_SETTINGS: dict[str, Any] = {"cuda": torch.backends.cuda.matmul, "cpu": getattr(torch.backends.mkldnn, "matmul")}  # noqa: B009 - torch's hints lack it
_SWITCHING = Lock()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [M, K] @ b [K, N]``; of float32 without TF32 or bfloat16 inside.

    Where the user allowed these for speed, the setting is another one for the length of the call. Meanwhile products of other threads are
    more exact than they had to be, and torch refuses to tell them ``allow_tf32``, the older name of the setting.
    """
    setting = _SETTINGS.get(a.device.type) if a.dtype == torch.float32 else None
    if setting is None:
        return a @ b
    with _SWITCHING:  # what another thread switched to must not be taken for what the user set
        allowed = setting.fp32_precision
        if allowed not in ("ieee", "none"):
            setting.fp32_precision = "ieee"
            try:
                return a @ b
            finally:
                setting.fp32_precision = allowed
    return a @ b
