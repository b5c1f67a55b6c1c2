"""Layers behind one opaque op, for engines that compile a model once for every number of tokens.

``slidesparse::linear`` is a whole linear. ``slidesparse::sums`` leaves token scales and bias to the engine's graph, where its compiler
fuses them into whatever consumes the output; ``slidesparse::silu_mul_sums`` and ``add_rms_norm_sums`` do the same with SwiGLU or a norm in
front of it. The route is chosen inside the op by the number of tokens at hand. What the compiled graph holds of a layer is a tensor that
names it, an input like any weight, so that the graphs of equal layers are equal and compiled once.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..ops.library import allocate, define
from .activations import Activations, Gated, Normed
from .execution import Execution
from .problem import Problem


@dataclass(frozen=True)
class Prepared:
    """A layer ready to run on inputs of one kind; ``left`` and ``right`` zeros widen its activations first."""

    execution: Execution
    problem: Problem
    device: torch.device
    left: int = 0
    right: int = 0

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [M, K - left - right]`` → ``[M, N]``."""
        if bias is None and self.problem.bias is not None:
            bias = x.new_zeros(self.problem.n, dtype=self.problem.bias)
        return self.execution(self.widened(x), bias)

    def widened(self, x: Tensor) -> Tensor:
        """``x [M, K - left - right]`` → ``[M, K]``."""
        return F.pad(x, (self.left, self.right)) if self.left or self.right else x


class _ByNumber(dict[int, Prepared]):
    def __missing__(self, number: int) -> Prepared:
        raise UnsupportedError(f"there is no prepared layer {number}: its model was deleted, or it belongs to another process")


_PREPARED = _ByNumber()
_NUMBERS = itertools.count(1)
_warmed: set[tuple[Problem, int, torch.device, str, bool]] = set()


def prepare(
    owner: nn.Module,
    execution: Execution,
    dtype: torch.dtype,
    device: torch.device,
    bias: torch.dtype | None,
    *,
    margins: tuple[int, int] = (0, 0),
) -> Tensor:
    """Make a layer ready for activations and a bias of these types, and return the tensor that names it to `linear` and `sums`.

    Its resident copies live as long as ``owner``. The packed weights are given up unless a route reads them, so no other kind of input
    can be run afterwards. ``margins`` are zeros put to the left and right of the activations, see `slidesparse.pack.Shard`.

    Raises:
        UnsupportedError: the backend asked for cannot run this.
    """
    ready = execution.prepare(dtype, device, bias)
    weights = execution.weights
    if "packed" not in ready.resident:
        packed = replace(weights.packed, values=weights.packed.values.to("meta"), keep=weights.packed.keep.to("meta"))
        scale = None if weights.scale is None else weights.scale.to(device)
        execution.weights = replace(weights, packed=packed, scale=scale)
    number = next(_NUMBERS)
    _PREPARED[number] = Prepared(execution, ready.problem, ready.device, *margins)
    weakref.finalize(owner, _PREPARED.pop, number, None)
    # On the host, whatever the default device is: it is read in every call, which must not wait for a GPU.
    return torch.tensor([number], dtype=torch.int64, device="cpu")


def warm(name: Tensor, tokens: Iterable[int]) -> None:
    """Run a prepared layer once for each number of tokens, unless one of the same shape was: CUDA graphs may capture it afterwards.

    The library's plans are made then, whatever stands in front of the product; kernels that are not compiled yet are Triton's matter.
    """
    prepared = _PREPARED[int(name)]
    for m in tokens:
        summed, wanted = prepared.execution.for_sums, prepared.problem
        key = (wanted, m, prepared.device, prepared.execution.route(m), summed)
        if key in _warmed:
            continue
        x = torch.zeros(m, wanted.k - prepared.left - prepared.right, dtype=wanted.dtype, device=prepared.device)
        # As ops, which run on the device of x, whichever is current.
        _sums_op(x, name, wanted.n) if summed else _linear_op(x, name, None, wanted.n)
        _warmed.add(key)


def linear(x: Tensor, name: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Run the prepared layer that `prepare` named: ``x [M, K]`` → ``[M, n]``; one op to torch.compile, with any number of tokens.

    Raises:
        UnsupportedError: the layer is gone, or was prepared for other types.
    """
    return _linear_op(x, name, bias, n)


def sums(x: Tensor, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Run the prepared layer that `prepare` named but for its epilogue: ``x [M, K]`` → bfloat16 ``[M, n]`` and token scales ``[M, 1]``.

    Its `Execution` must have been made for sums. What is left to do, in float32: y = sums · weight scales · token scales + bias, without
    the weight scales if `Problem.scales_sums`.

    Raises:
        UnsupportedError: the layer is gone, or was prepared for something else.
    """
    return _sums_op(x, name, n)


def silu_mul_sums(gate_up: Tensor, scale: Tensor | None, channel: Tensor | None, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`sums` of silu(gate) · up: ``gate_up [M, 2K]``, gates first, times ``channel`` scales and token ``scale`` first, see `Gated`.

    One kernel gates, quantises and lifts, where there is one.

    Raises:
        UnsupportedError: as `sums`.
    """
    return _silu_mul_sums_op(gate_up, scale, channel, name, n)


def add_rms_norm_sums(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None, channel: Tensor | None, name: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`sums` of the RMSNorm of x plus the residual, x times ``channel`` scales and token ``scale`` first, see `Normed`; and that sum.

    One kernel adds, norms, quantises and lifts, where there is one.

    Raises:
        UnsupportedError: as `sums`.
    """
    return _add_rms_norm_sums_op(x, residual, weight, eps, scale, channel, name, n)


def _run(x: Tensor, name: Tensor, bias: Tensor | None, n: int) -> Tensor:
    prepared = _PREPARED[int(name)]
    wanted = prepared.problem
    if x.device != prepared.device:
        raise UnsupportedError(f"a layer prepared on {prepared.device} was given activations on {x.device}")
    if x.dtype != wanted.dtype or (bias is not None and bias.dtype != wanted.bias):
        raise UnsupportedError(
            f"a layer prepared for {wanted.dtype} activations and a bias of {wanted.bias} was given {x.dtype} and "
            f"{None if bias is None else bias.dtype}"
        )
    return prepared(x, bias).contiguous()  # as `_fake` promises: libraries may have padded N


def _run_sums(x: Activations, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
    prepared = _PREPARED[int(name)]
    execution = prepared.execution
    if prepared.left or prepared.right:
        x = prepared.widened(x if isinstance(x, Tensor) else x.computed())
    y, scale = execution.sums(x)
    return y.contiguous(), scale


def _run_silu_mul_sums(gate_up: Tensor, scale: Tensor | None, channel: Tensor | None, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return _run_sums(Gated(gate_up, scale, channel), name, n)


def _run_add_rms_norm_sums(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None, channel: Tensor | None, name: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total = allocate(x, *x.shape, x.dtype)
    return *_run_sums(Normed(x, residual, weight, eps, total, scale, channel), name, n), total


def _silu_mul_sums_fake(gate_up: Tensor, scale: Tensor | None, channel: Tensor | None, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return _sums_fake(gate_up, name, n)


def _add_rms_norm_sums_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None, channel: Tensor | None, name: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return *_sums_fake(x, name, n), x.new_empty(x.shape)


def _sums_fake(x: Tensor, name: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], n), dtype=torch.bfloat16), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _fake(x: Tensor, name: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((x.shape[0], n))


_linear_op = define("linear(Tensor x, Tensor name, Tensor? bias, SymInt n) -> Tensor", oracle=_run, cuda=_run, fake=_fake)
_silu_mul_sums_op = define(
    "silu_mul_sums(Tensor gate_up, Tensor? scale, Tensor? channel, Tensor name, SymInt n) -> (Tensor, Tensor)",
    oracle=_run_silu_mul_sums, cuda=_run_silu_mul_sums, fake=_silu_mul_sums_fake,
)  # fmt: skip
_add_rms_norm_sums_op = define(
    "add_rms_norm_sums(Tensor x, Tensor residual, Tensor weight, float eps, Tensor? scale, Tensor? channel, Tensor name, SymInt n)"
    " -> (Tensor, Tensor, Tensor)", oracle=_run_add_rms_norm_sums, cuda=_run_add_rms_norm_sums, fake=_add_rms_norm_sums_fake,
)  # fmt: skip
_sums_op = define("sums(Tensor x, Tensor name, SymInt n) -> (Tensor, Tensor)", oracle=_run_sums, cuda=_run_sums, fake=_sums_fake)
