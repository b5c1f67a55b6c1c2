"""The local task files of benchmarks/accuracy ask what lm-eval's own files ask, word for word, and score as they do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'slidesparse[eval]'")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "accuracy" / "tasks.py"
SHIPPED = Path(lm_eval.__file__).parent / "tasks"
LETTERS = ["A", "B", "C", "D"]
CHOICES = ["a knife", "the 'other' \"spoon\"", "[fork]", "none, of; these"]

SCIENCE = {"query": "Question: Plants use sunlight to make", "choices": CHOICES, "gold": 2}
SCIENCE_HUB = {"question": "Plants use sunlight to make", "choices": {"text": CHOICES, "label": LETTERS}, "answerKey": "C"}
WORK = "She sells 2 + 3 = <<2+3=5>>5.\nThat is all."
HELLASWAG = {
    "activity_label": "Finance",
    "ctx_a": " [header] How to pay [title] Count it. [step] Look  at",
    "ctx_b": "the MAN",
    "endings": ["goes [substeps] home.", " [title] Stays", 'it\'s "his"', "pays."],
    "label": 3,
}
ITEMS = {
    "arc_easy": ("arc/arc_easy.yaml", "arc_easy", SCIENCE, SCIENCE_HUB),
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge", SCIENCE, SCIENCE_HUB),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        "openbook_qa",
        {"query": "Fog is over", "choices": CHOICES, "gold": 0},
        {"question_stem": "Fog is over", "choices": {"text": CHOICES, "label": LETTERS}, "answerKey": "A"},
    ),
    "piqa": (
        "piqa/piqa.yaml",
        "piqa",
        {"query": "Question: dresser\n", "choices": CHOICES[:2], "gold": 1},
        {"goal": "dresser", "sol1": CHOICES[0], "sol2": CHOICES[1], "label": 1},
    ),
    "boolq": (
        "super_glue/boolq/default.yaml",
        "boolq",
        {"query": "Passage: Passage: it is.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1},
        {"passage": "Passage: it is.", "question": "is it", "label": 1},
    ),
    "winogrande": (
        "winogrande/default.yaml",
        "winogrande",
        {"context_options": ["Ann saw Bea so Ann", "Ann saw Bea so Bea"], "continuation": "ran.", "gold": 1},
        {"sentence": "Ann saw Bea so _ ran.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    ),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag_1000", HELLASWAG, HELLASWAG | {"label": "3"}),
    "lambada_openai": (
        "lambada/lambada_openai.yaml",
        "lambada_openai",
        {"context": '"Is it  you?"\n\nSaid', "continuation": "Shane"},
        {"text": '"Is it  you?"\n\nSaid Shane'},
    ),
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The task files made from one item per task, nine for GSM8K, and two subjects of MMLU."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("accuracy_tasks", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    data = tmp_path / "data"
    data.mkdir()
    rows = {file: [local] for _, file, local, _ in ITEMS.values()}
    rows["gsm8k"] = [{"context": f"Question {i}?", "chain_of_thought": WORK, "answer": f"{i},000"} for i in range(9)]
    for split, count in (("dev", 5), ("test", 2)):
        rows[f"mmlu_{split}"] = [question(subject, split, i) for i in range(count) for subject in ("us_law", "anatomy")]
    for file, items in rows.items():
        (data / f"{file}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return script.write_tasks(data, tmp_path / "out")


def question(subject: str, split: str, i: int) -> dict:
    return {"subject": subject, "question": f" {subject} {split} {i}?", "choices": CHOICES, "answer": i % 4}


def shipped(folder: Path, file: str, rows: list[dict], shots: list[dict] | None = None, **changes: object):
    """lm-eval's own task on other rows."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(SHIPPED / file)
    for key in ("tag", "dataset_name", "training_split", "validation_split", "fewshot_split"):
        config.pop(key, None)
    files = {}
    for split, items in (("test", rows), ("shots", shots)):
        if items is not None:
            files[split] = str(folder / f"{Path(file).stem}_{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(item) + "\n" for item in items))
    if shots is not None:
        config |= {"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}}
    config |= {"test_split": "test", "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    return ConfigurableTask(config=config | changes)


def asked(task) -> list[tuple]:
    """What a model is asked, and what is right."""
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(each.request_type, each.args, task.doc_to_target(each.doc)) for each in task.instances]


def check_same(mine, theirs) -> None:
    assert asked(mine) == asked(theirs)
    for name in ("_aggregation_list", "_metric_fn_kwargs", "_higher_is_better", "OUTPUT_TYPE", "VERSION"):
        assert getattr(mine, name) == getattr(theirs, name), name
    for name in ("generation_kwargs", "filter_list", "target_delimiter", "fewshot_delimiter"):
        assert mine.get_config(name) == theirs.get_config(name), name


@pytest.fixture
def tasks(written):
    from slidesparse.integrations import harness

    return harness.find_tasks(written).loaded["tasks"]


def test_prompts_answers_and_metrics_are_those_of_lm_eval(tasks, tmp_path):
    for name, (file, _, _, hub) in ITEMS.items():
        check_same(tasks[name], shipped(tmp_path, file, [hub]))
    rows = [{"question": f"Question {i}?", "answer": f"{WORK}\n#### {i},000"} for i in range(9)]
    check_same(tasks["gsm8k"], shipped(tmp_path, "gsm8k/gsm8k.yaml", rows[8:], rows[:8]))
    assert len(tasks["gsm8k"].instances) == 1 and tasks["gsm8k"].instances[0].args[0].count("####") == 5


def test_mmlu_takes_its_shots_from_the_subject(tasks, tmp_path):
    assert {name for name in tasks if name.startswith("mmlu")} == {"mmlu::local_us_law", "mmlu::local_anatomy"}
    rows = {split: [question("anatomy", split, i) for i in range(count)] for split, count in (("dev", 5), ("test", 2))}
    theirs = shipped(tmp_path, "mmlu/default/mmlu_anatomy.yaml", rows["test"], rows["dev"], num_fewshot=5)
    mine = tasks["mmlu::local_anatomy"]
    assert asked(mine) == asked(theirs) and mine._aggregation_list == theirs._aggregation_list
    prompt = asked(tasks["mmlu::local_us_law"])[0][1][0]
    assert prompt.startswith("The following are multiple choice questions (with answers) about us law.\n\n")
    assert prompt.count("us_law dev") == 5 and "anatomy" not in prompt
