"""bench lift: the passes over activations, quantise, quantise + lift, lift, alone and behind a norm or SwiGLU, against their bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import measure, ops, reference
from ..errors import UnsupportedError, first_line
from ..format import SCHEMES, Scheme
from ..pattern import Pattern
from .kernel import Progress, cannot
from .rows import FAILED, REFUSED, WRONG, Row, Rows, device, timed

SCHEME_NAMES = ("int8", "fp8", "bf16")
FLOOR = "bytes in and out at the copy rate"
_EPS = 1e-6
_CHECKED = 32
Made = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pass:
    """A pass over activations: what makes it, and its oracle in plain PyTorch; ``exact`` ones are held to every bit."""

    what: str
    pattern: str
    inputs: Callable[[int, int, str], Made]
    call: Callable[[Made], Made]
    oracle: Callable[[Made], Made]
    exact: bool = True


def run(
    table: Rows, here: Row, *, schemes: Sequence[str] = SCHEME_NAMES, patterns: Sequence[str], tokens: Sequence[int],
    widths: Collection[int], progress: Progress | None = None,
) -> list[Row]:  # fmt: skip
    """Measure the cells that the table lacks, and return the new rows; a ratio is the floor's time over the pass's."""
    where = device()
    rate = measure.copy_rate() if where == "cuda" else None
    tasks = [(scheme, k, m) for scheme in schemes for k in widths for m in tokens]
    asked = {task: lacking for task in tasks if (lacking := _lacking(table, _row(here, *task), patterns))}
    made = []
    for done, (task, lacking) in enumerate(asked.items()):
        if progress:
            progress(done, len(asked), f"{task[0]} K={task[1]} M={task[2]}")
        for row in _rows(_row(here, *task), lacking, where, rate):
            table.add(row)
            made.append(row)
    if progress:
        progress(len(asked), len(asked), "")
    return made


def _lacking(table: Rows, cell: Row, patterns: Sequence[str]) -> list[str]:
    """Patterns that have no row in this cell; none where the cell was refused."""
    found = [row for row in table.rows if row.cell == cell.cell]
    if any(row.status == REFUSED for row in found):
        return []
    there = {row.route for row in found if row.what in ("lift", "quantize_lift")}
    return [pattern for pattern in patterns if pattern not in there]


def _row(here: Row, scheme: str, k: int, m: int) -> Row:
    """Patterns of one cell are timed side by side, so the cell has none."""
    return replace(here, bench="lift", what="lift", m=m, k=k, scheme=scheme)


def _rows(row: Row, patterns: Sequence[str], device: str, rate: float | None) -> Iterator[Row]:
    refused = cannot(row.scheme, device)
    if refused is not None:
        yield replace(row, status=REFUSED, why=refused)
        return
    calls: dict[Pass, list[Callable[[], object]]] = {}
    floors, errors = {}, {}
    count = measure.slots(2 * row.m * row.k) if device == "cuda" else 2
    for one in passes(SCHEMES[row.scheme], patterns):
        try:
            given = [one.inputs(row.m, row.k, device) for _ in range(count)]
            out = one.call(given[0])
        except (RuntimeError, UnsupportedError) as error:
            yield replace(row, what=one.what, route=one.pattern, status=FAILED, why=first_line(error))
            continue
        wrong = _share_wrong(one, given[0], out)
        if wrong > (0.0 if one.exact else 0.01):
            why = f"{100 * wrong:.2g} % of the values are not the oracle's"
            yield replace(row, what=one.what, route=one.pattern, status=WRONG, why=why)
            continue
        errors[one] = wrong
        floors[one] = sum(tensor.numel() * tensor.element_size() for tensor in (*given[0], *out))
        calls[one] = [lambda one=one, each=each: one.call(each) for each in given]  # type: ignore[misc]
    timer = measure.timed if device == "cuda" else measure.timed_by_clock
    for one, timing in (timer(calls, rounds=9) if calls else {}).items():
        ratio = None if rate is None else floors[one] / rate / timing.p50
        made = replace(timed(row, timing, device), ratio=ratio, error=errors[one])
        yield replace(made, what=one.what, route=one.pattern, rival=FLOOR, gigabytes=floors[one] / 1e9)


def _share_wrong(one: Pass, given: Made, out: Made) -> float:
    """The share of values in the first rows that are not the oracle's; rows do not depend on each other."""
    rows = [tensor[:_CHECKED] if tensor.dim() == 2 else tensor for tensor in given]
    worst = 0.0
    for got, expected in zip(out, one.oracle(tuple(tensor.cpu() for tensor in rows)), strict=True):
        found = got[: expected.shape[0]].cpu()
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return 1.0
        pairs = (each.contiguous().view(torch.uint8).view(-1, each.element_size()) for each in (found, expected))
        first, second = pairs
        worst = max(worst, float((first != second).any(1).double().mean()))
    return worst


def passes(scheme: Scheme, patterns: Sequence[str]) -> Iterator[Pass]:
    """Those of a scheme; fused ones for 6:8 alone, whose values may differ where a sum of squares is rounded otherwise."""
    if scheme.dynamic:
        oracle: Callable[[Made], Made] = lambda given: reference.quantize(given[0], scheme)  # noqa: E731
        yield Pass("quantize", "", _plain, lambda given: ops.quantize(given[0], scheme), oracle)
    for text in patterns:
        pattern = Pattern.parse(text)
        if scheme.dynamic:
            yield Pass("quantize_lift", text, _plain, _bound(ops.quantize_lift, pattern, scheme), _bound(_quantize_lift, pattern, scheme))
        else:
            yield Pass("lift", text, _plain, _bound(_lift, pattern, scheme), _bound(_reference_lift, pattern, scheme))
    if scheme.dynamic:
        pattern = Pattern(6, 8)
        for name, given, op, plain in (("rms_norm", _with_residual, _norm, _plain_norm), ("silu_mul", _twice, _silu, _plain_silu)):
            ours, oracle = (_bound2(each, pattern, scheme) for each in (op, plain))
            yield Pass(f"{name}_quantize_lift", "6:8", given, ours, oracle, exact=False)


def _bound(op: Callable[..., object], pattern: Pattern, scheme: Scheme) -> Callable[[Made], Made]:
    def call(given: Made) -> Made:
        out = op(given[0], pattern, scheme)
        return out if isinstance(out, tuple) else (out,)  # type: ignore[return-value]

    return call


def _bound2(op: Callable[[Made, Pattern, Scheme], Made], pattern: Pattern, scheme: Scheme) -> Callable[[Made], Made]:
    return lambda given: op(given, pattern, scheme)


def _lift(x: Tensor, pattern: Pattern, scheme: Scheme) -> Tensor:
    return ops.lift(x, pattern)


def _reference_lift(x: Tensor, pattern: Pattern, scheme: Scheme) -> Tensor:
    return reference.lift(x, pattern)


def _quantize_lift(x: Tensor, pattern: Pattern, scheme: Scheme) -> Made:
    q, scale = reference.quantize(x, scheme)
    return reference.lift(q, pattern), scale


def _norm(given: Made, pattern: Pattern, scheme: Scheme) -> Made:
    x, residual, weight = given
    return ops.rms_norm_quantize(x, weight, _EPS, scheme, pattern=pattern, residual=residual)


def _plain_norm(given: Made, pattern: Pattern, scheme: Scheme) -> Made:
    x, residual, weight = given
    total = x + residual
    wide = total.float()
    normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(x.dtype)
    return *_quantize_lift(normed, pattern, scheme), total


def _silu(given: Made, pattern: Pattern, scheme: Scheme) -> Made:
    return ops.silu_mul_quantize(given[0], scheme, pattern=pattern)


def _plain_silu(given: Made, pattern: Pattern, scheme: Scheme) -> Made:
    gate, up = given[0].chunk(2, -1)
    return _quantize_lift(torch.nn.functional.silu(gate) * up, pattern, scheme)


def _plain(m: int, k: int, device: str) -> Made:
    return (torch.randn(m, k, device=device, dtype=torch.bfloat16),)


def _twice(m: int, k: int, device: str) -> Made:
    return _plain(m, 2 * k, device)


def _with_residual(m: int, k: int, device: str) -> Made:
    return *_plain(m, k, device), *_plain(m, k, device), torch.ones(k, device=device, dtype=torch.bfloat16)
