"""What calibrated methods know of a layer's inputs, how the knowledge is gathered, and the layer error measured with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import WeightError

_ERROR_ROWS = 4096


@dataclass(frozen=True)
class Statistics:
    """Second moments of a layer's inputs x ``[tokens, K]``, means over the tokens.

    Attributes:
        hessian: x xᵀ, float32 ``[K, K]``; None where only the norms are known.
        norms: root of the mean x_k², float32 ``[K]``.
    """

    hessian: Tensor | None
    norms: Tensor

    @property
    def moments(self) -> Tensor:
        """The `hessian` of those that hold more than norms.

        Raises:
            WeightError: they hold norms only.
        """
        if self.hessian is None:
            raise WeightError("this pruning method needs the second moments of the inputs [K, K], the statistics hold norms only")
        return self.hessian

    def check(self, k: int, *, hessian: bool) -> None:
        """Whether these are statistics of a layer with ``k`` inputs.

        Raises:
            WeightError: another shape, no ``hessian`` where one is needed, or values that are not finite.
        """
        held: dict[str, tuple[Tensor, tuple[int, ...]]] = {"norms": (self.norms, (k,))}
        if hessian or self.hessian is not None:
            held["hessian"] = self.moments, (k, k)
        for name, (tensor, shape) in held.items():
            if tuple(tensor.shape) != shape:
                raise WeightError(f"{name} of the inputs have shape {list(tensor.shape)}, a layer with K = {k} needs {list(shape)}")
            if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
                raise WeightError(f"{name} of the inputs hold NaN or Inf: the model does not run on the calibration samples")


class Gathering:
    """Adds inputs up into `Statistics`: float32 ``[K, K]`` on the inputs' device."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Inputs ``[..., K]`` of any float type; products are exact for 16-bit inputs and summed in float32."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.is_cuda and rows.dtype != torch.float32:
            part = torch.mm(rows.t(), rows, out_dtype=torch.float32)
        else:
            rows = rows.float()
            part = rows.t() @ rows
        self._sum = part if self._sum is None else self._sum.add_(part)
        self._tokens += rows.shape[0]

    def statistics(self) -> Statistics:
        """The means; nothing may be added afterwards.

        Raises:
            WeightError: no input was added.
        """
        if self._sum is None or self._tokens == 0:
            raise WeightError("no calibration token reached the layer")
        hessian, self._sum = self._sum.div_(self._tokens), None
        return Statistics(hessian, hessian.diagonal().clamp(min=0).sqrt())


@dataclass(frozen=True)
class Scaled:
    """A damped Hessian with unit diagonal, ``hessian [K, K]``, and the ``scale [K]`` by which weights are multiplied to match.

    Dead inputs keep a diagonal of the damping alone, so nothing is divided by zero.
    """

    hessian: Tensor
    scale: Tensor

    @classmethod
    def of(cls, statistics: Statistics, damping: float) -> Scaled:
        """H + damping · mean(diag H) · I, then divided by its diagonal's roots on both sides."""
        hessian = statistics.moments.float().clone()
        diagonal = hessian.diagonal()
        mean = float(diagonal.mean())
        diagonal.add_(damping * mean if mean > 0 else 1.0)
        scale = diagonal.sqrt()
        return cls(hessian.div_(scale).div_(scale.unsqueeze(-1)), scale)

    @cached_property
    def inverse(self) -> Tensor:
        """The Hessian's inverse ``[K, K]``.

        Raises:
            WeightError: see `positive_inverse`.
        """
        return positive_inverse(self.hessian)


def positive_inverse(matrix: Tensor, shift: float = 0.0) -> Tensor:
    """(matrix + shift · I)⁻¹ of a positive definite float32 ``[K, K]``.

    Raises:
        WeightError: see `_cholesky`.
    """
    return torch.cholesky_inverse(_cholesky(matrix, shift)).float()


def inverse_factor(matrix: Tensor) -> Tensor:
    """The upper U with Uᵀ U = matrix⁻¹ of a positive definite float32 ``[K, K]``.

    With J the reversal of order and J matrix J = L Lᵀ, U = J L⁻¹ J. The inverse itself, which rounding may leave short of positive
    definite, is never formed.

    Raises:
        WeightError: see `_cholesky`.
    """
    factor = _cholesky(matrix.flip(0, 1))
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1).float()


def _cholesky(matrix: Tensor, shift: float = 0.0) -> Tensor:
    """The lower L with L Lᵀ = matrix + shift · I, ``[K, K]``: float32, or float64 where that does not suffice.

    Raises:
        WeightError: the matrix is not positive definite in float64 either.
    """
    for dtype in (torch.float32, torch.float64):
        shifted = matrix.to(dtype, copy=True)
        shifted.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed) == 0:
            return factor
        del shifted, factor  # [K, K] each, before twice as much is asked for
    raise WeightError("the second moments of the inputs are not positive definite: use more calibration samples")


def row_errors(weight: Tensor, solution: Tensor, hessian: Tensor) -> Tensor:
    """(s − w) H (s − w)ᵀ of every row, float64 ``[N]``, for weights and solution ``[N, K]``."""
    parts = []
    for first in range(0, weight.shape[0], _ERROR_ROWS):
        rows = slice(first, first + _ERROR_ROWS)
        difference = solution[rows].float() - weight[rows].float()
        parts.append((difference @ hessian).mul_(difference).sum(-1, dtype=torch.float64))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=weight.device)


def layer_error(weight: Tensor, solution: Tensor, statistics: Statistics) -> float:
    """Relative error of a layer's output, tr(D H Dᵀ) / tr(W H Wᵀ) with D = solution − weight, both ``[N, K]``; 0 for a silent layer."""
    error = float(row_errors(weight, solution, statistics.moments).sum())
    whole = float(row_errors(torch.zeros_like(weight), weight, statistics.moments).sum())
    return error / whole if whole > 0 else 0.0
