"""Models of real shapes with random weights: convert, load, generate, and token rates, dense bf16 against packed in one run.

    python benchmarks/models.py WORKDIR OUT.csv COMMIT [--models Qwen2.5-7B] [--schemes int8 fp8]

Prefill is one eager forward pass of the given number of tokens; decode is one step on a static cache, replayed as a CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import slidesparse
from records import records
from slidesparse import Recipe

SHAPES = {
    "Qwen2.5-7B": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "Qwen2.5-14B": {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
                    "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "Llama-3.2-1B": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "Llama-3.2-3B": {"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                     "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "Qwen3-8B": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": False},
}  # fmt: skip


def write_dense(name: str, folder: Path) -> None:
    """A model of that shape with random bf16 weights."""
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), max_position_embeddings=32768, **shape)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")


def prefill(model: torch.nn.Module, count: int, rounds: int = 5) -> float:
    """Seconds of one forward pass over ``count`` tokens, median."""
    ids = torch.randint(model.config.vocab_size, (1, count), device="cuda")
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def decode_step(model: torch.nn.Module, batch: int, past: int = 64) -> Callable[[], object]:
    """One decoding step on a static cache, at position ``past``."""
    cache = StaticCache(config=model.config, max_cache_len=past + 64)
    model(torch.randint(model.config.vocab_size, (batch, past), device="cuda"), past_key_values=cache, logits_to_keep=1)
    ids = torch.randint(model.config.vocab_size, (batch, 1), device="cuda")
    place = torch.tensor([[past]], device="cuda")
    mask = {"full_attention": (torch.arange(past + 64, device="cuda") <= past).view(1, 1, 1, -1).expand(batch, 1, 1, -1)}
    mask = mask if model.config.model_type != "llama" else mask["full_attention"]
    return lambda: model(ids, past_key_values=cache, position_ids=place, attention_mask=mask, cache_position=place[0])


def decode(model: torch.nn.Module, batch: int, rounds: int = 20) -> float:
    """Seconds of one decoding step, replayed from a CUDA graph, median."""
    step = decode_step(model, batch)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def linear_bytes(model: torch.nn.Module) -> int:
    """Bytes on the GPU of all decoder layers."""
    held = {id(t): t for layer in model.model.layers for t in (*layer.parameters(), *layer.buffers()) if t.is_cuda}
    copies = sum(m.resident_bytes for m in model.modules() if isinstance(m, slidesparse.SlideSparseLinear))
    return copies + sum(t.numel() * t.element_size() for t in held.values())


def rates(model: torch.nn.Module, prefills: list[int], batches: list[int]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for count in prefills:
            rows.append({"phase": "prefill", "tokens": count, "seconds": prefill(model, count)})
        for batch in batches:
            rows.append({"phase": "decode", "tokens": batch, "seconds": decode(model, batch)})
    return rows


def variants(name: str, folder: Path, schemes: list[str]):
    """Pairs of a label and a loader, one after the other in memory."""
    dense = folder / "dense"
    yield "dense bf16", lambda: AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, device_map="cuda").eval()
    for scheme in schemes:
        packed = folder / scheme
        start = time.perf_counter()
        slidesparse.convert(dense, packed, Recipe(slidesparse.Pattern(6, 8), "magnitude", scheme))
        size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
        print(f"{name} {scheme} 6:8: converted {size / 1e9:.1f} GB in {time.perf_counter() - start:.1f} s", flush=True)
        for memory in ("fast", "lean"):
            yield f"packed {scheme} {memory}", lambda packed=packed, memory=memory: _load(packed, memory)
        shutil.rmtree(packed)


def _load(packed: Path, memory: str) -> torch.nn.Module:
    start = time.perf_counter()
    model, _ = slidesparse.load(packed, device="cuda", memory=memory, tokenizer=False)
    print(f"loaded in {time.perf_counter() - start:.1f} s", flush=True)
    ids = torch.randint(model.config.vocab_size, (1, 8), device="cuda")
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 16), out.shape
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("commit")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--schemes", nargs="+", default=["int8", "fp8"])
    parser.add_argument("--prefill", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64])
    arguments = parser.parse_args()
    with records(arguments.out, arguments.commit) as record:
        for name in arguments.models:
            folder = arguments.folder / name
            write_dense(name, folder / "dense")
            base: dict[tuple, float] = {}
            for label, loader in variants(name, folder, arguments.schemes):
                gc.collect()
                torch.cuda.empty_cache()
                model = loader()
                held = linear_bytes(model)
                for row in rates(model, arguments.prefill, arguments.batches):
                    key = row["phase"], row["tokens"]
                    base.setdefault(key, row["seconds"])
                    row = {"model": name, "variant": label, "gb": f"{held / 1e9:.3f}"} | row
                    row |= {"tokens_per_s": f"{row['tokens'] / row['seconds']:.0f}", "x_dense": f"{base[key] / row['seconds']:.3f}"}
                    row["seconds"] = f"{row['seconds']:.6f}"
                    record(row)
                    print(*row.values(), flush=True)
                del model
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
