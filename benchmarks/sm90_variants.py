"""Every variant of the kernel for compute capability 9.0 on a model's layers: times of whole linears, and of products alone.

    python benchmarks/sm90_variants.py OUT.csv COMMIT [--model Qwen2.5-7B] [--tokens 128 1024]

Outputs are compared with the first dense route's; a route that differs by 2 % and more is named and left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from records import records
from slidesparse import measure
from slidesparse.bench.models import MODELS
from slidesparse.format import SCHEMES
from slidesparse.gemm.kernels import kernels
from slidesparse.gemm.route import Route
from slidesparse.gemm.runner import run
from slidesparse.gemm.tune import Bench, LinearShape
from slidesparse.ops import sm90
from slidesparse.pattern import Pattern


def rows(bench: Bench, m: int, library: str) -> Iterator[dict[str, object]]:
    """A layer's times for ``m`` tokens."""
    inputs = [torch.randn(m, bench.layer.k, device="cuda", dtype=torch.bfloat16) for _ in range(len(bench.inputs(m)))]
    routes = [Route("dense", library), *(Route(layout, "sm90", str(one)) for layout in ("tiled", "dense") for one in sm90.VARIANTS)]
    scale, expected = bench.weights.channel_scale, None
    whole, products = {}, {}
    for route in routes:
        steps = kernels()[route.kernel].bind(bench.problem, route.layout, route.variant, inputs[0], direct=True)
        copies = bench.copies(route.layout, len(inputs))
        y = run(steps, inputs[0], copies[0], scale, None).float()
        expected = y if expected is None else expected
        if float((y - expected).norm() / expected.norm()) > 0.02:
            print(f"{bench.key}, M = {m}: {route} is wrong")
            continue
        q, x_scale = steps.quantise(inputs[0])
        pairs = list(zip(inputs, copies, strict=True))
        whole[route] = [lambda x=x, copy=copy, steps=steps: run(steps, x, copy, scale, None) for x, copy in pairs]
        products[route] = [
            lambda copy=copy, steps=steps, q=q, x_scale=x_scale: steps.multiply(q, x_scale, copy, scale, None) for copy in copies
        ]
    times, alone = measure.timed(whole, rounds=7), measure.timed(products, rounds=7)
    for route in whole:
        yield {"route": str(route), "us_whole": f"{times[route].p50:.2f}", "us_product": f"{alone[route].p50:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("commit")
    parser.add_argument("--model", choices=MODELS, default="Qwen2.5-7B")
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 256, 512, 1024, 4096, 16384])
    arguments = parser.parse_args()
    with records(arguments.out, arguments.commit) as record:
        for scheme, library in (("fp8", "rowwise"), ("int8", "triton")):
            for pattern in ("6:8", "2:4"):
                for name, (n, k) in MODELS[arguments.model].linears.items():
                    bench = Bench(LinearShape(n, k, Pattern.parse(pattern), SCHEMES[scheme]))
                    for m in arguments.tokens:
                        head = {"model": arguments.model, "layer": name, "m": m, "n": n, "k": k, "pattern": pattern, "scheme": scheme}
                        for row in rows(bench, m, library):
                            record(head | row)
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
