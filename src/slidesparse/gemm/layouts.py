"""The forms in which weights are resident: each knows its bytes, how the stored tensors become it, and the way back to dense."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..format import Packed, packed_tensors
from ..ops import cusparselt, sm90
from ..ops.library import one
from ..ops.quantize import moves_nothing
from ..quantization import expand_nvfp4
from .problem import Problem, Weights

Copy = tuple[Tensor, ...]
"""The tensors of one layer in one layout, those that it has."""


class Layout(Protocol):
    """One form of the weights.

    ``nbytes`` tells its size before it is made, ``prepare`` makes it, ``dense`` gives back ``[N, K]`` in `Problem.compute_dtype`, to which
    channel scales, or the global scale of nvfp4, are still to be applied. Copies of the latter end with block scales and global scale.
    """

    name: str

    def nbytes(self, problem: Problem) -> int: ...

    def prepare(self, problem: Problem, weights: Weights) -> Copy: ...

    def dense(self, problem: Problem, copy: Copy) -> Tensor: ...


class PackedLayout:
    """The stored tensors themselves: values, keep-bits, and what scales there are."""

    name = "packed"

    def nbytes(self, problem: Problem) -> int:
        """Values and keep-bits; scales, which every layout needs, are not counted."""
        specs = packed_tensors(problem.scheme, problem.pattern, problem.n, problem.k)[:2]
        return sum(spec.nbytes for spec in specs)

    def prepare(self, problem: Problem, weights: Weights) -> Copy:
        """Nothing is copied."""
        one(weights.packed.values.device)  # kernels ask for it later, perhaps while a CUDA graph is captured
        scales = (scale for scale in (weights.scale, weights.global_scale) if scale is not None)
        return weights.packed.values, weights.packed.keep, *scales

    def stored(self, problem: Problem, copy: Copy) -> Packed:
        """The packed matrix."""
        scheme = problem.scheme
        return Packed(copy[0], copy[1], scheme.pattern_stored(problem.pattern), scheme.k_stored(problem.k))

    def dense(self, problem: Problem, copy: Copy) -> Tensor:
        """Restored."""
        dense = ops.restore(self.stored(problem, copy))
        return expand_nvfp4(dense, copy[2], problem.compute_dtype) if problem.scheme.pair else dense.to(problem.compute_dtype)


class DenseLayout:
    """Restored weights ``[N, K]``."""

    name = "dense"

    def nbytes(self, problem: Problem) -> int:
        """N · K weights in `Problem.compute_dtype`."""
        return problem.n * problem.k * problem.compute_dtype.itemsize

    def prepare(self, problem: Problem, weights: Weights) -> Copy:
        """Restore them."""
        stored = PACKED.prepare(problem, weights)
        dense = PACKED.dense(problem, stored)
        return (dense, *stored[2:]) if problem.scheme.pair else (dense,)

    def dense(self, problem: Problem, copy: Copy) -> Tensor:
        """The copy itself."""
        return copy[0]


class SlidLayout:
    """Weights slid to 2:4 and compressed by cuSPARSELt, opaque uint8 ``[bytes]``; with int8 their scales, float32 ``[N padded]``."""

    name = "slid"

    def nbytes(self, problem: Problem) -> int:
        """What the library's compressed form takes."""
        rows, width = self.padded(problem)
        return cusparselt.compressed_bytes(rows, width, problem.scheme.dtype)

    def padded(self, problem: Problem) -> tuple[int, int]:
        """N and K' rounded up to what the library takes."""
        align = cusparselt.alignment(problem.scheme.dtype)
        slid = problem.pattern.slid_k(problem.k)
        return -(-problem.n // align) * align, -(-slid // align) * align

    def prepare(self, problem: Problem, weights: Weights) -> Copy:
        """Slide and compress; the scales are padded by ones."""
        rows, width = self.padded(problem)
        slid = ops.slide(weights.packed, width=width, rows=cusparselt.alignment(problem.scheme.dtype))
        scale = weights.channel_scale
        if scale is None or not cusparselt.scales_rows(problem.scheme.dtype, torch.bfloat16):
            return (cusparselt.compress(slid),)
        return cusparselt.compress(slid), F.pad(scale.view(-1), (0, rows - problem.n), value=1.0)

    def dense(self, problem: Problem, copy: Copy) -> Tensor:
        """The product with the lifted unit matrix, whose sums are exact: one weight and zeros."""
        rows, width = self.padded(problem)
        dtype = problem.scheme.dtype
        unit = torch.eye(problem.k, device=copy[0].device).to(dtype)
        lifted = F.pad(unit, (0, width - problem.k)) if moves_nothing(problem.pattern, 0) else ops.lift(unit, problem.pattern, width=width)
        tokens = -(-problem.k // cusparselt.TOKENS) * cusparselt.TOKENS
        q = torch.zeros(tokens, width, dtype=torch.uint8 if dtype.itemsize == 1 else torch.int16, device=unit.device).view(dtype)
        q[: problem.k] = lifted
        sums = cusparselt.sparse_mm(q, copy[0], None, rows, cusparselt.EXACT_DTYPES[dtype])
        return sums[: problem.k, : problem.n].t().to(problem.compute_dtype).contiguous()


class TiledLayout:
    """Weights slid to 2:4 in the order in which the kernel reads them: uint8 ``[tiles down, across, bytes]``."""

    name = "tiled"

    def nbytes(self, problem: Problem) -> int:
        """Half the slid values and two bits for each, in whole tiles."""
        return sm90.tiled_bytes(problem.n, problem.pattern.slid_k(problem.k), problem.scheme.dtype.itemsize)

    def prepare(self, problem: Problem, weights: Weights) -> Copy:
        """Slide and put into tiles."""
        return (sm90.tile(ops.slide(weights.packed)),)

    def dense(self, problem: Problem, copy: Copy) -> Tensor:
        """Out of the tiles, each slid weight to the column that was lifted there."""
        slid = sm90.untile(copy[0], problem.n, problem.pattern.slid_k(problem.k), problem.scheme.dtype)
        columns = torch.arange(1, problem.k + 1, dtype=torch.float32, device=slid.device).view(1, -1)
        source = reference.lift(columns, problem.pattern)[0].long() - 1
        bits = slid.view(torch.uint8 if slid.element_size() == 1 else torch.int16)
        row, column = bits.nonzero(as_tuple=True)
        dense = torch.zeros(problem.n, problem.k, dtype=bits.dtype, device=slid.device)
        dense[row, source[column]] = bits[row, column]
        return dense.view(problem.scheme.dtype)


PACKED, SLID = PackedLayout(), SlidLayout()
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (PACKED, DenseLayout(), SLID, TiledLayout())}
