"""One real model through transformers and vLLM, on one rank and several: how far log-probabilities and greedy texts lie apart.

    python benchmarks/agreement.py DENSE_MODEL TEXT.txt WORKDIR OUT.csv COMMIT [--schemes int8] [--patterns 6:8] [--ranks 1 2]

Packed layers are made to run on sparse tensor cores (``route: slid``), whatever a plan would choose. Beside them stands what stock
vLLM does with the dense twin, the same weights and scheme, in the same comparison, and what float32 in place of bfloat16 does around the
layers in transformers: 8-bit activations round anew after every change. Log-probabilities are those of the text's own tokens.
Two greedy texts part where the first token differs; what counts there is how close the first run's two best tokens were. Interrupted, it
goes on where it was: runs of this COMMIT that are in WORKDIR are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import slidesparse
from engines import in_a_process
from records import records
from slidesparse.bench.serve import checkpoint

PROMPTS = [
    "def quicksort(values):\n",
    "import numpy as np\n\ndef softmax(x):\n",
    "The capital of France is",
    "# A function that reverses a string\n",
    "Once upon a time there was a",
    "SELECT name FROM users WHERE",
    "The three laws of motion are",
    "class Stack:\n    def __init__(self):\n",
]
NEW_TOKENS, WINDOW, WINDOWS = 64, 256, 8


def in_vllm(asked: dict) -> dict[str, list]:
    """Log-probabilities of the text's windows, and greedy texts with their two best log-probabilities, by vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=asked["model"], quantization=asked["quantization"], tensor_parallel_size=asked["ranks"], max_model_len=1024, max_num_seqs=64,
        enable_prefix_caching=False, gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=4 << 30,  # asked for, not measured: others may use the GPU
        additional_config={"slidesparse": asked["settings"]},
    )  # fmt: skip
    ids = llm.get_tokenizer().encode(Path(asked["text"]).read_text(encoding="utf-8"))
    windows = [{"prompt_token_ids": ids[at * WINDOW : (at + 1) * WINDOW]} for at in range(WINDOWS)]
    scored = llm.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    logprobs = [one.prompt_logprobs[i][token].logprob for one in scored for i, token in enumerate(one.prompt_token_ids) if i]
    texts = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=2, ignore_eos=True), use_tqdm=False)
    greedy = [[one.outputs[0].token_ids[i], *_best(step)] for one in texts for i, step in enumerate(one.outputs[0].logprobs)]
    return {"logprobs": logprobs, "greedy": greedy}


def _best(step: dict) -> tuple[float, float]:
    first, second = sorted((found.logprob for found in step.values()), reverse=True)[:2]
    return first, second


def in_transformers(asked: dict) -> dict[str, list]:
    """The same by transformers on one GPU, or on a CPU, whose arithmetic is exact, where there is none."""
    import torch

    model, tokenizer = slidesparse.load(asked["model"], dtype=asked.get("dtype", "auto"))
    if model.device.type == "cuda":
        for module in model.modules():
            if isinstance(module, slidesparse.SlideSparseLinear):
                module.route = asked["settings"].get("route")
    ids = tokenizer.encode(Path(asked["text"]).read_text(encoding="utf-8"))
    logprobs, greedy = [], []
    with torch.inference_mode():
        for at in range(WINDOWS):
            window = torch.tensor([ids[at * WINDOW : (at + 1) * WINDOW]], device=model.device)
            found = model(window).logits[0, :-1].float().log_softmax(-1).gather(1, window[0, 1:, None])
            logprobs += found.view(-1).tolist()
        for prompt in PROMPTS:
            start = tokenizer(prompt, return_tensors="pt").to(model.device)
            out = model.generate(
                **start,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            for token, logits in zip(out.sequences[0, start["input_ids"].shape[1] :].tolist(), out.logits, strict=True):
                greedy.append([token, *logits[0].float().log_softmax(-1).topk(2).values.tolist()])
    return {"logprobs": logprobs, "greedy": greedy}


def apart(one: dict[str, list], other: dict[str, list]) -> dict[str, object]:
    """How far two runs lie apart."""
    differences = [abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True)]
    gaps = []
    for start in range(0, len(one["greedy"]), NEW_TOKENS):
        for (token, first, second), (theirs, *_) in zip(one["greedy"][start : start + NEW_TOKENS], other["greedy"][start:], strict=False):
            if token != theirs:
                gaps.append(first - second)
                break
    count, means = len(differences), [statistics.fmean(run["logprobs"]) for run in (one, other)]
    return {
        "tokens": count, "mean_logprob_one": f"{means[0]:.5f}", "mean_logprob_other": f"{means[1]:.5f}",
        "mean_abs_diff": f"{statistics.fmean(differences):.5f}", "stderr": f"{statistics.stdev(differences) / count**0.5:.5f}",
        "median_abs_diff": f"{statistics.median(differences):.5f}", "max_abs_diff": f"{max(differences):.4f}",
        "texts": len(PROMPTS), "texts_parted": len(gaps), "widest_gap_where_parted": f"{max(gaps, default=0):.4f}",
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        asked = json.loads(sys.argv[2])
        found = (in_transformers if asked["engine"] == "transformers" else in_vllm)(asked)
        Path(asked["out"]).write_text(json.dumps(found), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("dense", "text", "folder", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("commit")
    parser.add_argument("--schemes", nargs="+", choices=["int8", "fp8"], default=["int8"])
    parser.add_argument("--patterns", nargs="+", default=["6:8"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    arguments = parser.parse_args()
    with records(arguments.out, arguments.commit) as record:
        for scheme in arguments.schemes:
            for pattern in arguments.patterns:
                compare(arguments, scheme, pattern, record)


def compare(arguments: argparse.Namespace, scheme: str, pattern: str, record: Callable[[dict], None]) -> None:
    stem, first = f"{scheme}-{pattern.replace(':', '-')}", arguments.ranks[0]
    runs: dict[str, dict[str, list]] = {}

    def run(name: str, asked: dict, label: str) -> None:
        place = arguments.folder / f"{stem}-{label}-{arguments.commit}"
        kept = Path(f"{place}.json")
        runs[name] = (
            json.loads(kept.read_text(encoding="utf-8"))
            if kept.exists()
            else in_a_process(__file__, asked, place, alone=asked["ranks"] == 1)
        )

    for form, method, settings in (("packed", "slidesparse", {"route": "slid"}), ("dense", "compressed-tensors", {})):
        made = checkpoint(arguments.dense, arguments.folder, scheme, pattern, form)
        asked = {"model": str(made), "text": str(arguments.text), "settings": settings, "quantization": method, "engine": "vllm"}
        for ranks in arguments.ranks:
            run(f"{form} vLLM TP {ranks}", asked | {"ranks": ranks}, f"{form}-tp{ranks}")
        if form == "packed":
            other = asked | {"engine": "transformers", "ranks": 1}
            run("packed transformers", other, "transformers")
            run("packed transformers float32", other | {"dtype": "float32", "settings": {}}, "transformers-float32")
    pairs = [(f"{form} vLLM TP {first}", f"{form} vLLM TP {ranks}") for ranks in arguments.ranks[1:] for form in ("packed", "dense")]
    pairs += [(f"packed vLLM TP {first}", other) for other in ("packed transformers", f"dense vLLM TP {first}")]
    pairs.append(("packed transformers", "packed transformers float32"))
    for one, other in pairs:
        row = {"model": arguments.dense.name, "scheme": scheme, "pattern": pattern, "one": one, "other": other}
        row |= apart(runs[one], runs[other])
        record(row)
        print(*row.values(), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
