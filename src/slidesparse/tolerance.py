"""The tolerance policy: what counts as equal, in one place, for the tests, ``verify`` and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ONE_ROUNDING = (2.0, 1.2)
TWO_ROUNDINGS = (3.0, 1.6)
"""Allowed largest and RMS error, as multiples of those of the same computation by torch in the same dtype."""


@dataclass(frozen=True)
class Deviation:
    """Largest and root-mean-square error of an output and of torch's against the float64 reference; ``limits`` are multiples."""

    largest: float
    rms: float
    torch_largest: float
    torch_rms: float
    tiny: float
    limits: tuple[float, float]

    @property
    def within(self) -> bool:
        """Whether the policy holds; an error that is not a number never is."""
        worst, mean = self.limits
        return self.largest <= worst * self.torch_largest + self.tiny and self.rms <= mean * self.torch_rms + self.tiny

    def __str__(self) -> str:
        worst, mean = self.limits
        return (
            f"max error {self.largest:.3g} (allowed {worst * self.torch_largest + self.tiny:.3g}), "
            f"RMS error {self.rms:.3g} (allowed {mean * self.torch_rms + self.tiny:.3g})"
        )


def deviation(out: Tensor, reference64: Tensor, same_dtype: Tensor, *, roundings: int = 1) -> Deviation:
    """Measure fp8 and 16-bit outputs: max|out − ref64| ≤ 2 · max|torch − ref64| + tiny and RMS ≤ 1.2×; two roundings: 3× and 1.6×.

    ``same_dtype`` is plain torch's result for the same inputs in the dtype of ``out``. ``tiny`` is half a unit in the last place at
    the scale of the reference: an output must not fail because torch's happens to be exact. All three have one shape.

    Raises:
        ValueError: shapes differ, or ``out`` and ``same_dtype`` have different dtypes.
    """
    if out.shape != reference64.shape or out.shape != same_dtype.shape:
        raise ValueError(f"shapes differ: {list(out.shape)}, {list(reference64.shape)}, {list(same_dtype.shape)}")
    if out.dtype != same_dtype.dtype:
        raise ValueError(f"dtypes differ: {out.dtype} and {same_dtype.dtype}")
    limits = TWO_ROUNDINGS if roundings == 2 else ONE_ROUNDING
    if out.numel() == 0:
        return Deviation(0.0, 0.0, 0.0, 0.0, 0.0, limits)
    error, torch_error = out.double() - reference64.double(), same_dtype.double() - reference64.double()
    tiny = float(reference64.double().abs().mean()) * torch.finfo(out.dtype).eps / 2
    largest, rms = float(error.abs().max()), float(error.square().mean().sqrt())
    return Deviation(largest, rms, float(torch_error.abs().max()), float(torch_error.square().mean().sqrt()), tiny, limits)


def check_close(out: Tensor, reference64: Tensor, same_dtype: Tensor, *, roundings: int = 1) -> None:
    """Hold fp8 and 16-bit outputs to the policy; see `deviation`.

    Raises:
        AssertionError: they break it; the message says by how much.
    """
    measured = deviation(out, reference64, same_dtype, roundings=roundings)
    if not measured.within:
        raise AssertionError(str(measured))


def check_bitwise(out: Tensor, expected: Tensor) -> None:
    """Hold int8 results and everything that only moves values to bitwise equality.

    Raises:
        AssertionError: dtype, shape or a bit differs; the message names the first place.
    """
    if out.dtype != expected.dtype or out.shape != expected.shape:
        raise AssertionError(f"got {out.dtype} {list(out.shape)}, expected {expected.dtype} {list(expected.shape)}")
    wrong = (out.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)) if out.numel() else torch.zeros(0)
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        place = (*place[:-1], place[-1] // out.element_size())
        raise AssertionError(f"{int(wrong.sum())} bytes differ, first at {place}: got {out[place]}, expected {expected[place]}")
