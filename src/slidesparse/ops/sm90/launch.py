"""Launching the kernel for compute capability 9.0: descriptors of the matrices, the order of the tiles, and the call."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from functools import cache, lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ... import jit
from ...errors import UnsupportedError
from .layout import DEPTH, ROWS, tiles
from .variants import CHUNK, THREADS, Types, Variant, constants, shared_bytes, source

_GROUP = 8
"""Token tiles that follow each other before the features advance: what they share stays in the second-level cache."""
_MAPS = 4096


@cache
def tile_order(down: int, across: int, group: int, device: int) -> Tensor:
    """Tiles in the order in which clusters take them, features · 2¹⁶ + tokens, int32; both count clusters.

    All features come before the next ``group`` tiles of tokens. No table is freed: a CUDA graph reads it for as long as it lives, and
    nobody knows how long that is. Many numbers of tokens share one.
    """
    order = [
        row << 16 | column
        for first in range(0, across, group)
        for row in range(down)
        for column in range(first, min(first + group, across))
    ]
    return torch.tensor(order, dtype=torch.int32, device=torch.device("cuda", device))


@cache
def unavailable() -> str | None:
    """Why kernels cannot be compiled here; None if they can."""
    try:
        jit.toolchain()
    except UnsupportedError as error:
        return str(error)
    return None


@lru_cache(maxsize=256)
def loaded(variant: Variant, types: Types, device: int) -> Gemm:
    """The kernel on a device, which must be the current one; compiled at first use."""
    return Gemm(variant, types, device)


class Gemm:
    """One variant of the kernel on one device: ``y [M, N]`` from ``q [M, K']``, weights, bias, and scales where values have 8 bits."""

    def __init__(self, variant: Variant, types: Types, device: int, *, delay: bool = False) -> None:
        self.variant, self.types, self.device, self._lock = variant, types, device, Lock()
        binary = jit.compile(source(variant, types), name="gemm", arch="sm_90a", constants=constants(variant, types, delay=delay))
        self._library_kernel = jit.load(binary)  # keeps the function alive
        self._maps: OrderedDict[tuple[Any, ...], _TensorMap] = OrderedDict()
        driver = _driver()
        (kernel,) = _checked(driver.cuKernelGetFunction(driver.CUkernel(int(self._library_kernel.handle))))
        self._kernel = kernel
        shared = shared_bytes(variant, types)
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(kernel, limit, shared))
        self._config = config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ, config.gridDimY, config.gridDimZ = THREADS, 1, 1, 1, 1
        config.sharedMemBytes = shared
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = variant.cluster, 1, 1
        config.attrs, config.numAttrs = [cluster], 1
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        config.gridDimX = multiprocessors // variant.cluster * variant.cluster
        (fitting,) = _checked(driver.cuOccupancyMaxActiveClusters(kernel, config))
        if not fitting:
            raise UnsupportedError(f"no cluster of {variant.cluster} blocks with {shared} bytes of shared memory fits this GPU")
        self.clusters = min(fitting, multiprocessors // variant.cluster)
        self._values = [(ctypes.c_ubyte * 192)() for _ in range(3)]
        self._pointers = [ctypes.c_void_p() for _ in range(5)]
        self._numbers = [ctypes.c_int() for _ in range(4)]
        # Tensor maps lie at multiples of 64 bytes.
        self._aligned = [-(-ctypes.addressof(value) // 64) * 64 for value in self._values]
        places = [*self._aligned, *(ctypes.addressof(one) for one in (*self._pointers, *self._numbers))]
        self._arguments = (ctypes.c_void_p * len(places))(*places)

    def order(self, m: int, n: int) -> Tensor:
        """The tiles of a product ``[M, N]``; see `tile_order`."""
        down, across = -(-n // (ROWS * self.variant.features)), -(-m // (self.variant.tokens * self.variant.along))
        return tile_order(down, across, max(1, _GROUP // self.variant.along), self.device)

    def __call__(
        self, q: Tensor, x_scale: Tensor | None, weights: Tensor, w_scale: Tensor | None, bias: Tensor | None, order: Tensor, y: Tensor,
        stream: int,
    ) -> None:  # fmt: skip
        """Launch; the number of tokens is that of ``y``, and ``weights`` are tiles, or ``[N, K]`` where they are dense."""
        m, n = y.shape
        if m == 0:
            return
        sparse, driver = self.types.sparse, _driver()
        x_map = self._map(q, self.variant.tokens // self.variant.features)
        w_map = x_map if sparse else self._map(weights, ROWS // self.variant.along)
        y_map = self._map(y, CHUNK, written=True)
        steps = tiles(n, q.shape[1], self.types.size)[1]
        with self._lock:
            for place, one in zip(self._aligned, (x_map, w_map, y_map), strict=True):
                ctypes.memmove(place, one.address, 128)
            for pointer, tensor in zip(self._pointers, (weights, x_scale, w_scale, bias, order), strict=True):
                pointer.value = None if tensor is None else tensor.data_ptr()
            for number, value in zip(self._numbers, (order.numel(), steps, m, n), strict=True):
                number.value = value
            self._config.gridDimX = min(self.clusters, order.numel()) * self.variant.cluster
            self._config.hStream = stream
            _checked(driver.cuLaunchKernelEx(self._config, self._kernel, ctypes.addressof(self._arguments), 0))

    def _map(self, matrix: Tensor, rows: int, *, written: bool = False) -> _TensorMap:
        """The descriptor of a row-major matrix of which boxes of 128 bytes by some rows are copied, swizzled in 128 bytes."""
        key = (matrix.data_ptr(), matrix.shape, matrix.stride(0), matrix.dtype, rows, written)
        found = self._maps.get(key)
        if found is None:
            found = self._maps[key] = _TensorMap(matrix, rows, written)
            if len(self._maps) > _MAPS:
                self._maps.popitem(last=False)
        return found


class _TensorMap:
    """The driver's description of a row-major matrix: 128 bytes at a multiple of 64, which its Python binding does not keep."""

    def __init__(self, matrix: Tensor, rows: int, written: bool) -> None:
        driver, size = _driver(), matrix.element_size()
        kind, promotion = driver.CUtensorMapDataType, driver.CUtensorMapL2promotion
        row_stride = matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]  # that of a single row may be anything
        self._memory = (ctypes.c_ubyte * 192)()
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64
        status = _library().cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.address),
            int(kind.CU_TENSOR_MAP_DATA_TYPE_UINT8 if size == 1 else kind.CU_TENSOR_MAP_DATA_TYPE_UINT16),
            ctypes.c_uint32(2),
            ctypes.c_void_p(matrix.data_ptr()),
            (ctypes.c_uint64 * 2)(matrix.shape[1], matrix.shape[0]),
            (ctypes.c_uint64 * 1)(row_stride * size),
            (ctypes.c_uint32 * 2)(DEPTH // size, rows),
            (ctypes.c_uint32 * 2)(1, 1),
            int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
            int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
            int(promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE if written else promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
            int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        )
        if status:
            shape = list(matrix.shape)
            raise UnsupportedError(
                f"the CUDA driver cannot describe a matrix {shape} of row stride {row_stride} at {matrix.data_ptr():#x}: error {status}"
            )


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the driver returned besides its status.

    Raises:
        UnsupportedError: the driver refused; with its name for the reason.
    """
    status, *values = answer
    if status != _driver().CUresult.CUDA_SUCCESS:
        raise UnsupportedError(f"the CUDA driver refused the kernel for compute capability 9.0: {status.name}")
    return tuple(values)
