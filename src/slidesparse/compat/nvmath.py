"""Numbers by which cuSPARSELt is told what to do, from nvmath's enumerations of them."""

from __future__ import annotations

from functools import cache, reduce
from importlib import import_module
from typing import NamedTuple

import torch

from ..errors import UnsupportedError
from .versions import lacks


class Numbers(NamedTuple):
    """C's numbers: types of data and sums, operations, orders, and attributes of a product and of the choice of its algorithm."""

    types: dict[torch.dtype, int]
    non_transpose: int
    transpose: int
    row_order: int
    column_order: int
    compute_int32: int
    compute_float32: int
    half_the_weights: int
    default_algorithm: int
    alpha_vector_scaling: int
    config_id: int
    config_max_id: int
    search_iterations: int
    split_k: int
    split_k_mode: int
    split_k_buffers: int


_TYPES = {
    torch.float32: "CUDA_R_32F",
    torch.float16: "CUDA_R_16F",
    torch.int8: "CUDA_R_8I",
    torch.int32: "CUDA_R_32I",
    torch.bfloat16: "CUDA_R_16BF",
    torch.float8_e4m3fn: "CUDA_R_8F_E4M3",
}
_PLACES = {
    "non_transpose": "bindings.cusparse.Operation.NON_TRANSPOSE",
    "transpose": "bindings.cusparse.Operation.TRANSPOSE",
    "row_order": "bindings.cusparse.Order.ROW",
    "column_order": "bindings.cusparse.Order.COL",
    "compute_int32": "bindings.cusparseLt.ComputeType.COMPUTE_32I",
    "compute_float32": "bindings.cusparseLt.ComputeType.COMPUTE_32F",
    "half_the_weights": "bindings.cusparseLt.Sparsity.SPARSITY_50_PERCENT",
    "default_algorithm": "bindings.cusparseLt.MatmulAlg.DEFAULT",
    "alpha_vector_scaling": "bindings.cusparseLt.MatmulDescAttribute.ALPHA_VECTOR_SCALING",
    "config_id": "bindings.cusparseLt.MatmulAlgAttribute.CONFIG_ID",
    "config_max_id": "bindings.cusparseLt.MatmulAlgAttribute.CONFIG_MAX_ID",
    "search_iterations": "bindings.cusparseLt.MatmulAlgAttribute.SEARCH_ITERATIONS",
    "split_k": "bindings.cusparseLt.MatmulAlgAttribute.SPLIT_K",
    "split_k_mode": "bindings.cusparseLt.MatmulAlgAttribute.SPLIT_K_MODE",
    "split_k_buffers": "bindings.cusparseLt.MatmulAlgAttribute.SPLIT_K_BUFFERS",
}


@cache
def numbers() -> Numbers:
    """All of them, once nvmath's bindings are known to be there.

    Raises:
        UnsupportedError: nvmath lacks one; names it.
    """
    return Numbers(
        {dtype: _number(f"CudaDataType.{name}") for dtype, name in _TYPES.items()}, **{k: _number(v) for k, v in _PLACES.items()}
    )


def _number(place: str) -> int:
    *module, enumeration, member = place.split(".")
    try:
        return int(reduce(getattr, (enumeration, member), import_module(".".join(("nvmath", *module)))))
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(lacks("nvmath-python", place)) from error
