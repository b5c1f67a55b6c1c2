"""A sparse linear together with what consumes it, fused and not, against the fastest dense linear with the same fusion.

    python benchmarks/consumers.py OUT.csv COMMIT

``gate_up`` ends in SiLU·mul and the next layer's quantise + lift, ``down`` in the residual add, RMSNorm and the next quantise + lift.
``separate`` is the usual pipeline: the GEMM's output is scaled in a pass of its own, then consumed by one kernel, then quantised;
``fused`` leaves the scale to one kernel that does all of it; ``compiled`` is plain torch under torch.compile; ``dense`` is the fastest
dense route followed by the same fused kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from records import records
from slidesparse import measure, ops
from slidesparse.format import SCHEMES
from slidesparse.gemm.choose import fastest
from slidesparse.gemm.tune import Bench, LinearShape
from slidesparse.ops import cusparselt
from slidesparse.pattern import Pattern
from slidesparse.reference import scaled

LAYERS = {"gate_up": (37888, 3584), "down": (3584, 18944)}
EPS = 1e-6


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    wide = total.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight, total


class Case:
    """One layer, scheme and number of tokens, and the ways to run it with its consumer."""

    def __init__(self, name: str, bench: Bench, m: int) -> None:
        self.name, self.bench, self.problem = name, bench, bench.problem
        self.scheme, self.pattern = bench.layer.scheme, bench.layer.pattern
        self.compressed, self.alpha = bench.copies("slid", 1)[0]
        self.x = [torch.randn(m, self.problem.k, device="cuda").to(torch.bfloat16) for _ in range(2)]
        self.residual = torch.randn(m, self.problem.n, device="cuda").to(torch.bfloat16) if name == "down" else None
        self.weight = torch.ones(self.problem.n, device="cuda", dtype=torch.bfloat16)
        cell = bench.cell(m, rounds=5)
        self.algorithm = fastest(cell.whole, ("slid",)).variant.replace("default", "")
        self.route = fastest(cell.whole, ("dense",))
        self.compiled_consumer = torch.compile(silu_mul if name == "gate_up" else add_norm)
        self.compiled = torch.compile(self._whole, fullgraph=True)

    def product(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """GEMM output without the token scale, that scale, and the weight scale that is still to be applied."""
        q, x_scale = ops.quantize_lift(x, self.pattern, self.scheme, rows=16)
        y = cusparselt.sparse_mm(q, self.compressed, self.alpha, self.problem.n, torch.bfloat16, self.algorithm)
        return y[: x.shape[0]], x_scale, None if self.alpha is not None else self.bench.weights.channel_scale

    def separate(self, x: Tensor) -> tuple[Tensor, ...]:
        y, x_scale, w_scale = self.product(x)
        y = ops.rescale(y, x_scale, w_scale, None, torch.bfloat16)
        if self.name == "gate_up":
            return ops.quantize_lift(self.compiled_consumer(y), self.pattern, self.scheme)
        h, total = self.compiled_consumer(y, self.residual, self.weight)
        return *ops.quantize_lift(h, self.pattern, self.scheme), total

    def fused(self, x: Tensor) -> tuple[Tensor, ...]:
        y, x_scale, _ = self.product(x)
        if self.name == "gate_up":
            return ops.silu_mul_quantize(y, self.scheme, pattern=self.pattern, scale=x_scale)
        return ops.rms_norm_quantize(y, self.weight, EPS, self.scheme, pattern=self.pattern, residual=self.residual, scale=x_scale)

    def _whole(self, x: Tensor) -> tuple[Tensor, ...]:
        y, x_scale, w_scale = self.product(x)
        y = scaled(y, x_scale, None if w_scale is None else w_scale.view(1, -1), None, torch.bfloat16)
        if self.name == "gate_up":
            return ops.quantize_lift(silu_mul(y), self.pattern, self.scheme)
        h, total = add_norm(y, self.residual, self.weight)
        return *ops.quantize_lift(h, self.pattern, self.scheme), total

    def best_dense(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.bench.call(self.route, x, self.bench.copies("dense", 1)[0])()
        if self.name == "gate_up":
            return ops.silu_mul_quantize(y, self.scheme)
        return ops.rms_norm_quantize(y, self.weight, EPS, self.scheme, residual=self.residual)


def agree(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether quantised values differ by a step at most, and rarely, and the scales hardly."""
    close = (a[0].float() - b[0].float()).abs() <= (1 if a[0].dtype == torch.int8 else b[0].float().abs() / 8 + 2**-6)
    return bool(close.float().mean() > 0.999) and torch.allclose(a[1], b[1], rtol=0.02)


def rows(scheme: str, name: str, m: int) -> Iterator[dict[str, object]]:
    layer = LinearShape(*LAYERS[name], Pattern.parse("6:8"), SCHEMES[scheme])
    case = Case(name, Bench(layer), m)
    ways: dict[str, Callable[[Tensor], tuple[Tensor, ...]]]
    ways = {"separate": case.separate, "compiled": case.compiled, "dense": case.best_dense}
    if case.alpha is not None:
        ways["fused"] = case.fused
    expected = case.separate(case.x[0])
    right = {way: agree(call(case.x[0]), expected) if way != "dense" else True for way, call in ways.items()}
    timings = measure.timed({way: [lambda x=x, call=call: call(x) for x in case.x] for way, call in ways.items()}, rounds=11)
    for way, timing in timings.items():
        if not right[way]:
            print(f"{name} M = {m} {scheme}: {way} disagrees with the separate kernels, dropped")
            continue
        row = {"layer": name, "m": m, "n": layer.n, "k": layer.k, "pattern": "6:8", "scheme": scheme, "method": way}
        row |= {"algorithm": case.route if way == "dense" else case.algorithm}
        row |= {"us_p50": f"{timing.p50:.2f}", "us_p20": f"{timing.p20:.2f}", "us_p80": f"{timing.p80:.2f}"}
        row["timer"] = "sustained" if timing.sustained else "in turn"
        row |= {"x_separate": f"{timings['separate'].p50 / timing.p50:.3f}", "x_dense": f"{timings['dense'].p50 / timing.p50:.3f}"}
        yield row | {"correct": True}


def main(out: str, commit: str) -> None:
    with records(out, commit) as record:
        for scheme in ("int8", "fp8"):
            for name in LAYERS:
                for m in (1024, 4096, 16384):
                    for row in rows(scheme, name, m):
                        record(row)
                        print(*row.values(), flush=True)
                    torch._dynamo.reset()
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
