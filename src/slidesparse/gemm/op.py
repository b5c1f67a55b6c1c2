"""Layers behind opaque ops, for compilers: the route is chosen inside by the number of tokens at hand.

``slidesparse::linear`` is a whole linear, and ``slidesparse::linear_with_gradient`` one that autograd records.
``slidesparse::silu_mul_linear`` and ``add_rms_norm_linear`` are whole linears with SwiGLU or a norm in front, in the pass that quantises.
What the graph holds of a layer is a tensor that names it, an input like any weight, so that the graphs of equal layers are equal and
compiled once.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedError
from ..ops.launch import allocate
from ..ops.library import define
from ..ops.prologue import Gated, Normed
from .gradient import WEIGHTS_CHANGED, bias_gradient, refuse_second, wanted
from .runner import Ready, Runner

Find = Callable[[torch.dtype, torch.device], Runner]
"""Gives the runner of a layer for activations of this type on this device."""


LAYER_GONE = "a compiled or traced call runs a layer that is gone: keep its model, and compile or trace anew in another process"


class _ByNumber(dict[int, tuple[Find, int, int]]):
    def __missing__(self, number: int) -> tuple[Find, int, int]:
        raise UnsupportedError(LAYER_GONE)


_LAYERS = _ByNumber()
_NUMBERS = itertools.count(1)


def handle(owner: object, find: Find, margins: tuple[int, int] = (0, 0)) -> Tensor:
    """The tensor that names a layer to the ops of this module, as long as ``owner`` lives.

    ``margins`` are zeros put to the left and right of the activations, see `slidesparse.packing.Shard`.
    """
    number = next(_NUMBERS)
    _LAYERS[number] = (find, *margins)
    weakref.finalize(owner, _LAYERS.pop, number, None)
    # On the host, whatever the default device is: it is read in every call, which must not wait for a GPU.
    return torch.tensor([number], dtype=torch.int64, device="cpu")


def warm(name: Tensor, ready: Ready, tokens: Iterable[int]) -> None:
    """Run a layer that is ready once for each number of tokens, unless an equal layer has run: CUDA graphs may capture it afterwards.

    This makes cuSPARSELt's plans, which do not depend on what stands in front of the product. Triton kernels may still have to be compiled.
    """
    _, left, right = _LAYERS[int(name)]
    problem, device, warm = ready.problem, ready.device, ready.calls.warm
    for m in tokens:
        if m in warm:
            continue
        x = torch.zeros(m, problem.k - left - right, dtype=problem.dtype, device=device)
        bias = None if problem.bias is None else x.new_zeros(problem.n, dtype=problem.bias)
        linear(x, name, bias, problem.n)  # as an op, which runs on the device of x, whichever is current
        warm.add(m)


def _widened(x: Tensor, left: int, right: int) -> Tensor:
    return F.pad(x, (left, right)) if left or right else x


def _run(x: Tensor, name: Tensor, bias: Tensor | None, n: int) -> Tensor:
    find, left, right = _LAYERS[int(name)]
    return find(x.dtype, x.device)(_widened(x, left, right), bias).contiguous()  # as the fake promises: libraries may have padded N


def _run_backward(grad: Tensor, name: Tensor, k: int) -> Tensor:
    find, left, _ = _LAYERS[int(name)]
    version = name._version
    runner = find(grad.dtype, grad.device)
    if name._version != version:  # the layer has found only here that its tensors are others
        raise UnsupportedError(WEIGHTS_CHANGED)
    return runner.input_gradient(grad)[:, left : left + k].contiguous()


def _run_silu_mul(gate_up: Tensor, name: Tensor, bias: Tensor | None, n: int) -> Tensor:
    find, left, right = _LAYERS[int(name)]
    if left or right:
        gate_up = _widened(gate_up.unflatten(1, (2, -1)), left, right).flatten(1)  # silu(0) · 0 is 0
    return find(gate_up.dtype, gate_up.device).behind(Gated(gate_up), bias).contiguous()


def _run_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, name: Tensor, bias: Tensor | None, n: int
) -> tuple[Tensor, Tensor]:
    find, left, right = _LAYERS[int(name)]
    runner, total = find(x.dtype, x.device), allocate(x, x.shape[0], x.shape[1], x.dtype)
    normed = Normed(x, residual, weight, eps, total)
    # Zeros would count in the mean.
    y = runner(_widened(normed.computed(), left, right), bias) if left or right else runner.behind(normed, bias)
    return y.contiguous(), total


_REST = "Tensor name, Tensor? bias, SymInt n"
_linear, _linear_with_gradient = (
    define(
        f"{name}(Tensor x, {_REST}) -> Tensor", oracle=_run, cuda=_run, fake=lambda x, name, bias, n: x.new_empty((x.shape[0], n)),
        differentiable=True,
    )
    for name in ("linear", "linear_with_gradient")
)  # fmt: skip
_linear_backward = define(
    "linear_backward(Tensor grad, Tensor name, SymInt k) -> Tensor",
    oracle=_run_backward, cuda=_run_backward, fake=lambda grad, name, k: grad.new_empty((grad.shape[0], k)),
)  # fmt: skip


def linear(x: Tensor, name: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Run the layer that `handle` named: ``x [M, K]`` → ``[M, n]``; one op to torch.compile, with any number of tokens.

    Where autograd must record it, it is another op: looking whether it must would cost every call of this one host time.

    Raises:
        UnsupportedError: the layer is gone, or cannot run such activations; the other ops raise it, too.
    """
    return _linear_with_gradient(x, name, bias, n) if wanted(x, bias) else _linear(x, name, bias, n)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, name, bias, _ = inputs
    ctx.save_for_backward(name)
    ctx.k, ctx.bias = x.shape[1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second(grad)
    (name,), (of_x, _, of_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
    return _linear_backward(grad, name, ctx.k) if of_x else None, None, bias_gradient(grad, ctx.bias) if of_bias else None, None


torch.library.register_autograd("slidesparse::linear_with_gradient", _backward, setup_context=_keep)

silu_mul_linear = define(
    f"silu_mul_linear(Tensor gate_up, {_REST}) -> Tensor",
    oracle=_run_silu_mul, cuda=_run_silu_mul, fake=lambda gate_up, name, bias, n: gate_up.new_empty((gate_up.shape[0], n)),
)  # fmt: skip
"""`linear` of silu(gate) · up, for a layer of 8 bits: ``gate_up [M, 2K]``, gates first → ``[M, n]``.

One kernel gates, quantises and lifts, where there is one.
"""

add_rms_norm_linear = define(
    f"add_rms_norm_linear(Tensor x, Tensor residual, Tensor weight, float eps, {_REST}) -> (Tensor, Tensor)",
    oracle=_run_add_rms_norm, cuda=_run_add_rms_norm,
    fake=lambda x, residual, weight, eps, name, bias, n: (x.new_empty((x.shape[0], n)), x.new_empty(x.shape)),
)  # fmt: skip
"""`linear` of the RMSNorm of x plus the residual, both ``[M, K]``, for a layer of 8 bits → ``[M, n]``, and that sum ``[M, K]``.

One kernel adds, norms, quantises and lifts, where there is one.
"""
