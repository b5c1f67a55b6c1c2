"""Host time of one call: a packed linear by every route, its steps, what a serving engine calls, and nn.Linear, on a small layer.

    python benchmarks/host_time.py OUT.csv COMMIT [--profile ROUTE]

Microseconds per call of 300 calls queued without waiting, the median of 9 rounds; and of single calls between which the processor's caches
were filled with other things, the median of 100: in a model, too, much else happens between two calls of a layer.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import pstats
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from records import records
from slidesparse import Pattern, ops
from slidesparse.format import SCHEMES
from slidesparse.gemm import Runner, Weights
from slidesparse.gemm.op import handle
from slidesparse.nn import SlideSparseLinear
from slidesparse.ops import cusparselt
from slidesparse.pruning import prune

N, K, M = 512, 512, 16
ROUTES = {
    "int8": ("dense:triton", "dense:cublaslt", "packed:triton", "slid", "tiled:sm90", "dense:sm90"),
    "fp8": ("dense:rowwise", "dense:tensorwise", "packed:rowwise", "slid", "tiled:sm90", "dense:sm90"),
    "bf16": ("dense:native", "packed:native", "slid", "tiled:sm90"),
}


def host_us(call: Callable[[], object], count: int = 300) -> float:
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[1:])


def cold_us(call: Callable[[], object], count: int = 100) -> float:
    other, times = torch.ones(8 << 20), []
    call()
    for _ in range(count):
        other.add_(1)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def layer_for(scheme: str, route: str) -> SlideSparseLinear:
    weight = prune(torch.randn(N, K, device="cuda"), Pattern(6, 8)).bfloat16()
    layer = SlideSparseLinear.from_dense(weight, pattern="6:8", scheme=scheme)
    layer.route = route
    return layer


def steps(scheme: str) -> dict[str, Callable[[], object]]:
    """The ops that a sparse linear is made of."""
    kind, pattern = SCHEMES[scheme], Pattern(6, 8)
    weight = torch.randn(N, K, device="cuda")
    layer = SlideSparseLinear.from_dense(prune(weight, pattern), pattern=pattern, scheme=scheme)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    compressed = cusparselt.compress(ops.slide(layer.packed, rows=32))
    alpha = torch.ones(N, device="cuda") if scheme == "int8" else None
    q, scale = ops.quantize_lift(x, pattern, kind, rows=16)
    product = cusparselt.sparse_mm(q, compressed, alpha, N, torch.bfloat16)
    runner, owner = Runner(Weights(layer.packed, kind, layer.weight_scale), route="slid"), torch.nn.Module()
    runner.prepare(torch.bfloat16, x.device)
    name = handle(owner, lambda dtype, device: runner)
    engine = torch.ops.slidesparse.linear.default  # the layer lives as long as its owner, which the call holds
    found: dict[str, Callable[[], object]] = {
        "quantize": lambda: ops.quantize(x, kind),
        "quantize_lift": lambda: ops.quantize_lift(x, pattern, kind, rows=16),
        "sparse_mm": lambda: cusparselt.sparse_mm(q, compressed, alpha, N, torch.bfloat16),
        "rescale": lambda: ops.rescale(product, scale, None, None, torch.bfloat16),
        "linear, as in an engine": lambda owner=owner: engine(x, name, None, N),
    }
    if importlib.util.find_spec("vllm"):
        from vllm import _custom_ops as theirs

        dense, one = torch.randn(N, K, device="cuda").to(kind.dtype).t(), torch.ones(N, 1, device="cuda")
        quantised = theirs.scaled_int8_quant if scheme == "int8" else partial(theirs.scaled_fp8_quant, use_per_token_if_dynamic=True)
        q8, s8 = quantised(x)[:2]
        found["vLLM's quantisation"] = lambda: quantised(x)
        found["vLLM's product"] = lambda: theirs.cutlass_scaled_mm(q8, dense, s8, one, torch.bfloat16)

        def both() -> torch.Tensor:
            q, scale = quantised(x)[:2]
            return theirs.cutlass_scaled_mm(q, dense, scale, one, torch.bfloat16)

        found["vLLM's both"] = both
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("commit")
    parser.add_argument("--profile", help="scheme:route, as int8:dense:triton: print where its time goes")
    arguments = parser.parse_args()
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    plain = torch.nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
    calls["bf16", "nn.Linear"] = lambda: plain(x)
    for scheme, routes in ROUTES.items():
        for route in routes:
            calls[scheme, route] = partial(layer_for(scheme, route), x)
    for scheme in ("int8", "fp8"):
        calls |= {(scheme, f"op {name}"): call for name, call in steps(scheme).items()}
    with torch.inference_mode(), records(arguments.out, arguments.commit) as record:
        for (scheme, what), call in calls.items():
            us, cold = host_us(call), cold_us(call)
            record({"scheme": scheme, "what": what, "m": M, "n": N, "k": K, "host_us": f"{us:.1f}", "host_us_cold": f"{cold:.1f}"})
            print(f"{scheme:5} {what:26} {us:7.1f} us, cold {cold:7.1f} us", flush=True)
        if arguments.profile:
            scheme, _, route = arguments.profile.partition(":")
            with cProfile.Profile() as profile:
                for _ in range(300):
                    calls[scheme, route]()
            pstats.Stats(profile).sort_stats("tottime").print_stats(22)


if __name__ == "__main__":
    main()
