"""Fast algorithms of cuSPARSELt for one product: what its own search picks, and every configuration, each verified and timed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..compat.nvmath import numbers
from ..errors import UnsupportedError
from .cusparselt_plans import Algorithm, LibraryPlan, Multiplication, refusals
from .library import capability

_LOG = logging.getLogger(__name__)

_RUNS = 3
_RETURNED = 4
_SPLIT = 4
"""So many of the fastest configurations are tried with K split as well."""
_TILE, _WAVES = 128, 2
"""K is split only where tiles of 128 × 128 fill the multiprocessors fewer times than this."""
_SEARCH_WORKSPACE = 32 << 20
"""The library's search may try algorithms that take more scratch than the one it begins with."""
_STREAM_K = 6


def search(q: Tensor, compressed: Tensor, alpha: Tensor | None, n: int, out_dtype: torch.dtype) -> list[Algorithm]:
    """See `slidesparse.ops.cusparselt.search`; the operands' device must be the current one, and their check is left to it.

    float16 gets the library's default: among its other configurations some stop the device with an illegal instruction, in the library's
    own search too (0.8.0 on compute capability 9.0).
    """
    m, k = q.shape
    if not m:
        return []
    if q.dtype == torch.float16:
        return [Algorithm()]
    wanted = Multiplication(q.device.index, n, k, m, q.dtype, out_dtype, alpha is not None, "")
    trial = _Trial(wanted, q, compressed, alpha)
    picked, highest = trial.by_library()
    times = trial.times([*picked, *(Algorithm(number) for number in range(highest + 1))])
    tiles = -(-n // _TILE) * -(-m // _TILE)
    if tiles < _WAVES * torch.cuda.get_device_properties(q.device).multi_processor_count:
        fastest = sorted(times, key=times.__getitem__)[:_SPLIT]
        times |= trial.times(split for one in fastest for split in splits(one, capability(q.device)))
    return sorted(times, key=times.__getitem__)[:_RETURNED]


def splits(algorithm: Algorithm, capability: tuple[int, int]) -> Iterator[Algorithm]:
    """The same configuration with K split in the ways that cards of this capability know."""
    if algorithm.split_k or algorithm.config_id is None:
        return
    if capability < (9, 0):
        for slices in (2, 4):
            for kernels in (1, 2):
                yield replace(algorithm, split_k=slices, split_k_mode=kernels)
    elif capability == (9, 0):
        # Not on later cards: making such a plan has been seen to hang there.
        yield replace(algorithm, split_k=-1)
    else:
        yield replace(algorithm, split_k_mode=_STREAM_K)


class _Trial:
    """One product, its expected result and how far from it an algorithm may be."""

    def __init__(self, wanted: Multiplication, q: Tensor, compressed: Tensor, alpha: Tensor | None) -> None:
        self._wanted, self._operands = wanted, (q, compressed, alpha)
        self._expected = torch.empty((wanted.m, wanted.n), dtype=wanted.out_dtype, device=q.device)
        self._y = torch.empty_like(self._expected)
        LibraryPlan(wanted).run(*self._operands, self._expected)
        self._allowed = self._tolerance()

    def _tolerance(self) -> Tensor | None:
        """None if results must be equal; integer sums are rounded once, others also depend on the order of summation."""
        if self._wanted.out_dtype == torch.int32:
            return None
        expected, eps = self._expected, torch.finfo(self._wanted.out_dtype).eps
        if self._wanted.dtype == torch.int8:
            return expected.abs().mul_(eps)
        # A missing step of K is more than this: 64 of 30 000 terms are 5 % of the root mean square. fp8 sums keep fewer bits than float32.
        part = 30 if self._wanted.dtype == torch.float8_e4m3fn else 100
        rms = torch.linalg.vector_norm(expected, dtype=torch.float32) / expected.numel() ** 0.5
        return expected.abs().mul_(2 * eps).add_(torch.where(rms.isfinite(), rms / part, 0.0))

    def _right(self) -> Tensor:
        equal = self._y == self._expected
        if self._allowed is not None:
            equal |= (self._y - self._expected).abs_() <= self._allowed
        return equal.all()

    def by_library(self) -> tuple[list[Algorithm], int]:
        """What the library's own search selects, if it works, and its highest configuration number."""
        plan = LibraryPlan(self._wanted)
        highest = plan.get(numbers().config_max_id)
        try:
            with refusals(f"to search for {self._wanted}"):
                plan.set(numbers().search_iterations, _RUNS)
                plan.run(*self._operands, self._y, search_bytes=_SEARCH_WORKSPACE)
                picked = plan.algorithm
        except UnsupportedError as error:
            _LOG.debug("%s", error)
            return [], highest
        if picked.split_k in (0, 1):
            later = capability(self._y.device) >= (10, 0)
            picked = Algorithm(picked.config_id, split_k_mode=picked.split_k_mode if later else 0)
        return [picked], highest

    def times(self, algorithms: Iterable[Algorithm]) -> dict[Algorithm, float]:
        """Milliseconds of `_RUNS` calls for each algorithm that runs and is right."""
        started = {}
        for algorithm in dict.fromkeys(algorithms):
            try:
                plan = LibraryPlan(self._wanted._replace(algorithm=str(algorithm)))
                self._y.fill_(torch.nan if self._y.is_floating_point() else torch.iinfo(self._y.dtype).min)
                plan.run(*self._operands, self._y)
            except UnsupportedError as error:
                _LOG.debug("%s", error)
                continue
            right = self._right()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_RUNS):
                plan.run(*self._operands, self._y)
            end.record()
            started[algorithm] = (right, start, end, plan)
        torch.cuda.synchronize()
        times = {}
        for algorithm, (right, start, end, _) in started.items():
            if bool(right):
                times[algorithm] = start.elapsed_time(end)
            else:
                _LOG.warning("cuSPARSELt's algorithm %s gives wrong results for %s: dropped", algorithm, self._wanted)
        return times
