"""How long calibrated pruning takes and what memory it needs, on a few blocks of a large model's shape with random weights.

    python benchmarks/pruning.py out.csv --shape Qwen2.5-7B --blocks 4 --methods sparsegpt admm auto --gpu-gb 24

The time of the blocks is scaled to the whole model; loading the model and writing the output are in it.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "Qwen2.5-7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "blocks": 28},
    "Qwen2.5-1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2, "blocks": 28},
}
VOCABULARY = 32000
"""Smaller than the models': embeddings are not pruned."""
FIELDS = (
    *("date", "commit", "device", "torch", "model", "method", "pattern", "scheme", "samples", "length", "blocks", "seconds"),
    *("model_blocks", "model_minutes", "gpu_limit_gb", "gpu_peak_gb", "host_peak_gb", "layer_error"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-7B")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "admm", "auto"])
    parser.add_argument("--pattern", default="6:8")
    parser.add_argument("--scheme", default=None)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gpu-gb", type=float, default=None, help="memory that the process may take on the GPU")
    parser.add_argument("--one", type=Path, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(measure(asked.one, asked)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make(Path(folder) / "model", asked.shape, asked.blocks, asked.samples, asked.length)
        for method in asked.methods:
            # A process each, so that the peaks are one method's.
            command = [sys.executable, __file__, *sys.argv[1:], "--one", str(model), "--methods", method]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            write(asked.out, json.loads(done.stdout.splitlines()[-1]))


def make(path: Path, shape: str, blocks: int, samples: int, length: int) -> Path:
    """A checkpoint of random bfloat16 weights, and random token ids beside it."""
    import numpy as np
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {key: value for key, value in SHAPES[shape].items() if key != "blocks"}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = Qwen2Config(**sizes, num_hidden_layers=blocks, vocab_size=VOCABULARY, max_position_embeddings=length)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    torch.set_default_dtype(torch.float32)
    np.save(path.parent / "ids.npy", np.random.default_rng(0).integers(0, VOCABULARY, (samples, length), dtype=np.int32))
    return path


def measure(model: Path, asked: argparse.Namespace) -> dict:
    """One method on the checkpoint."""
    import torch

    from slidesparse import Pattern, Recipe, convert
    from slidesparse.checkpoint import Calibration

    gpu = torch.cuda.is_available()
    if gpu and asked.gpu_gb:
        torch.cuda.set_per_process_memory_fraction(asked.gpu_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    calibration = Calibration(str(model.parent / "ids.npy"), asked.samples, asked.length)
    recipe = Recipe(Pattern.parse(asked.pattern), asked.methods[0], asked.scheme, calibration=calibration)
    began = time.perf_counter()
    report = convert(model, model.parent / f"out-{asked.methods[0]}", recipe, overwrite=True)
    seconds, errors = time.perf_counter() - began, [layer["error"] for layer in report.pruning.layers.values()]
    whole = SHAPES[asked.shape]["blocks"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "model": asked.shape,
        "method": report.pruning.method,
        "pattern": asked.pattern,
        "scheme": asked.scheme or "bf16",
        "samples": asked.samples,
        "length": asked.length,
        "blocks": asked.blocks,
        "seconds": round(seconds, 1),
        "model_blocks": whole,
        "model_minutes": round(seconds * whole / asked.blocks / 60, 2),
        "gpu_limit_gb": asked.gpu_gb or "",
        "gpu_peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if gpu else "",
        "host_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "layer_error": f"{sum(errors) / len(errors):.3e}",
    }


def commit() -> str:
    """The short hash of what runs, empty outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()


def write(path: Path, row: dict) -> None:
    """Append a row and show it."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


if __name__ == "__main__":
    main()
