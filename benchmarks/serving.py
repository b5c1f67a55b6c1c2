"""vLLM's own latency benchmark on one model shape: its dense checkpoint and our packed one, random weights, in one run.

    python benchmarks/serving.py WORKDIR OUT.csv COMMIT [--model Qwen2.5-7B] [--schemes int8] [--patterns 6:8]

Both checkpoints hold the same masked weights; the dense one is served by vLLM alone, and the log-probabilities of 255 random tokens are
compared (``logprob_diff``, the mean difference; ``logprob_spread``, the standard deviation of the dense ones, for scale). Every point is
`vllm bench latency` (its module, its defaults but for the iterations) on one engine, since starting an engine takes a minute. Prefill is
requests of up to 1024 tokens in one step with one output token; decode is the difference between 129 output tokens and one, by 128 steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from engines import checkpoint, in_a_process
from models import SHAPES, write_dense
from records import records

PREFILL = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DECODE = (1, 16, 64, 128, 256, 512)
PROFILED = (("prefill", 4096), ("prefill", 16384), ("decode", 64))
KINDS = {
    "attention": re.compile(r"flash|attention|paged", re.I),
    "other": re.compile(r"^triton_"),  # what the compiler fused
    "head": re.compile(r"nvjet_(sm90_)?(tst|hsh)"),  # 16-bit products, where the linear layers have 8 bits
    "linear": re.compile(r"gemm|gemv|nvjet|tile_kernel|sum_kernel|quant\w*_kernel|(rescale|restore|lift\w*)_kernel|splitk|sparse", re.I),
}


def engine(asked: dict) -> None:
    """In a process of its own: one engine, all points."""
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.benchmarks import latency
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    latency.add_cli_args(parser)
    words = ["--model", asked["checkpoint"], "--skip-tokenizer-init", "--max-model-len", "2048", "--max-num-seqs", "512"]
    words += ["--max-num-batched-tokens", "32768", "--disable-detokenize"]
    words += ["--additional-config", json.dumps({"slidesparse": asked["settings"]})]
    words += ["--enforce-eager"] if asked["eager"] else []
    words += ["--cudagraph-capture-sizes", *map(str, asked["graphs"])] if asked["graphs"] else []
    if asked["form"] == "dense" and asked["scheme"] in ("int8", "fp8"):
        words += ["--quantization", "compressed-tensors"]
    elif asked["form"] != "dense":
        words += ["--quantization", "slidesparse"]
    made = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(words)))
    # latency.main makes an engine at every call: here it gets the one there is.
    LLM.from_engine_args = classmethod(lambda cls, arguments: made)

    def seconds(batch: int, inputs: int, outputs: int, rounds: int) -> float:
        place = asked["out"] + ".point"
        sizes = ["--batch-size", batch, "--input-len", inputs, "--output-len", outputs, "--num-iters-warmup", 2, "--num-iters", rounds]
        latency.main(parser.parse_args([*words, *map(str, sizes), "--output-json", place]))
        return json.loads(Path(place).read_text(encoding="utf-8"))["percentiles"]["50"]

    points = []
    for phase, tokens in [("prefill", m) for m in asked["prefill"]] + [("decode", m) for m in asked["decode"]]:
        if phase == "prefill":
            run = partial(seconds, max(1, tokens // 1024), min(tokens, 1024), 1)
            point = {"seconds": run(10 if tokens < 8192 else 5)}
        else:
            run = partial(seconds, tokens, 32, 9)
            point = {"seconds": (seconds(tokens, 32, 129, 3) - seconds(tokens, 32, 1, 3)) / 128}
        if (phase, tokens) in PROFILED:
            point["shares"] = shares(partial(run, 1), asked["scheme"])
        points.append({"phase": phase, "tokens": tokens} | point)
    ids = torch.randint(made.llm_engine.model_config.get_vocab_size(), (256,), generator=torch.Generator().manual_seed(0)).tolist()
    asking = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answer = made.generate([{"prompt_token_ids": ids}], asking, use_tqdm=False)[0].prompt_logprobs
    logprobs = [found[token].logprob for found, token in zip(answer[1:], ids[1:], strict=True)]
    memory = made.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model_memory_usage
    Path(asked["out"]).write_text(json.dumps({"points": points, "gb": memory / 1e9, "logprobs": logprobs}), encoding="utf-8")


def shares(run: Callable[[], object], scheme: str) -> dict[str, float]:
    """Parts of the kernels' time by their names: linear layers with their quantisation, the head, attention, all else."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    times: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        name = event.key
        kind = next((kind for kind, names in KINDS.items() if names.search(name)), "other")
        kind = "linear" if kind == "head" and scheme not in ("int8", "fp8") else kind
        times[kind] += event.self_device_time_total
        kernels[f"{kind}: {name[:90]}"] += event.self_device_time_total
    total = sum(times.values()) or 1.0
    for name, time in sorted(kernels.items(), key=lambda item: -item[1])[:14]:
        print(f"kernel {time / total:6.1%} {name}", flush=True)
    return {kind: time / total for kind, time in times.items()}


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        engine(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("commit")
    parser.add_argument("--model", choices=SHAPES, default="Qwen2.5-7B")
    parser.add_argument("--schemes", nargs="+", choices=["int8", "fp8", "bf16", "fp16"], default=["int8"])
    parser.add_argument("--patterns", nargs="+", default=["6:8"])
    parser.add_argument("--prefill", nargs="*", type=int, default=PREFILL)
    parser.add_argument("--decode", nargs="*", type=int, default=DECODE)
    parser.add_argument(
        "--packed", nargs="+", default=["as the plan has it={}"], help="NAME=JSON: packed engines, by their additional_config.slidesparse"
    )
    parser.add_argument("--graphs", nargs="+", type=int, help="numbers of tokens to capture CUDA graphs for, not vLLM's (512 at most)")
    parser.add_argument("--eager", action="store_true", help="without compilation and CUDA graphs, to try the script")
    arguments = parser.parse_args()
    source = arguments.folder / "source"
    if not source.exists():
        write_dense(arguments.model, source)
    with records(arguments.out, arguments.commit) as record:
        for scheme, pattern in itertools.product(arguments.schemes, arguments.patterns):
            base: dict[tuple, float] = {}
            alone: list[float] = []
            for form, how, settings in (("dense", "vLLM alone", "{}"), *(("packed", *one.split("=", 1)) for one in arguments.packed)):
                made = checkpoint(source, arguments.folder, scheme, pattern, form)
                asked = {"checkpoint": str(made), "form": form, "scheme": scheme, "settings": json.loads(settings)}
                asked |= {"prefill": arguments.prefill, "decode": arguments.decode, "eager": arguments.eager, "graphs": arguments.graphs}
                how += f", CUDA graphs to {max(arguments.graphs)}" if arguments.graphs else ""
                torch.cuda.empty_cache()
                found = in_a_process(__file__, asked, arguments.folder / made.name, alone=True)
                alone = alone or found["logprobs"]
                apart = statistics.fmean(abs(a - b) for a, b in zip(alone, found["logprobs"], strict=True))
                for point in found["points"]:
                    key = point["phase"], point["tokens"]
                    base.setdefault(key, point["seconds"])
                    parts = point.get("shares", {})
                    row = {
                        "model": arguments.model, "scheme": scheme, "pattern": pattern, "served": form,
                        "how": how, "phase": key[0], "tokens": key[1],
                        "ms": f"{point['seconds'] * 1e3:.3f}", "tokens_per_s": f"{key[1] / point['seconds']:.0f}",
                        "x_dense": f"{base[key] / point['seconds']:.3f}", "model_gb": f"{found['gb']:.2f}",
                        "logprob_diff": f"{apart:.4f}", "logprob_spread": f"{statistics.pstdev(alone):.4f}",
                        **{kind: f"{parts[kind]:.3f}" if kind in parts else "" for kind in ("linear", "head", "attention", "other")},
                    }  # fmt: skip
                    record(row)
                    print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
