"""An engine of vLLM in a process of its own, which answers what `serve` asks: ``python -m slidesparse.bench.vllm_engine JSON``."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

PROMPT, OUTPUTS, FEW_OUTPUTS = 32, 129, 17
"""Tokens in and out of each request of a decoding batch; out where kernels are looked at."""
WHOLE = 1024
"""The longest prompt of a prefill."""
MOST, REQUESTS = 32768, 512
"""Tokens of a step, and requests of a batch, that the engines are made for."""
KINDS = {
    "attention": re.compile(r"flash|attention|paged", re.I),
    "other": re.compile(r"^triton_"),  # what the compiler fused
    "head": re.compile(r"nvjet_(sm90_)?(tst|hsh)"),  # 16-bit products, where the linear layers have 8 bits
    "linear": re.compile(r"gemm|gemv|nvjet|tile_kernel|sum_kernel|quant\w*_kernel|(rescale|restore|lift\w*)_kernel|splitk|sparse", re.I),
}


def words_of(asked: Mapping[str, Any]) -> list[str]:
    """The engine's arguments, as `vllm bench latency` takes them."""
    words = ["--model", asked["checkpoint"], "--skip-tokenizer-init", "--max-model-len", "2048", "--max-num-seqs", str(REQUESTS)]
    words += ["--max-num-batched-tokens", str(MOST), "--disable-detokenize"]
    words += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(asked["kv_bytes"])]
    words += ["--additional-config", json.dumps({"slidesparse": asked["settings"]})]
    words += ["--enforce-eager"] if asked["eager"] else []
    words += ["--cudagraph-capture-sizes", *map(str, asked["graphs"])] if asked["graphs"] else []
    if asked["form"] == "dense" and asked["scheme"] in ("int8", "fp8"):
        words += ["--quantization", "compressed-tensors"]
    elif asked["form"] != "dense":
        words += ["--quantization", "slidesparse"]
    return words


def check(prefill: Sequence[int], decode: Sequence[int]) -> None:
    """Refuse what no step would have.

    Raises:
        ValueError: names the number of tokens or of requests.
    """
    for m in prefill:
        if m > MOST or (m > WHOLE and m % WHOLE):
            raise ValueError(f"prefill {m}: prompts have {WHOLE} tokens; write up to {WHOLE}, or multiples of it up to {MOST}")
    for m in decode:
        if m > REQUESTS:
            raise ValueError(f"decode {m}: a batch has {REQUESTS} requests at most")


def step(tokens: int) -> tuple[int, int, int]:
    """A prefill in one step: requests, tokens in, tokens out."""
    return max(1, tokens // WHOLE), min(tokens, WHOLE), 1


class Answers:
    """What an engine is asked: seconds of a step, milliseconds of its kernels, log-probabilities."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        from ..compat import vllm_latency

        self._names, self._asked, self._words = vllm_latency, asked, words_of(asked)
        self._engine = vllm_latency.engine_of(self._words)
        self.gigabytes = vllm_latency.model_gigabytes(self._engine)

    def turn(self, phase: str, tokens: int) -> list[float]:
        """Seconds of steps: prefill as it is, decoding as the difference that more outputs make."""
        if phase == "prefill":
            return self._seconds(*step(tokens), 3)
        long, short = (statistics.median(self._seconds(tokens, PROMPT, outputs, 2)) for outputs in (OUTPUTS, 1))
        return [(long - short) / (OUTPUTS - 1)]

    def kernels(self, phase: str, tokens: int) -> dict[str, float]:
        """Milliseconds of a step's kernels by what they do."""
        if phase == "prefill":
            return by_kind(_profiled(partial(self._seconds, *step(tokens), 1)), 2, self._asked["scheme"])  # one round, and one to warm up
        long, short = (_profiled(partial(self._seconds, tokens, PROMPT, outputs, 1)) for outputs in (FEW_OUTPUTS, 1))
        apart = {name: time - short.get(name, 0.0) for name, time in long.items()}
        return by_kind(apart, 2 * (FEW_OUTPUTS - 1), self._asked["scheme"])

    def logprobs(self) -> list[float]:
        """Of random tokens, in a prompt of 256 that replays CUDA graphs and in one of 1024 that does not."""
        vocabulary = self._engine.llm_engine.model_config.get_vocab_size()
        ids = torch.randint(vocabulary, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
        asking = self._names.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        found: list[float] = []
        for prompt in (ids[:256], ids):  # apart: together they would be one step
            answer = self._engine.generate([{"prompt_token_ids": prompt}], asking, use_tqdm=False)[0].prompt_logprobs
            found += [each[token].logprob for each, token in zip(answer[1:], prompt[1:], strict=True)]
        return found

    def _seconds(self, batch: int, inputs: int, outputs: int, rounds: int) -> list[float]:
        place = Path(self._asked["stem"] + ".point")
        sizes = ["--batch-size", batch, "--input-len", inputs, "--output-len", outputs, "--num-iters-warmup", 1, "--num-iters", rounds]
        self._names.latency.main(self._names.parser().parse_args([*self._words, *map(str, sizes), "--output-json", str(place)]))
        return [float(each) for each in json.loads(place.read_text(encoding="utf-8"))["latencies"]]


def _profiled(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of every kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        found[event.key] += event.self_device_time_total / 1e3
    return found


def by_kind(found: Mapping[str, float], steps: int, scheme: str) -> dict[str, float]:
    """Milliseconds of a step by the kernels' names: linear layers with their quantisation, the head, attention, all else."""
    times = dict.fromkeys(("linear", "head", "attention", "other"), 0.0)
    for name, time in found.items():
        kind = next((kind for kind, names in KINDS.items() if names.search(name)), "other")
        times["linear" if kind == "head" and scheme not in ("int8", "fp8") else kind] += time / steps
    return times


def main() -> None:
    """Make the engine, say how much its weights take, then answer until the pipe is closed."""
    asked = json.loads(sys.argv[1])
    answers = Answers(asked)
    with Connection(asked["pipe"]) as pipe:
        pipe.send(answers.gigabytes)
        while True:
            try:
                name, *rest = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(answers, name)(*rest))


if __name__ == "__main__":
    main()
