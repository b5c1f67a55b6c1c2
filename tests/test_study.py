"""The accuracy study's runner on a tiny model: results stage by stage, going on after a kill, tables from its CSV."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

STUDY = Path(__file__).parent.parent / "benchmarks" / "accuracy"
WORDS = ["the", "sparse", "model", "keeps", "six", "of", "eight", "weights", "and", "drops", "two", "small", "ones"]


def tiny_model(path: Path) -> Path:
    """A random Llama whose tokens are bytes."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({"<s>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<s>", pad_token="<s>").save_pretrained(path)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=257
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def tiny_data(path: Path, rng: torch.Generator) -> Path:
    """Random words as texts, and a task of eight questions."""

    def words(count: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=rng).tolist())

    for folder in ("text", "tasks"):
        (path / folder).mkdir(parents=True)
    (path / "text" / "wikitext2_test.txt").write_text(words(100))
    (path / "text" / "wikitext2_train_part.txt").write_text(words(400))
    items = [{"query": f"Question: {words(3)}\nAnswer:", "choices": [words(2), words(4)], "gold": i % 2} for i in range(8)]
    (path / "tasks" / "piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def command(model: Path, data: Path, folder: Path, *more: str) -> list[str]:
    asked = ["--models", f"smollm2={model}", "--data", data, "--work", folder / "work", "--out", folder / "out", "--device", "cpu"]
    sizes = ["--samples", "2", "--length", "32", "--context", "64"]
    return [sys.executable, str(STUDY / "study.py"), *map(str, asked), *sizes, *more]


def study(model: Path, data: Path, folder: Path, *more: str) -> str:
    done = subprocess.run(command(model, data, folder, *more), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cell(folder: Path, name: str) -> dict:
    return json.loads((folder / "out" / "cells" / f"{name}.json").read_text())


def rows(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with (folder / "out" / "results.csv").open(newline="") as file:
        return {(row["method"], row["scheme"], row["stage"], row["metric"]): row for row in csv.DictReader(file)}


def test_a_study_that_was_killed_goes_on_and_makes_tables(tmp_path: Path, rng: torch.Generator) -> None:
    pytest.importorskip("lm_eval")
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data", rng)
    asked = ("--cells", "*:dense:-:bf16", "*:magnitude:6:8:bf16", "--skip-tasks", "arc_easy", "hellaswag", "lambada_openai")
    first = tmp_path / "out" / "cells" / "smollm2_dense_-_bf16.json"
    runner = subprocess.Popen(command(model, data, tmp_path, *asked), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not first.exists() and runner.poll() is None:
        time.sleep(0.05)
    os.kill(runner.pid, signal.SIGTERM)
    assert runner.wait() == 143, runner.stdout.read()
    before = cell(tmp_path, "smollm2_dense_-_bf16")["stages"]["text"]

    assert "FAILED" not in study(model, data, tmp_path, *asked)
    assert cell(tmp_path, "smollm2_dense_-_bf16")["stages"]["text"] == before
    found = rows(tmp_path)
    pruned, dense = found["magnitude", "bf16", "piqa", "acc"], found["dense", "bf16", "piqa", "acc"]
    assert float(pruned["difference"]) == pytest.approx(float(pruned["value"]) - float(dense["value"]), abs=1e-6)
    items = [
        json.loads((tmp_path / "out" / "items" / f"smollm2_{name}_bf16.json").read_text())["piqa"] for name in ("dense_-", "magnitude_6-8")
    ]
    assert [len(each) for each in items] == [8, 8]
    assert float(pruned["value"]) == items[1].count("1") / 8
    errors = torch.tensor([int(a) - int(b) for a, b in zip(*items, strict=True)], dtype=torch.float64)
    assert float(pruned["difference_stderr"]) == pytest.approx(float(errors.std()) / 8**0.5, rel=1e-4)
    assert not (tmp_path / "work" / "smollm2_magnitude_6-8_bf16").exists()

    assert "0 of 2 jobs to do" in study(model, data, tmp_path, *asked)
    done = subprocess.run(
        [sys.executable, STUDY / "tables.py", tmp_path / "out" / "results.csv"], capture_output=True, text=True, check=True
    )
    perplexity = [f"{float(found[method, 'bf16', 'text', 'perplexity']['value']):.2f}" for method in ("dense", "magnitude")]
    assert f"| **dense** | bf16 | {perplexity[0]} |  |  |  |  |" in done.stdout
    assert f"| magnitude | bf16 |  | not run | {perplexity[1]} | not run | not run |" in done.stdout


def test_packed_and_twin_agree_and_dense_8_bits_are_near_dense(tmp_path: Path, rng: torch.Generator) -> None:
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data", rng)
    tasks = ("arc_easy", "piqa", "hellaswag", "lambada_openai")
    study(model, data, tmp_path, "--cells", "*:auto:6:8:bf16", "*:dense:-:int8", "--skip-tasks", *tasks)
    found = rows(tmp_path)
    packed = float(found["auto", "bf16", "text", "perplexity"]["value"])
    assert float(found["auto", "bf16", "twin", "twin_perplexity"]["value"]) == pytest.approx(packed, rel=1e-3)
    assert 0 < float(found["dense", "int8", "text", "kl"]["value"]) < float(found["auto", "bf16", "text", "kl"]["value"])


def test_a_cell_that_fails_leaves_its_error_and_the_others_go_on(tmp_path: Path, rng: torch.Generator) -> None:
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data", rng)
    (data / "text" / "wikitext2_train_part.txt").write_text("too short")
    asked = ("--cells", "*:wanda:6:8:bf16", "*:magnitude:6:8:bf16", "--skip-tasks", "arc_easy", "piqa", "hellaswag", "lambada_openai")
    assert "smollm2:wanda:6:8:bf16: FAILED at text" in study(model, data, tmp_path, *asked)
    found = rows(tmp_path)
    assert "CheckpointError" in found["wanda", "bf16", "text", "error"]["note"]
    assert ("magnitude", "bf16", "text", "perplexity") in found


def test_results_of_other_settings_are_not_mixed(tmp_path: Path, rng: torch.Generator) -> None:
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data", rng)
    study(model, data, tmp_path, "--cells", "none")
    done = subprocess.run(command(model, data, tmp_path, "--cells", "none", "--limit", "3"), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "other settings" in done.stderr
