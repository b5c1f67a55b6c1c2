"""Launching the kernel for compute capability 9.0: descriptors of the matrices, the order of the tiles, and the call."""

from __future__ import annotations

import ctypes
import secrets
from collections import OrderedDict
from functools import cache, lru_cache
from itertools import count, zip_longest
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import jit
from ...errors import UnsupportedError
from ..launch import allocator
from .layout import DEPTH, ROWS, tiles
from .schedule import Item, split, tile_order, whole
from .variants import CHUNK, THREADS, Types, Variant, constants, part_bytes, shared_bytes, source

_GROUP = 8
"""Token tiles that follow each other before the features advance: what they share stays in the second-level cache."""
_MAPS = 4096
_LAUNCHES = count(secrets.randbits(62))
"""Numbers of launches, unlike what memory may hold by chance."""


class Table(NamedTuple):
    """What clusters work on, int32 ``[items, 4]``, a cluster's ``clusters`` apart, and whether some leave sums to others."""

    items: Tensor
    clusters: int
    shared: bool


@cache
def table(down: int, across: int, group: int, steps: int, clusters: int, divided: bool, device: int) -> Table:
    """The items of every cluster, empty ones behind the last.

    No table is freed: a CUDA graph reads it for as long as it lives, and nobody knows how long that is. Many numbers of tokens share one.

    Raises:
        UnsupportedError: a CUDA graph is captured.
    """
    _refuse_capture()
    lists = (split if divided else whole)(tile_order(down, across, group), steps, clusters)
    found = [item for row in zip_longest(*lists, fillvalue=Item(0, 0, 0)) for item in row]
    while not found[-1].steps:
        del found[-1]
    items = torch.tensor(found, dtype=torch.int32, device=torch.device("cuda", device))
    return Table(items, len(lists), any(item.parts for item in found))


def _refuse_capture() -> None:
    """Nothing can be compiled, or copied from the host, while a CUDA graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError("run the layer once with as many tokens before capturing a CUDA graph: its kernel is made ready then")


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
        _refuse_capture()
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
        overlap = driver.CUlaunchAttribute()
        overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [cluster, overlap], 2
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        config.gridDimX = multiprocessors // variant.cluster * variant.cluster
        (fitting,) = _checked(driver.cuOccupancyMaxActiveClusters(kernel, config))
        if not fitting:
            raise UnsupportedError(f"no cluster of {variant.cluster} blocks with {shared} bytes of shared memory fits this GPU")
        self.clusters = min(fitting, multiprocessors // variant.cluster)
        self._values = [(ctypes.c_ubyte * 192)() for _ in range(3)]
        self._pointers = [ctypes.c_void_p() for _ in range(6)]
        self._launch = ctypes.c_uint64()
        self._numbers = [ctypes.c_int() for _ in range(6)]
        # Tensor maps lie at multiples of 64 bytes.
        self._aligned = [-(-ctypes.addressof(value) // 64) * 64 for value in self._values]
        places = [*self._aligned, *(ctypes.addressof(one) for one in (*self._pointers, self._launch, *self._numbers))]
        self._arguments = (ctypes.c_void_p * len(places))(*places)

    def table(self, m: int, n: int, k: int) -> Table:
        """What clusters work on in a product ``[M, N]`` of K' columns; see `table`."""
        variant = self.variant
        down, across = -(-n // (ROWS * variant.cluster_features)), -(-m // (variant.tile_tokens * variant.cluster_tokens))
        steps = tiles(n, k, self.types.size)[1]
        return table(down, across, max(1, _GROUP // variant.cluster_tokens), steps, self.clusters, variant.split, self.device)

    def __call__(
        self, q: Tensor, x_scale: Tensor | None, weights: Tensor, w_scale: Tensor | None, bias: Tensor | None, work: Table, y: Tensor,
        stream: int, *, early: bool = False,
    ) -> None:  # fmt: skip
        """Launch; the number of tokens is that of ``y``, and ``weights`` are tiles, or ``[N, K]`` where they are dense.

        With ``early`` weights are read while the kernel before may still run. That kernel must not write weights, and must let this one
        start only when all kernels before itself have ended. Kernels of this package that quantise or lift satisfy both.
        """
        m, n = y.shape
        if m == 0:
            return
        sparse, driver, variant = self.types.sparse, _driver(), self.variant
        box = min(m, variant.tile_tokens // variant.cluster_features)
        x_map = self._map(q, box)
        w_map = x_map if sparse else self._map(weights, ROWS // variant.cluster_tokens)
        y_map = self._map(y, CHUNK, written=True)
        steps, blocks = tiles(n, q.shape[1], self.types.size)[1], work.clusters * variant.cluster
        sums = allocator(y.device)((blocks * part_bytes(variant),), (1,), torch.uint8) if work.shared else None
        with self._lock:
            for place, one in zip(self._aligned, (x_map, w_map, y_map), strict=True):
                ctypes.memmove(place, one.address, 128)
            for pointer, tensor in zip(self._pointers, (weights, x_scale, w_scale, bias, work.items, sums), strict=True):
                pointer.value = None if tensor is None else tensor.data_ptr()
            self._launch.value = next(_LAUNCHES)
            for number, value in zip(self._numbers, (work.items.numel() // 4, steps, m, n, box * DEPTH, early), strict=True):
                number.value = value
            self._config.gridDimX = blocks
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
