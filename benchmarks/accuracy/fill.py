"""One job of the study in a process of its own: convert, score the text, compare with the masked twin, run the tasks."""

from __future__ import annotations

import datetime
import fcntl
import gc
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import store
import torch
from baseline import quantize_linears
from cells import CONVERT, DENSE, LAST, TEXT, TWIN, Cell

from slidesparse import Pattern, Recipe, convert, load
from slidesparse.checkpoint import Calibration
from slidesparse.evaluate import divergence, perplexity, tokenize_file, windows_per_pass
from slidesparse.evaluate.scores import TaskScore

TAKEN = 75
"""Exit status where another runner has the cell."""
BATCH, SCHEDULE = 64, 8
"""Requests per forward pass at most, on a GPU; found anew this often while requests get shorter."""
GENERATED = 128
"""Texts generated at the same time."""


def main() -> None:
    asked = json.loads(sys.argv[1])
    cell = Cell.parse(asked["cell"])
    locks = Path(asked["out"]) / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"{cell.file}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(TAKEN)
        if asked["device"] == "cuda":
            torch.cuda.set_per_process_memory_fraction(asked["share"])
        Run(cell, asked).stages()


class Run:
    """One cell: what is asked, and where its checkpoint lies."""

    def __init__(self, cell: Cell, asked: dict[str, Any]) -> None:
        self.cell, self.asked = cell, asked
        self.out, self.dense = Path(asked["out"]), Path(asked["model"])
        self.text = Path(asked["data"]) / "text" / "wikitext2_test.txt"
        self.checkpoint = self.dense if cell.method == DENSE else Path(asked["work"]) / cell.file
        self.weights = ""

    def stages(self) -> None:
        """Those that are not there yet, each kept as soon as it is done."""
        there = store.read(self.out, self.cell)["stages"]
        left = [stage for stage in self.asked["stages"] if stage not in there]
        if left and self.cell.method != DENSE:
            self.converted(there.get(CONVERT))
        if TEXT in left:
            self.keep(TEXT, self.score_text)
        if TWIN in left:
            self.keep(TWIN, self.score_twin)
        tasks = [stage for stage in left if stage not in (TEXT, TWIN)]
        if tasks:
            self.score_tasks(tasks)

    def keep(self, stage: str, work: Any) -> None:
        """Run a stage and write what comes back: values, and the items of a task."""
        began = time.perf_counter()
        values, items = work()
        settings = self.asked["settings"]
        record = {
            "date": datetime.date.today().isoformat(),
            "commit": self.asked["commit"],
            "gpu": torch.cuda.get_device_name() if self.asked["device"] == "cuda" else "CPU",
            "torch": torch.__version__,
            "weights": self.weights,
            "seconds": round(time.perf_counter() - began, 1),
            "limit": settings["limit"],
            "seed": settings["seed"],
        }
        if self.cell.method not in (DENSE, "magnitude"):
            record |= {key: settings[key] for key in ("calibration", "samples", "length")}
        store.add_stage(self.out, self.cell, stage, record | {"values": values}, items)
        shown = ", ".join(f"{value['metric']} {value['value']:.4g}" for value in values[:3])
        print(f"{stage} {record['seconds']:.0f} s: {shown}", flush=True)
        free()

    def converted(self, record: dict[str, Any] | None) -> None:
        """Convert, unless the very checkpoint of an earlier stage is still there."""
        if record is not None and self.checkpoint.is_dir() and record["weights"] == fingerprint(self.checkpoint):
            self.weights = record["weights"]
            return
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.keep(CONVERT, self.convert)

    def convert(self) -> tuple[list[dict[str, Any]], None]:
        settings, cell = self.asked["settings"], self.cell
        text = None if cell.method == "magnitude" else self.asked["calibration"]
        calibration = Calibration(text, settings["samples"], settings["length"])
        steps = settings["steps"] if cell.method == "auto" else None
        scheme = None if cell.scheme == "bf16" else cell.scheme
        recipe = Recipe(Pattern.parse(cell.pattern), cell.method, scheme, calibration=calibration, reconstruction_steps=steps)
        report = convert(self.dense, self.checkpoint, recipe, device=self.asked["device"])
        self.weights = fingerprint(self.checkpoint)
        values = [metric("bytes", float(report.bytes_out)), metric("bytes_dense", float(report.bytes_in))]
        if report.pruning is not None:
            errors = [layer["error"] for layer in report.pruning.layers.values()]
            values.append(metric("layer_error", sum(errors) / len(errors), items=len(errors)))
        return values, None

    def load(self) -> tuple[Any, Any]:
        model, tokenizer = load(self.checkpoint, device=self.asked["device"])
        if self.cell.method == DENSE and self.cell.scheme != "bf16":
            quantize_linears(model, self.cell.scheme)
        return model, tokenizer

    def score_text(self) -> tuple[list[dict[str, Any]], None]:
        """Perplexity and, but for the dense model itself, how far from the dense model's predictions."""
        model, tokenizer = self.load()
        tokens = tokenize_file(tokenizer, self.text, max_tokens=self.asked["settings"]["max_tokens"])
        windows = self.windows(model)
        if (self.cell.method, self.cell.scheme) == (DENSE, "bf16"):
            found = perplexity(model, tokens, **windows)
            return [metric("perplexity", found.perplexity, found.perplexity_stderr, found.tokens)], None
        reference, _ = load(self.dense, device=self.asked["device"], tokenizer=False)
        both = divergence(model, reference, tokens, **windows)
        names = {"kl": (both.kl, both.kl_stderr), "agreement": (both.agreement, both.agreement_stderr)}
        names |= {"ratio": (both.ratio, both.ratio_stderr), "reference_perplexity": (both.reference.perplexity, None)}
        values = [metric("perplexity", both.model.perplexity, both.model.perplexity_stderr, both.tokens)]
        return values + [metric(name, *pair, both.tokens) for name, pair in names.items()], None

    def score_twin(self) -> tuple[list[dict[str, Any]], None]:
        """The same weights, unpacked, in transformers alone."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        twin = self.checkpoint.with_name(f"{self.cell.file}_twin")
        convert(self.checkpoint, twin, Recipe(form="dense"), overwrite=True, device=self.asked["device"])
        model = AutoModelForCausalLM.from_pretrained(twin, dtype="auto").eval().to(self.asked["device"])
        tokenizer = AutoTokenizer.from_pretrained(twin)
        tokens = tokenize_file(tokenizer, self.text, max_tokens=self.asked["settings"]["max_tokens"])
        found = perplexity(model, tokens, **self.windows(model))
        shutil.rmtree(twin)
        return [metric("twin_perplexity", found.perplexity, found.perplexity_stderr, found.tokens)], None

    def windows(self, model: Any) -> dict[str, int]:
        context = self.asked["settings"]["context"]
        most = windows_per_pass(context, model.config.vocab_size, model.device)
        # Both models' logits lie there at once: processes that share a GPU take fewer windows.
        return {"context": context, "stride": context, "batch": max(1, int(most * min(1, 4 * self.asked["share"])))}

    def score_tasks(self, tasks: list[str]) -> None:
        """Each task kept when it is done."""
        from slidesparse.integrations import harness

        harness.hush()
        model, tokenizer = self.load()
        for task in tasks:
            self.keep(task, lambda task=task: self.score_task(harness, model, tokenizer, task))

    def score_task(self, harness: Any, model: Any, tokenizer: Any, task: str) -> tuple[list[dict[str, Any]], str | None]:
        from lm_eval.models.huggingface import HFLM

        found = harness.find_tasks([str(Path(self.asked["work"]) / "tasks" / f"{task}.yaml")])
        limit = self.asked["settings"]["limit"]
        size: int | str = f"auto:{SCHEDULE}"
        if self.asked["device"] == "cpu" or limit is not None:
            size = 8  # an automatic size needs as many requests as it is found times
        elif task == LAST:
            size = GENERATED  # an automatic size would be that of texts as long as the model's context
        runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_batch_size=BATCH, softmax_dtype="float32")
        scores = [score for score in harness.run_tasks(runner, found, limit=limit) if not score.group]
        values = [metric(store.metric_name(s.metric, s.filter), s.score, s.stderr, s.items, s.shots) for s in scores]
        main = next(score for score in scores if store.metric_name(score.metric, score.filter) == store.MAIN[task])
        return values, as_digits(main)


def as_digits(score: TaskScore) -> str | None:
    """The items' scores as 0 and 1; None if they are other numbers."""
    if not score.per_item or not set(score.per_item) <= {0.0, 1.0}:
        return None
    return "".join(str(int(value)) for value in score.per_item)


def metric(name: str, value: float, stderr: float | None = None, items: int | None = None, shots: int | None = None) -> dict[str, Any]:
    return {"metric": name, "value": value, "stderr": stderr, "items": items, "shots": shots}


def fingerprint(folder: Path) -> str:
    """The start of a SHA-256 over the weights' files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
