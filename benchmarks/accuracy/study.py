"""The accuracy study: converts, evaluates and keeps what it finds, stage by stage; started again, it goes on where it was.

    python benchmarks/accuracy/study.py --models smollm2=/path qwen=/path --data DIR --work DIR --out DIR --workers 4 --minutes 18

Cells run beside each other in processes of their own, spread over the GPUs. A cell is model:method:pattern:scheme. DATA holds text/ and
tasks/; WORK the checkpoints, each deleted when nothing needs it any more; OUT the results: cells/ and items/ (JSON), logs/, results.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import store
from cells import DENSE, TEXT, TWIN, Job, jobs_of
from tasks import write_tasks

HERE = Path(__file__).parent
TAKEN = 75
LINE = 300
"""Characters of an error that are kept."""


@dataclass
class Running:
    """A job's process."""

    job: Job
    process: subprocess.Popen
    slot: int
    log: Path
    began: float


def main() -> None:
    asked = arguments()
    if asked.collect:
        print(store.collect(asked.out, asked.out / "results.csv"), "rows in", asked.out / "results.csv")
        return
    models = dict(entry.split("=", 1) for entry in asked.models)
    skipped = tuple(asked.skip_tasks) + (("text", "twin") if asked.skip_text else ())
    jobs = [job for model in models for job in jobs_of(model, skipped, tuple(asked.cells))]
    if asked.list:
        print(*(f"{job.cell.name}: {', '.join(job.stages)}" for job in jobs), sep="\n")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the jobs' processes end, too
    (asked.out / "logs").mkdir(parents=True, exist_ok=True)
    prepare(asked, jobs)
    Study(asked, models, jobs).run()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=FOLDER", help="dense checkpoints; smollm… runs the small study")
    parser.add_argument("--data", type=Path, help="folder with text/wikitext2_test.txt and tasks/*.jsonl")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and task files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, old ones included")
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="GLOB", help="such as 'smollm2:*:6:8*'")
    parser.add_argument("--skip-tasks", nargs="+", default=[], metavar="TASK", help="names or globs")
    parser.add_argument("--skip-text", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="cells at the same time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop what is running after this time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--calibration", type=Path, help="text file; text/wikitext2_train_part.txt of the data when not given")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, help="of reconstruction, for auto; its own number when not given")
    parser.add_argument("--context", type=int, default=2048, help="tokens per window of the text, and their stride")
    parser.add_argument("--max-tokens", type=int, help="use only the first tokens of the text")
    parser.add_argument("--limit", type=int, help="use only the first items of each task")
    parser.add_argument("--commit", default=None, help="what runs; asked of git when not given")
    parser.add_argument("--list", action="store_true", help="only show the jobs, in order")
    parser.add_argument("--collect", action="store_true", help="only write OUT/results.csv anew")
    asked = parser.parse_args()
    if not asked.collect and not asked.list and not (asked.models and asked.data and asked.work):
        parser.error("--models, --data and --work are needed")
    return asked


def prepare(asked: argparse.Namespace, jobs: list[Job]) -> None:
    """Task files, and the settings, which must be those of the results that are there."""
    asked.calibration = asked.calibration or asked.data / "text" / "wikitext2_train_part.txt"
    tasks = {stage for job in jobs for stage in job.stages} - {TEXT, TWIN}
    if tasks:
        if find_spec("lm_eval") is None:
            sys.exit("tasks need lm-eval: pip install 'slidesparse[eval]', or leave all of them out with --skip-tasks")
        write_tasks(asked.data / "tasks", asked.work / "tasks", only=tasks)
    settings = {key: getattr(asked, key) for key in ("samples", "length", "steps", "context", "max_tokens", "limit")}
    settings |= {"calibration": f"{asked.calibration.name} {sha256(asked.calibration)}", "seed": 0}
    settings["text"] = sha256(asked.data / "text" / "wikitext2_test.txt")
    path = asked.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        sys.exit(f"{path}: the results there were made with other settings: name another --out")
    path.write_text(json.dumps(settings, indent=1))
    asked.settings = settings


class Study:
    """The jobs that wait, those that run, and the time that is left."""

    def __init__(self, asked: argparse.Namespace, models: dict[str, str], jobs: list[Job]) -> None:
        self.asked, self.models = asked, models
        self.gpus = gpus() if asked.device == "cuda" else []
        self.waiting = [job for job in jobs if not store.is_done(asked.out, job.cell, job.stages)]
        self.running: list[Running] = []
        self.deadline = time.monotonic() + 60 * asked.minutes
        self.commit = commit() if asked.commit is None else asked.commit
        on = f"GPUs {', '.join(self.gpus)}" if self.gpus else "the CPU"
        print(f"{len(self.waiting)} of {len(jobs)} jobs to do, {asked.workers} at a time on {on}", flush=True)

    def run(self) -> None:
        try:
            while (self.waiting or self.running) and time.monotonic() < self.deadline:
                self.start()
                time.sleep(0.2)
                for each in [each for each in self.running if each.process.poll() is not None]:
                    self.end(each)
        finally:
            self.stop()
            rows = store.collect(self.asked.out, self.asked.out / "results.csv")
            print(f"{rows} rows in {self.asked.out / 'results.csv'}; {len(self.waiting)} jobs left", flush=True)

    def start(self) -> None:
        """The next jobs, of which no cell runs already, in free slots."""
        while len(self.running) < self.asked.workers:
            busy = {each.job.cell for each in self.running}
            job = next((job for job in self.waiting if job.cell not in busy), None)
            if job is None:
                return
            self.waiting.remove(job)
            slot = min(set(range(self.asked.workers)) - {each.slot for each in self.running})
            log = self.asked.out / "logs" / f"{job.cell.file}.log"
            with log.open("a") as stream:
                process = subprocess.Popen(self.command(job), stdout=stream, stderr=stream, env=self.environment(slot))
            self.running.append(Running(job, process, slot, log, time.monotonic()))

    def command(self, job: Job) -> list[str]:
        asked = self.asked
        content: dict[str, Any] = {"cell": job.cell.name, "stages": job.stages, "model": self.models[job.cell.model]}
        content |= {key: str(getattr(asked, key)) for key in ("data", "work", "out", "calibration", "device")}
        beside = math.ceil(asked.workers / max(len(self.gpus), 1))
        content |= {"settings": asked.settings, "commit": self.commit, "share": 0.9 / beside}
        return [sys.executable, "-W", "ignore", str(HERE / "fill.py"), json.dumps(content)]

    def environment(self, slot: int) -> dict[str, str]:
        """One GPU, a share of the cores, and nothing fetched."""
        given = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_MININTERVAL": "5"}
        given["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.asked.workers))
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        return given | dict(os.environ) | gpu

    def end(self, each: Running) -> None:
        """Say how a job went, keep its error if it failed, and delete a checkpoint that no job needs."""
        self.running.remove(each)
        job, code = each.job, each.process.returncode
        took = f"{time.monotonic() - each.began:.0f} s"
        stages = store.read(self.asked.out, job.cell)["stages"]
        if code == TAKEN:
            print(f"{job.cell.name}: another runner has it", flush=True)
            return
        if code:
            line = last_line(each.log)
            missing = next((stage for stage in job.stages if stage not in stages), job.stages[-1])
            content = store.read(self.asked.out, job.cell)
            content["errors"][missing] = line
            store.write(self.asked.out, "cells", job.cell, content)
            print(f"{job.cell.name}: FAILED at {missing} after {took}: {line}", flush=True)
        else:
            print(f"{job.cell.name}: {took}; {shown(stages, job)}", flush=True)
        if job.cell.method != DENSE and not any(other.cell == job.cell for other in self.waiting):
            shutil.rmtree(self.asked.work / job.cell.file, ignore_errors=True)

    def stop(self) -> None:
        for each in self.running:
            each.process.kill()
            each.process.wait()
            print(f"{each.job.cell.name}: stopped after {time.monotonic() - each.began:.0f} s", flush=True)
            self.waiting.insert(0, each.job)
        self.running = []


def shown(stages: dict[str, Any], job: Job) -> str:
    """The value of each stage that counts most."""
    found = [(stage, stages[stage]) for stage in ("convert", *job.stages) if stage in stages]
    values = {stage: {value["metric"]: value["value"] for value in record["values"]} for stage, record in found}
    heads = {stage: values[stage].get(store.MAIN.get(stage), next(iter(values[stage].values()))) for stage, _ in found}
    return ", ".join(f"{stage} {heads[stage]:.4g} ({record['seconds']:.0f} s)" for stage, record in found)


def last_line(log: Path) -> str:
    """Of a traceback; the error itself."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:LINE] if lines else "ended without a word"


def gpus() -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    if not found:
        sys.exit("there is no GPU: --device cpu runs on the CPU")
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def commit() -> str:
    """The short hash of what runs, empty outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
