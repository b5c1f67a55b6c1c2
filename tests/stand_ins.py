"""A CUDA card and cuSPARSELt played by plain torch on the CPU: what is bound, allocated and handed over is real, launches are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor

from slidesparse import reference
from slidesparse.format import SCHEMES
from slidesparse.gemm import Weights
from slidesparse.ops import cusparselt, cusparselt_plans, launch, library, prologue
from slidesparse.ops.fused import added_norm, silu_mul
from slidesparse.pattern import Pattern

base, cusparselt_kernel, dense, runner = (
    import_module(f"slidesparse.gemm.{name}") for name in ("kernels.base", "kernels.cusparselt", "kernels.dense", "runner")
)
SM90 = (9, 0)


class Product:
    """In place of a plan of the library: exact products, rounded to float32, scaled if there is an alpha, rounded to the output's type."""

    def run(self, q: Tensor, weight: Tensor, alpha: Tensor | None, y: Tensor) -> None:
        sums = (q.double() @ weight.double().t()).float()
        y.copy_(sums if alpha is None else sums * alpha)


def sparse_mm(q: Tensor, weight: Tensor, alpha: Tensor | None, n: int, dtype: torch.dtype, algorithm: str = "") -> Tensor:
    """The library's op on weights that are slid but not compressed."""
    y = torch.empty(q.shape[0], n, dtype=dtype)
    Product().run(q, weight, alpha, y)
    return y


def scaled_mm(q: Tensor, weight: Tensor, row: Tensor, column: Tensor, bias: Tensor | None = None, *, out_dtype, use_fast_accum) -> Tensor:
    """``torch._scaled_mm``: exact products, scaled in float32, rounded once."""
    return reference.scaled((q.double() @ weight.double()).float(), row, column, bias, out_dtype)


def bound_w8a8(m: int, n: int, k: int, device, dtype: torch.dtype, bias: torch.dtype | None) -> Callable[..., Tensor]:
    """The dense int8 kernel's launch."""

    def product(q: Tensor, x_scale: Tensor, copy: tuple[Tensor, ...], w_scale: Tensor, added: Tensor | None) -> Tensor:
        assert q.shape == (m, k) and copy[0].shape == (n, k) and (None if added is None else added.dtype) == bias
        return reference.linear(q, x_scale, copy[0], w_scale, added, dtype)

    return product


def quantize_call(x: Tensor, pattern: Pattern | None, dtype: torch.dtype, offset: int, width: int) -> Callable:
    """The launch that quantises and lifts; rows that only pad are left as they are."""

    def call(x: Tensor, q: Tensor, scale: Tensor) -> None:
        assert q.shape[1] == width and q.dtype == dtype
        values, found = reference.quantize(x, SCHEMES["int8" if dtype == torch.int8 else "fp8"])
        values = values if pattern is None else reference.lift(values, pattern)
        q.view(torch.int8)[: x.shape[0]] = 0
        q[: x.shape[0], : values.shape[1]] = values
        scale.copy_(found)

    return call


def _parsed(text: str) -> Pattern | None:
    return Pattern.parse(text) if text else None


def silu_call(gate_up: Tensor, dtype: torch.dtype, pattern: str, width: int) -> Callable:
    quantise = quantize_call(gate_up, _parsed(pattern), dtype, 0, width)

    def call(gate_up: Tensor, q: Tensor, scale: Tensor) -> None:
        quantise(silu_mul(gate_up), q, scale)

    return call


def norm_call(x: Tensor, residual: Tensor, eps: float, dtype: torch.dtype, pattern: str, width: int) -> Callable:
    quantise = quantize_call(x, _parsed(pattern), dtype, 0, width)

    def call(x: Tensor, weight: Tensor, residual: Tensor, total: Tensor, q: Tensor, scale: Tensor) -> None:
        found, normed = added_norm(x, weight, residual, eps)
        total.copy_(found)
        quantise(normed, q, scale)

    return call


def rescale_call(types: tuple, m: int, n: int, stride: int) -> Callable:
    """The pass behind the product; launches are shared by what they were made for, which must be what comes."""

    def call(acc: Tensor, y: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None) -> None:
        given = (acc, y, x_scale, w_scale, bias)
        assert types == tuple(None if tensor is None else tensor.dtype for tensor in given) and acc.stride(0) == stride
        assert y.shape == (m, n)
        columns = None if w_scale is None else w_scale.view(1, -1)
        y.copy_(reference.scaled(acc[:m, :n], x_scale, columns, bias, y.dtype))

    return call


def poisoned(device: torch.device) -> Callable[..., Tensor]:
    """Memory whose every byte is 255: NaN, where a type has them."""

    def empty(size: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty_strided(size, strides, dtype=dtype)
        made.view(torch.uint8).fill_(255)
        return made

    return empty


def pretend_a_card(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Layers on the CPU are bound as on a Hopper; gives the plans that the library was asked for."""
    asked: list[tuple] = []
    problem = Weights.problem
    monkeypatch.setattr(Weights, "problem", lambda *arguments: replace(problem(*arguments), capability=SM90))
    for module in (launch, prologue, cusparselt_plans):
        monkeypatch.setattr(module, "allocator", poisoned)
    for name, function in (("quantize_call", quantize_call), ("silu_call", silu_call), ("norm_call", norm_call)):
        monkeypatch.setattr(prologue, name, function)
    monkeypatch.setattr(prologue, "runs_kernels", lambda device, dtype: True)
    monkeypatch.setattr(library, "_tried", lambda: None)
    monkeypatch.setattr(base, "rescale_call", rescale_call)
    monkeypatch.setattr(dense, "bound_w8a8", bound_w8a8)
    monkeypatch.setattr(dense, "scaled_mm", scaled_mm)
    monkeypatch.setattr(cusparselt, "unavailable", lambda *_: None)
    monkeypatch.setattr(cusparselt, "compress", lambda slid: slid)
    monkeypatch.setattr(cusparselt, "sparse_mm", sparse_mm)
    monkeypatch.setattr(cusparselt, "plan_for", lambda wanted: asked.append(wanted) or Product())
    monkeypatch.setattr(runner, "can_bypass_dispatcher", lambda x: True)
    monkeypatch.setattr(runner, "current_device", lambda: -1)
    # What other tests bound is not found here, and what is bound here not there.
    monkeypatch.setattr(runner, "_calls", lambda *kind, kept={}: kept.setdefault(kind, runner.Calls()))
    return asked
