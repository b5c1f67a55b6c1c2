"""Ops of torchao, which promises none of them to stay: its fused fp8 2:4 product for compute capability 9.0, a rival in benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedError


def _op(name: str) -> object:
    try:
        import torchao  # noqa: F401  # its import registers the ops
    except ImportError as error:
        raise UnsupportedError(f"torchao cannot be imported: {error}") from error
    found = getattr(torch.ops.torchao, name, None)
    if found is None:
        raise UnsupportedError(f"this torchao has no op {name}")
    return found


def compressed(slid: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata of fp8 weights ``[N, K']`` that obey 2:4.

    Raises:
        UnsupportedError: torchao or the op is not there.
    """
    values, metadata = _op("to_sparse_semi_structured_cutlass_sm9x_f8")(slid)  # type: ignore[operator]
    return values, metadata


def product(q: Tensor, x_scale: Tensor, values: Tensor, metadata: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[M, K']`` times such weights, scales of rows and columns and the bias in it.

    Raises:
        UnsupportedError: torchao or the op is not there.
    """
    multiply = _op("rowwise_scaled_linear_sparse_cutlass_f8f8")
    return multiply(q, x_scale, values, metadata, scale, bias, dtype)  # type: ignore[operator]
