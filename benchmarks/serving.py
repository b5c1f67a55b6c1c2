"""vLLM's own latency benchmark on one model shape: its dense checkpoint and our packed one, random weights, in one run.

    python benchmarks/serving.py WORKDIR OUT.csv COMMIT [--model Qwen2.5-7B] [--schemes int8] [--patterns 6:8]

Both checkpoints hold the same masked weights; the dense one is served by vLLM alone, and the log-probabilities of random tokens, in a
prompt of 256 that replays CUDA graphs and in one of 1024 that does not, are compared (``logprob_diff``, the mean difference;
``logprob_spread``, the standard deviation of the dense ones, for scale). The engines stand side by side on one GPU and take turns at every
point, since a host that is busy for a while would favour whoever runs then. A turn is `vllm bench latency` (its module, its defaults but
for the iterations). Prefill is requests of up to 1024 tokens in one step with one output token; decode is the difference between 129 output
tokens and one, by 128 steps. ``gpu_ms`` is what a step's kernels take under torch's profiler, the last columns are their shares: where a
step takes longer than its kernels, the GPU waits for the host.
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
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from engines import Asked, checkpoint
from models import SHAPES, write_dense
from records import records

PREFILL = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DECODE = (1, 16, 64, 128, 256, 512)
PROMPT, OUTPUTS = 32, 129  # tokens in and out of each request of a decoding batch
TURNS = 4  # each goes first as often
KINDS = {
    "attention": re.compile(r"flash|attention|paged", re.I),
    "other": re.compile(r"^triton_"),  # what the compiler fused
    "head": re.compile(r"nvjet_(sm90_)?(tst|hsh)"),  # 16-bit products, where the linear layers have 8 bits
    "linear": re.compile(r"gemm|gemv|nvjet|tile_kernel|sum_kernel|quant\w*_kernel|(rescale|restore|lift\w*)_kernel|splitk|sparse", re.I),
}


def engine(asked: dict) -> None:
    """In a process of its own: one engine, which says how much its weights take, and answers questions of `Asked`."""
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.benchmarks import latency
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    latency.add_cli_args(parser)
    words = words_of(asked)
    made = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(words)))
    # latency.main makes an engine at every call: here it gets the one there is.
    LLM.from_engine_args = classmethod(lambda cls, arguments: made)

    def seconds(batch: int, inputs: int, outputs: int, rounds: int) -> list[float]:
        place = asked["stem"] + ".point"
        sizes = ["--batch-size", batch, "--input-len", inputs, "--output-len", outputs, "--num-iters-warmup", 1, "--num-iters", rounds]
        latency.main(parser.parse_args([*words, *map(str, sizes), "--output-json", place]))
        return json.loads(Path(place).read_text(encoding="utf-8"))["latencies"]

    def step(tokens: int) -> tuple[int, int, int]:
        return max(1, tokens // 1024), min(tokens, 1024), 1

    def turn(phase: str, tokens: int) -> list[float]:
        if phase == "prefill":
            return seconds(*step(tokens), 3)
        long, short = (statistics.median(seconds(tokens, PROMPT, outputs, 2)) for outputs in (OUTPUTS, 1))
        return [(long - short) / (OUTPUTS - 1)]

    def parts(phase: str, tokens: int) -> dict[str, float]:
        if phase == "prefill":
            return by_kind(kernels(partial(seconds, *step(tokens), 1)), 2, asked["scheme"])  # one round, and one to warm up
        long, short = (kernels(partial(seconds, tokens, PROMPT, outputs, 1)) for outputs in (17, 1))
        return by_kind({name: time - short.get(name, 0.0) for name, time in long.items()}, 2 * 16, asked["scheme"])

    def logprobs() -> list[float]:
        vocabulary = made.llm_engine.model_config.get_vocab_size()
        ids = torch.randint(vocabulary, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
        asking = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        found: list[float] = []
        for prompt in (ids[:256], ids):  # apart: together they would be one step
            answer = made.generate([{"prompt_token_ids": prompt}], asking, use_tqdm=False)[0].prompt_logprobs
            found += [each[token].logprob for each, token in zip(answer[1:], prompt[1:], strict=True)]
        return found

    answers = {"turn": turn, "kernels": parts, "logprobs": logprobs}
    with Connection(asked["pipe"]) as pipe:
        pipe.send(made.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model_memory_usage / 1e9)
        while True:
            try:
                name, *rest = pipe.recv()
            except EOFError:
                return
            pipe.send(answers[name](*rest))


def words_of(asked: dict) -> list[str]:
    """The engine's arguments, as `vllm bench latency` takes them."""
    words = ["--model", asked["checkpoint"], "--skip-tokenizer-init", "--max-model-len", "2048", "--max-num-seqs", "512"]
    words += ["--max-num-batched-tokens", "32768", "--disable-detokenize"]
    words += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(asked["kv_bytes"])]
    words += ["--additional-config", json.dumps({"slidesparse": asked["settings"]})]
    words += ["--enforce-eager"] if asked["eager"] else []
    words += ["--cudagraph-capture-sizes", *map(str, asked["graphs"])] if asked["graphs"] else []
    if asked["form"] == "dense" and asked["scheme"] in ("int8", "fp8"):
        words += ["--quantization", "compressed-tensors"]
    elif asked["form"] != "dense":
        words += ["--quantization", "slidesparse"]
    return words


def kernels(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of every kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        found[event.key] += event.self_device_time_total / 1e3
    return found


def by_kind(found: dict[str, float], steps: int, scheme: str) -> dict[str, float]:
    """Milliseconds of a step by the kernels' names: linear layers with their quantisation, the head, attention, all else."""
    times = dict.fromkeys(("linear", "head", "attention", "other"), 0.0)
    for name, time in sorted(found.items(), key=lambda item: -item[1]):
        kind = next((kind for kind, names in KINDS.items() if names.search(name)), "other")
        kind = "linear" if kind == "head" and scheme not in ("int8", "fp8") else kind
        times[kind] += time / steps
        if time > 0.01 * sum(found.values()):
            print(f"kernel {time / steps:8.3f} ms, {kind}: {name[:110]}", flush=True)
    return times


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
            compare(arguments, source, scheme, pattern, record)


def kv_bytes(model: str, prefill: list[int], decode: list[int]) -> int:
    """What the keys and values of the largest batch take: asked for, since what is free changes while another engine starts."""
    shape = SHAPES[model]
    width = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    tokens = max([*prefill, *((PROMPT + OUTPUTS + 16) * requests for requests in decode)])
    return 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * width * tokens + (1 << 30)


def compare(arguments: argparse.Namespace, source: Path, scheme: str, pattern: str, record: Callable[[dict], None]) -> None:
    """All points of the dense engine and the packed ones; rows are recorded point by point."""
    forms = [("dense", "vLLM alone", "{}"), *(("packed", *one.split("=", 1)) for one in arguments.packed)]
    graphs = f", CUDA graphs to {max(arguments.graphs)}" if arguments.graphs else ""
    made = [checkpoint(source, arguments.folder, scheme, pattern, form) for form, _, _ in forms]
    torch.cuda.empty_cache()
    shared = {"scheme": scheme, "eager": arguments.eager, "graphs": arguments.graphs}
    shared["kv_bytes"] = kv_bytes(arguments.model, arguments.prefill, arguments.decode)
    engines = [
        Asked(__file__, shared | {"checkpoint": str(place), "form": form, "settings": json.loads(settings)}, Path(f"{place}-{number}"))
        for number, (place, (form, _, settings)) in enumerate(zip(made, forms, strict=True))
    ]
    memory = [engine.started() for engine in engines]
    logprobs = [engine(("logprobs",)) for engine in engines]
    apart = [statistics.fmean(abs(a - b) for a, b in zip(logprobs[0], found, strict=True)) for found in logprobs]
    for point in [("prefill", m) for m in arguments.prefill] + [("decode", m) for m in arguments.decode]:
        times: list[list[float]] = [[] for _ in engines]
        for number in range(TURNS):
            order = list(zip(engines, times, strict=True))
            for engine, found in reversed(order) if number % 2 else order:
                found += engine(("turn", *point))
        seconds = [statistics.median(found) for found in times]
        for number, (form, how, _) in enumerate(forms):
            parts = engines[number](("kernels", *point))
            gpu = sum(parts.values())
            row = {
                "model": arguments.model, "scheme": scheme, "pattern": pattern, "served": form, "how": how + graphs,
                "phase": point[0], "tokens": point[1], "ms": f"{seconds[number] * 1e3:.3f}",
                "tokens_per_s": f"{point[1] / seconds[number]:.0f}", "x_dense": f"{seconds[0] / seconds[number]:.3f}",
                "model_gb": f"{memory[number]:.2f}", "logprob_diff": f"{apart[number]:.4f}",
                "logprob_spread": f"{statistics.pstdev(logprobs[0]):.4f}", "gpu_ms": f"{gpu:.3f}",
                **{kind: f"{time / gpu:.3f}" if time else "" for kind, time in parts.items()},
            }  # fmt: skip
            record(row)
            print(*row.values(), flush=True)
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    main()
