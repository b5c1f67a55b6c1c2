"""Time quantise, quantise + lift and lift against their byte floor on this GPU: ``python benchmarks/quantize_lift.py OUT.csv COMMIT``.

Fused with the norm or SwiGLU before them, they are timed beside the same work layer by layer; of that, the floor counts fused bytes too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch

from records import records
from slidesparse import measure, ops, reference
from slidesparse.format import SCHEMES, Scheme
from slidesparse.pattern import Pattern
from slidesparse.tolerance import check_bitwise

MS = (1024, 4096, 8192, 16384, 32768)
FUSED_MS = (64, *MS)
KS = (3584, 18944)
PATTERNS = ("2:4", "4:6", "6:8", "8:10")
EPS = 1e-6
Op = Callable[[torch.Tensor], object]
Inputs = tuple[torch.Tensor, ...]


def methods(scheme: Scheme) -> Iterator[tuple[str, str, Op, Op]]:
    """Method, pattern, the op, and the oracle it must equal."""
    if scheme.dynamic:
        yield "quantize", "", lambda x: ops.quantize(x, scheme), lambda x: reference.quantize(x, scheme)
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        if scheme.dynamic:
            yield (
                "quantize_lift",
                text,
                lambda x, pattern=pattern: ops.quantize_lift(x, pattern, scheme),
                lambda x, pattern=pattern: _lifted(reference.quantize(x, scheme), pattern),
            )
        else:
            yield "lift", text, lambda x, pattern=pattern: ops.lift(x, pattern), lambda x, pattern=pattern: reference.lift(x, pattern)


def _lifted(quantised: tuple[torch.Tensor, torch.Tensor], pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.lift(quantised[0], pattern), quantised[1]


def tensors(result: object) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def correct(op: Op, oracle: Op, x: torch.Tensor) -> bool:
    """Whether the first and last rows are bitwise the oracle's (on the CPU)."""
    results = tensors(op(x))
    for rows in (slice(0, 64), slice(-64, None)):
        for got, expected in zip(results, tensors(oracle(x[rows].cpu())), strict=True):
            try:
                check_bitwise(got[rows].cpu(), expected)
            except AssertionError as error:
                print(error)
                return False
    return True


def cells(m: int, k: int, scheme: Scheme, rate: float) -> Iterator[dict[str, object]]:
    inputs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(measure.slots(2 * m * k))]
    variants, floors = {}, {}
    for method, text, op, oracle in methods(scheme):
        if not correct(op, oracle, inputs[0]):
            print(f"{method} {text} {scheme.name}, M = {m}, K = {k}: not correct, dropped")
            continue
        floors[method, text] = sum(t.numel() * t.element_size() for t in (inputs[0], *tensors(op(inputs[0])))) / rate
        variants[method, text] = [lambda x=x, op=op: op(x) for x in inputs]
    for (method, text), timing in measure.timed(variants, rounds=11).items():
        floor = floors[method, text]
        row = {"m": m, "k": k, "pattern": text, "in_dtype": "bf16", "out_dtype": scheme.name, "method": method}
        row |= {"us_p50": f"{timing.p50:.2f}", "us_p20": f"{timing.p20:.2f}", "us_p80": f"{timing.p80:.2f}"}
        yield row | {"floor_us": f"{floor:.2f}", "of_floor": f"{floor / timing.p50:.3f}", "correct": True}


def norm_ops(pattern: Pattern, scheme: Scheme) -> dict[str, Callable[[Inputs], Inputs]]:
    """The residual's sum, RMSNorm, quantise + lift: at once, one after the other, and as transformers' eager layer rounds."""

    def eager(given: Inputs) -> Inputs:
        x, residual, weight = given
        total = x + residual
        normed = total.float() * torch.rsqrt(total.float().square().mean(-1, keepdim=True) + EPS)
        return *ops.quantize_lift(weight * normed.to(x.dtype), pattern, scheme), total

    def apart(given: Inputs) -> Inputs:
        x, residual, weight = given
        total = x + residual
        normed = torch.nn.functional.rms_norm(total, weight.shape, weight, EPS)
        return *ops.quantize_lift(normed, pattern, scheme), total

    def fused(given: Inputs) -> Inputs:
        x, residual, weight = given
        return ops.rms_norm_quantize(x, weight, EPS, scheme, pattern=pattern, residual=residual)

    return {"add_rms_norm_quantize_lift": fused, "add_rms_norm_quantize_lift apart": apart, "": eager}


def silu_ops(pattern: Pattern, scheme: Scheme) -> dict[str, Callable[[Inputs], Inputs]]:
    """SwiGLU, quantise + lift: at once and one after the other."""

    def apart(given: Inputs) -> Inputs:
        gate, up = given[0].chunk(2, -1)
        return ops.quantize_lift(torch.nn.functional.silu(gate) * up, pattern, scheme)

    def fused(given: Inputs) -> Inputs:
        return ops.silu_mul_quantize(given[0], scheme, pattern=pattern)

    return {"silu_mul_quantize_lift": fused, "silu_mul_quantize_lift apart": apart, "": apart}


def fused_cells(m: int, scheme: Scheme, rate: float) -> Iterator[dict[str, object]]:
    pattern = Pattern.parse("6:8")
    for k, shapes, made in ((KS[0], ((m, KS[0]), (m, KS[0]), (KS[0],)), norm_ops), (KS[1], ((m, 2 * KS[1]),), silu_ops)):
        copies = range(measure.slots(4 * m * k))
        inputs = [tuple(torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes) for _ in copies]
        methods = made(pattern, scheme)
        expected, got = methods.pop("")(inputs[0]), next(iter(methods.values()))(inputs[0])
        # Sums of squares and exponentials may differ in a last place, and with it a rounding or a row's scale.
        same = [(a.view(torch.int8) == b.view(torch.int8)).float().mean().item() for a, b in zip(got, expected, strict=True)]
        if min(same) <= 0.99:
            print(f"{next(iter(methods))} {scheme.name}, M = {m}, K = {k}: not correct, dropped")
            continue
        floor = sum(t.numel() * t.element_size() for t in (*inputs[0], *got)) / rate
        variants = {name: [lambda given=given, op=op: op(given) for given in inputs] for name, op in methods.items()}
        for name, timing in measure.timed(variants, rounds=11).items():
            row = {"m": m, "k": k, "pattern": str(pattern), "in_dtype": "bf16", "out_dtype": scheme.name, "method": name}
            row |= {"us_p50": f"{timing.p50:.2f}", "us_p20": f"{timing.p20:.2f}", "us_p80": f"{timing.p80:.2f}"}
            yield row | {"floor_us": f"{floor:.2f}", "of_floor": f"{floor / timing.p50:.3f}", "correct": True}


def main(out: str, commit: str) -> None:
    rate = measure.copy_rate()
    print(f"copy rate {rate / 1e6:.3f} TB/s")
    with records(out, commit) as record:
        shapes = [(k, m) for k in KS for m in MS]
        cases = [cells(m, k, SCHEMES[name], rate) for k, m in shapes for name in ("int8", "fp8", "bf16")]
        cases += [fused_cells(m, SCHEMES[name], rate) for m in FUSED_MS for name in ("int8", "fp8")]
        for case in cases:
            for row in case:
                record(row)
                print(*row.values())
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
