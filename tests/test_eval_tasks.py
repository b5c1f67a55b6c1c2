"""Tasks through lm-eval, and the eval command: packed models run as they are, and scores are those of sums done by hand."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import tiny
from architectures import ARCHITECTURES
from packed_checkpoint import random_model
from slidesparse.checkpoint import Recipe, convert
from slidesparse.errors import EvaluationError
from slidesparse.evaluate import divergence, perplexity, tokenize_file
from slidesparse.integrations.transformers import load
from slidesparse.nn import SlideSparseLinear
from slidesparse.pattern import Pattern

WORDS = 64
NEEDS = "lm-eval is not installed: pip install 'slidesparse[eval]'"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
PERPLEXITY = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{' ' ~ choices[0]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """The adapter, with data sets cached where the test can see them."""
    pytest.importorskip("lm_eval", reason=NEEDS)
    import datasets

    from slidesparse.integrations import harness

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return harness


@pytest.fixture
def dense(tmp_path):
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    random_model(config, torch.float32).save_pretrained(tmp_path / "dense")
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<pad>", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def packed(tmp_path, dense):
    convert(dense, tmp_path / "packed", Recipe(Pattern.parse("4:6"), "magnitude", "int8"))
    return tmp_path / "packed"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(phrase(300))
    return tmp_path / "text.txt"


def phrase(length: int) -> str:
    return " ".join(f"w{int(i)}" for i in torch.randint(2, WORDS, (length,)))


def write_task(folder: Path, name: str = "mine", items: int = 7, pattern: str = TASK) -> tuple[Path, list[dict]]:
    """A task file, its data beside it, and that data; answers differ in length, so that acc_norm is not acc."""
    docs = [{"query": phrase(5), "choices": [phrase(n) for n in (1, 2, 4)], "gold": int(torch.randint(3, ()))} for _ in range(items)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / f"{name}.yaml").write_text(pattern.format(name=name, data=folder / f"{name}.jsonl"))
    return folder / f"{name}.yaml", docs


@torch.no_grad()
def by_hand(model, tokenizer, docs: list[dict]) -> tuple[list[float], list[float]]:
    """Whether the likeliest answer is right, and the likeliest by character, one sequence at a time."""
    plain, normalised = [], []
    for doc in docs:
        scores = []
        for choice in doc["choices"]:
            ids = tokenizer(f"{doc['query']} {choice}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(doc["query"])["input_ids"])
            if model.config.is_encoder_decoder:
                ids, given = ids[:, start:], {"input_ids": ids[:, :start], "labels": ids[:, start:]}
                found, start = model(**given).logits[0].double().log_softmax(-1).roll(-1, 0), 0
            else:
                found = model(ids).logits[0].double().log_softmax(-1)
            scores.append(sum(float(found[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        lengths = [len(choice) for choice in doc["choices"]]
        plain.append(float(scores.index(max(scores)) == doc["gold"]))
        per_character = [score / length for score, length in zip(scores, lengths, strict=True)]
        normalised.append(float(per_character.index(max(per_character)) == doc["gold"]))
    return plain, normalised


def test_scores_are_those_of_the_packed_layers(harness, packed, tmp_path, monkeypatch):
    file, docs = write_task(tmp_path)
    model, tokenizer = load(packed, device="cpu")
    calls: Counter[str] = Counter()
    forward = SlideSparseLinear.forward

    def spy(self, x):
        calls[self.name] += 1
        return forward(self, x)

    monkeypatch.setattr(SlideSparseLinear, "forward", spy)
    acc, norm = harness.evaluate_tasks(model, tokenizer, [str(file)], batch_size=4)
    assert len(calls) == 14 and len(set(calls.values())) == 1 and calls.popitem()[1] >= len(docs) * 3 // 4
    wanted = by_hand(model, tokenizer, docs)
    for found, metric, items in ((acc, "acc", wanted[0]), (norm, "acc_norm", wanted[1])):
        assert (found.task, found.metric, found.filter, found.items, found.shots) == ("mine", metric, "none", 7, 0)
        assert list(found.per_item) == items and found.score == pytest.approx(sum(items) / 7)
        assert found.stderr == pytest.approx(statistics.stdev(items) / 7**0.5) and found.higher_is_better and found.group == ""
    limited = harness.evaluate_tasks(model, tokenizer, [str(file)], limit=3)
    assert limited[0].per_item == acc.per_item[:3]


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "t5"])
def test_models_that_see_and_those_with_an_encoder_are_scored_on_text(harness, name, run, tmp_path):
    ARCHITECTURES[name].build(torch.float32).save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", Recipe(Pattern.parse("4:6"), "magnitude", "int8"))
    tiny.add_tokenizer(tmp_path / "packed")
    task, docs = write_task(tmp_path)
    code, _, said = run("eval", tmp_path / "packed", "--tasks", task, "--device", "cpu")
    assert code == 1 and "set eos_token in tokenizer_config.json" in said and len(said.strip().splitlines()) == 1
    model, tokenizer = load(tmp_path / "packed")
    tokenizer.eos_token = "w9"
    rows = {row.metric: row.score for row in harness.evaluate_tasks(model, tokenizer, [str(task)])}
    plain, normalised = by_hand(model, tokenizer, docs)
    assert rows == {"acc": pytest.approx(statistics.mean(plain)), "acc_norm": pytest.approx(statistics.mean(normalised))}


def test_automatic_batches_follow_from_lengths(harness, packed, tmp_path, monkeypatch):
    file, _ = write_task(tmp_path, items=20)
    model, tokenizer = load(packed, device="cpu")
    lengths, shapes = [], []

    def by_length(length: int, vocabulary: int, device: torch.device) -> int:
        lengths.append(length)
        assert vocabulary == WORDS
        return 24 // length

    monkeypatch.setattr(harness, "windows_per_pass", by_length)
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    runner = harness.Runner(pretrained=model, tokenizer=tokenizer, batch_size="auto:8", max_batch_size=256, softmax_dtype="float32")
    found = harness.run_tasks(runner, [str(file)])
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 9 and lengths[-1] == 6 and len(lengths) <= 9
    assert max(rows for rows, _ in shapes) == 4 and shapes[0] == (2, 8)
    assert [row.per_item for row in found] == [row.per_item for row in harness.evaluate_tasks(model, tokenizer, [str(file)])]


def test_shots_folders_and_groups(harness, dense, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("one", "two"):
        file, _ = write_task(folder, name, items=4 if name == "one" else 6)
        file.write_text(file.read_text() + "fewshot_split: test\n")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list:\n  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    )
    model, tokenizer = load(dense, device="cpu")
    rows = harness.evaluate_tasks(model, tokenizer, ["both"], include=folder, num_fewshot=2)
    assert [(row.task, row.metric, row.group) for row in rows] == [
        ("both", "acc", ""), ("one", "acc", "both"), ("one", "acc_norm", "both"), ("two", "acc", "both"), ("two", "acc_norm", "both"),
    ]  # fmt: skip
    whole, one, two = (next(row for row in rows if row.task == name and row.metric == "acc") for name in ("both", "one", "two"))
    assert whole.per_item == one.per_item + two.per_item and whole.items == 10
    assert whole.score == pytest.approx((one.score * 4 + two.score * 6) / 10) and {row.shots for row in rows} == {2}


def test_one_report_of_text_tasks_and_reference(harness, run, dense, packed, text, tmp_path):
    task, docs = write_task(tmp_path)
    words, _ = write_task(tmp_path, "last_word", pattern=PERPLEXITY)
    out = tmp_path / "report.json"
    arguments = ("--tasks", f"{task},{words}", "--text", text, "--reference", dense, "--context", 64, "--stride", 64)
    code, printed, said = run("eval", packed, *arguments, "--device", "cpu", "--json", "--output", out)
    assert code == 0, said
    data = json.loads(printed)
    assert data == json.loads(out.read_text())
    assert "bootstrapping" in said, "lm-eval prints this on stdout"
    packed_model, tokenizer = load(packed, device="cpu")
    dense_model, _ = load(dense, device="cpu")
    found = divergence(packed_model, dense_model, tokenize_file(tokenizer, text), context=64)
    assert (data["kl"], data["top1_agreement"], data["tokens"]) == (found.kl, found.agreement, 300 - 5) and found.kl > 0
    assert data["perplexity"] == found.model.perplexity and data["reference_perplexity"] == found.reference.perplexity
    assert data["perplexity_ratio"] == pytest.approx(data["perplexity"] / data["reference_perplexity"])
    assert data["versions"].keys() == {"slidesparse", "transformers", "torch", "lm_eval"} and data["runtime"] == "transformers"
    acc, _, last = data["tasks"]
    ours, theirs = by_hand(packed_model, tokenizer, docs)[0], by_hand(dense_model, tokenizer, docs)[0]
    assert acc["score"] == pytest.approx(sum(ours) / 7) and acc["reference_score"] == pytest.approx(sum(theirs) / 7)
    assert acc["recovery"] == (pytest.approx(sum(ours) / sum(theirs)) if sum(theirs) else None)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert acc["difference_stderr"] == pytest.approx(statistics.stdev(differences) / 7**0.5)
    assert last["metric"] == "perplexity" and last["recovery"] == pytest.approx(last["score"] / last["reference_score"])
    assert last["difference_stderr"] is None and not last["higher_is_better"]

    code, _, said = run("eval", packed, "--tasks", task, "--output", out)
    assert code == 1 and "report.json is there" in said and json.loads(out.read_text()) == data
    code, printed, _ = run("eval", packed, *arguments, "--device", "cpu", "--output", tmp_path / "report.md")
    table = (tmp_path / "report.md").read_text()
    assert code == 0 and "| mine | acc | 0 | 7 |" in table and "KL(reference ‖ model)" in table and "last_word" in printed


def test_text_alone_keeps_its_line_and_keys(run, packed, text):
    model, tokenizer = load(packed, device="cpu")
    wanted = perplexity(model, tokenize_file(tokenizer, text), context=64, stride=32)
    code, printed, _ = run("eval", packed, "--text", text, "--context", 64, "--stride", 32, "--device", "cpu")
    score = f"{wanted.perplexity:.4f} ± {wanted.perplexity_stderr:.4f}"
    assert (code, printed) == (0, f"perplexity {score}  (299 tokens scored, context 64, stride 32)\n")
    code, printed, _ = run("eval", packed, "--text", text, "--context", 64, "--stride", 32, "--device", "cpu", "--batch-size", 3, "--json")
    data = json.loads(printed)
    assert data["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-3)
    assert {"model", "text", "perplexity", "nll", "tokens", "context", "stride"} <= data.keys() and "tasks" not in data


def test_what_cannot_be_evaluated_is_said_in_a_line(harness, run, dense, packed, text, tmp_path):
    task, _ = write_task(tmp_path)
    (tmp_path / "odd.yaml").write_text("metric: acc\n")
    gone, _ = write_task(tmp_path, "gone")
    (tmp_path / "gone.jsonl").unlink()
    (tmp_path / "broken.yaml").write_text(task.read_text().replace("task: mine", "task: broken").replace("query", "absent"))
    for names, words in {
        "arc_eazy": "task arc_eazy is unknown; near it: arc_easy",
        f"{tmp_path}/nothing.yaml": "there is no task file",
        f"{tmp_path}/odd.yaml": "is no task file of lm-eval",
        f"{gone}": r"task gone: its data cannot be read or fetched \(Unable to find",
        f"{tmp_path}/broken.yaml": "task broken: lm-eval cannot set it up .*absent",
        f"{task},{task}": "",
        ",": "no task is named",
    }.items():
        code, printed, said = run("eval", packed, "--tasks", names, "--device", "cpu", "--limit", 1)
        if words:
            assert (code, printed) == (1, "") and re.match("error: .*" + words, said), said
            assert len(said.strip().splitlines()) == 1
        else:
            assert code == 0, said
    code, _, said = run("eval", packed, "--tasks", task, "--num-fewshot", 30, "--device", "cpu")
    assert code == 1 and "lm-eval cannot run the tasks" in said


def test_command_lines_at_fault(run, dense, packed, text, tmp_path):
    for arguments, words in [
        ((), "nothing to evaluate on"),
        (("--text", text, "--context", 8, "--stride", 9), "--stride 9 is larger"),
        (("--text", text, "--output", tmp_path / "report.txt"), "must end in .json or .md"),
        (("--text", text, "--runtime", "vllm", "--device", "cpu"), "are for transformers"),
    ]:
        code, printed, said = run("eval", packed, *arguments)
        assert (code, printed) == (2, "") and words in " ".join(said.replace("│", " ").split()), said
    code, _, said = run("eval", packed, "--text", text, "--reference", tmp_path / "nowhere")
    assert code == 1 and "nowhere" in said
    other = json.loads((packed / "tokenizer.json").read_text())
    other["model"]["vocab"] |= {"w2": 3, "w3": 2}
    (packed / "tokenizer.json").write_text(json.dumps(other))
    code, _, said = run("eval", packed, "--text", text, "--reference", dense, "--device", "cpu", "--context", 64, "--stride", 64)
    assert code == 1 and "they need the same tokenizer" in said


@pytest.mark.parametrize(("package", "arguments"), [("lm_eval", ("--tasks", "arc_easy")), ("vllm", ("--runtime", "vllm"))])
def test_a_missing_package_is_named_with_its_extra(run, monkeypatch, packed, text, package, arguments):
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("harness", "vllm_evaluation"):
        monkeypatch.delitem(sys.modules, f"slidesparse.integrations.{name}", raising=False)
        monkeypatch.delattr(f"slidesparse.integrations.{name}", raising=False)
    code, printed, said = run("eval", packed, "--text", text, *arguments)
    extra = {"lm_eval": "eval", "vllm": "vllm"}[package]
    assert (code, printed) == (1, "") and f"pip install 'slidesparse[{extra}]'" in said and len(said.strip().splitlines()) == 1


class Engine:
    """As much of vLLM's engine as scoring a text needs; the numbers come from transformers."""

    def __init__(self, model: str, max_model_len: int, **settings: object) -> None:
        self.model, self.tokenizer = load(Path(model), device="cpu")
        core = SimpleNamespace(shutdown=lambda: print("engine stopped"))
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=min(max_model_len, 128)), engine_core=core)

    def get_tokenizer(self) -> object:
        return self.tokenizer

    @torch.no_grad()
    def generate(self, prompts: list[dict], asking: SimpleNamespace, use_tqdm: bool) -> list[SimpleNamespace]:
        assert (asking.max_tokens, asking.prompt_logprobs) == (1, 0)
        answers = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            assert len(ids) < self.llm_engine.model_config.max_model_len
            found = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            known = [{token: SimpleNamespace(logprob=float(found[i, token]))} for i, token in enumerate(ids[1:])]
            answers.append(SimpleNamespace(prompt_logprobs=[None, *known]))
        return answers


def test_vllm_scores_a_text_by_its_log_probabilities(run, monkeypatch, dense, packed, text):
    fake = ModuleType("vllm")
    fake.__version__, fake.LLM, fake.SamplingParams = "0.26.0", Engine, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.delitem(sys.modules, "slidesparse.integrations.vllm_evaluation", raising=False)
    shape = ("--text", text, "--context", 64, "--stride", 40)
    code, printed, said = run("eval", packed, *shape, "--reference", dense, "--runtime", "vllm", "--json")
    assert code == 0, said
    by_vllm = json.loads(printed)
    _, printed, _ = run("eval", packed, *shape, "--reference", dense, "--device", "cpu", "--json")
    by_transformers = json.loads(printed)
    for key, value in by_vllm.items():
        if isinstance(value, float):
            assert value == pytest.approx(by_transformers[key], rel=1e-5), key
    assert by_vllm["tokens"] == 299 and "kl" not in by_vllm and "--runtime transformers" in by_vllm["notes"][0]
    assert said.count("engine stopped") == 2
    monkeypatch.delitem(sys.modules, "slidesparse.integrations.vllm_evaluation", raising=False)
    code, _, said = run("eval", packed, "--text", text, "--context", 128, "--stride", 128, "--runtime", "vllm")
    assert code == 1 and "--context can be 127 at most" in said


def test_the_adapter_refuses_what_is_no_folder(harness, tmp_path):
    with pytest.raises(EvaluationError, match="is no folder of task files"):
        harness.find_tasks(["arc_easy"], include=tmp_path / "nowhere")
