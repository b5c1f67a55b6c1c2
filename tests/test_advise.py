"""Advice: sums of a plan's times, the model for what a plan lacks, the recommendation, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import models
from plans import HERE, times
from slidesparse.bench import accuracy, advice, recommend
from slidesparse.bench.accuracy import Loss
from slidesparse.bench.advice import TOKENS, Option, Speed, advise, pays_from
from slidesparse.bench.estimate import MEASURED, MODEL, UNPRUNED, Estimates
from slidesparse.bench.models import MODELS
from slidesparse.bench.recommend import recommended
from slidesparse.bench.targets import Target, target_of
from slidesparse.cli import advising
from slidesparse.errors import CheckpointError, UnsupportedError
from slidesparse.gemm import Cell, Plan
from slidesparse.gemm.plans import shipped_plan

ROOT = Path(__file__).resolve().parent.parent


def plan_with(**sparse: float) -> Plan:
    """Two layers at 16 and 1024 tokens: dense int8 takes 10 and 100 µs, bf16 twice as long, sparse 2:4 and 6:8 what is said."""
    plan = Plan(HERE)
    for n in (64, 128):
        for m, dense in ((16, 10.0), (1024, 100.0)):
            for scheme, factor in (("int8", 1.0), ("bf16", 2.0)):
                for pattern in ("2:4", "6:8"):
                    us = factor * dense / sparse[f"p{pattern[0]}"]
                    plan.add((n, 64, pattern, scheme), Cell(m, times(dense_triton=factor * dense, slid=us)))
    return plan


def option(found: advice.Advice, pattern: str, scheme: str) -> Option:
    return next(each for each in (*found.options, *found.dense) if (each.pattern, each.scheme) == (pattern, scheme))


def test_times_and_bytes_are_summed_over_layers_as_often_as_they_are_there() -> None:
    found = advise("some", {(64, 64): 2, (128, 64): 1}, plan_with(p2=2.0, p6=1.25), "here", tokens=(16, 1024))
    dense, half, most = option(found, UNPRUNED, "int8"), option(found, "2:4", "int8"), option(found, "6:8", "int8")
    assert [each.us for each in dense.speeds] == [30.0, 300.0] and dense.stored_bytes == dense.resident_bytes == 64 * 64 * 4
    assert [(each.against_8_bits, each.against_16_bits) for each in half.speeds] == [(2.0, 4.0)] * 2
    assert half.stored_bytes == 64 * 64 * 4 * 5 // 8 and half.resident_bytes == half.stored_bytes, "no window holds a weight twice"
    assert most.stored_bytes == 64 * 64 * 4 * 7 // 8 - 0 * 64 + 64 * 4 * (64 * 3 // 4 + 8 - 56), "values of 8 groups, and a bit each"
    assert [each.tokens_per_second for each in dense.speeds] == [pytest.approx(16 / 30e-6), pytest.approx(1024 / 300e-6)]
    assert {each.source for each in (*dense.speeds, *half.speeds)} == {MEASURED}
    sixteen = option(found, "6:8", "bf16")
    assert sixteen.gains() == {16: 1.25, 1024: 1.25} and sixteen.speeds[0].against_8_bits == pytest.approx(0.625)


def test_other_patterns_follow_the_slid_width_between_two_measured_ones() -> None:
    times_of = Estimates(plan_with(p2=2.0, p6=1.0))
    found = times_of.of(64, 64, "int8", "14:16", 1024)
    assert found is not None and found.source == MODEL
    assert found.us == pytest.approx(50 + (100 - 50) * (1.75 - 1) / 0.5), "γ is 1, 1.5 and 1.75"
    assert times_of.of(64, 64, "fp8", "14:16", 1024) is None and times_of.of(64, 64, "int8", "6:8", 4096) is None


def test_a_pattern_is_held_against_the_dense_time_of_its_own_run() -> None:
    plan, slow = plan_with(p2=2.0, p6=1.25), 1.3
    plan.add((64, 64, "6:8", "int8"), Cell(1024, times(dense_triton=slow * 100.0, slid=slow * 80.0)))
    dense, sparse = (Estimates(plan).of(64, 64, "int8", pattern, 1024) for pattern in (UNPRUNED, "6:8"))
    assert dense is not None and sparse is not None and (dense.us, sparse.us) == (100.0, pytest.approx(80.0))
    plan.add((64, 64, "2:4", "int8"), Cell(1024, times(dense_triton=100.0, dense_sm90=50.0, slid=40.0)))
    later = Estimates(plan).of(64, 64, "int8", "6:8", 1024)
    assert later is not None and later.us == pytest.approx(80.0), "a kernel that this run lacks tells nothing of its clock"


def test_more_tokens_stand_for_few_but_not_for_half_as_many() -> None:
    times_of = Estimates(plan_with(p2=2.0, p6=1.0))
    assert times_of.of(64, 64, "int8", "6:8", 1).at == 16 and times_of.of(64, 64, "int8", "6:8", 512).at == 1024
    assert times_of.of(64, 64, "int8", "6:8", 511) is None


def test_the_model_of_layers_that_were_not_measured_holds_for_those_that_were() -> None:
    """Held against the shipped times of one layer after the other, by those of the others."""
    plan = shipped_plan("nvidia-h200")
    for key in [key for key in plan.cells if key[:2] == (5120, 5120)]:
        others = Plan(plan.machine, {other: table for other, table in plan.cells.items() if other[:2] != key[:2]})
        for m in (16, 1024, 4096):
            told, known = (Estimates(each).of(*key[:2], key[3], key[2], m) for each in (others, plan))
            assert told.source == MODEL and known.source == MEASURED
            assert 0.8 < told.us / known.us < 1.3, (key, m)


def test_it_pays_from_where_every_larger_number_gains_too() -> None:
    assert pays_from({1: 1.5, 16: 1.0, 64: 1.1, 1024: 1.2}) == 64
    assert pays_from({1: 1.5, 16: 1.02}) is None and pays_from({1: 1.03}) == 1 and pays_from({}) is None


BEST, STUDY = "times as fast as the best dense weights of 8 bits", "in our study small's perplexity went from 20.00 to"


@pytest.mark.parametrize(
    ("p2", "p6", "few", "text"),
    [
        (
            1.5, 1.2, 1.2,
            f"Prune to 6:8 and serve in int8: it is faster in decode (1.20 {BEST}) and faster in prefill (1.20 times); {STUDY} 22.00.",
        ),
        (
            1.5, 1.2, 0.9,
            "Prune to 6:8 and serve in int8 where prefill is what counts: "
            f"it is faster in prefill (1.20 {BEST}) and slower in decode (0.90 times); {STUDY} 22.00.",
        ),
        (
            1.5, 0.9, 1.0,
            f"Stay dense in int8: 2:4 in int8 is faster in prefill (1.50 {BEST}) and as fast in decode (1.00 times), "
            f"but needs training after pruning; {STUDY} 50.00.",
        ),
        (
            1.01, 0.9, 0.9,
            "Stay dense in int8: no pattern is faster in all of decode or of prefill; "
            f"2:4 in int8, the best, is as fast in prefill (1.01 {BEST}) and slower in decode (0.90 times).",
        ),
    ],
)  # fmt: skip
def test_the_recommendation_tells_decode_from_prefill_in_one_sentence(monkeypatch, p2: float, p6: float, few: float, text: str) -> None:
    study = {"2:4": 50.0, "6:8": 22.0}
    told = {pattern: [Loss("small", pattern, "admm", value, 20.0, None, None, 0)] for pattern, value in study.items()}
    monkeypatch.setattr(advice, "losses", lambda pattern: told.get(pattern, []))
    monkeypatch.setattr(advice, "PATTERNS", ("2:4", "6:8"))
    plan = plan_with(p2=p2, p6=p6)
    for table in plan.cells.values():
        table[16] = Cell(16, times(dense_triton=10.0, slid=10.0 / few))
    assert advise("some", {(64, 64): 1}, plan, "here", tokens=(16, 1024)).recommendation == text


@pytest.mark.parametrize(
    ("gains", "word"),
    [((0.9, 0.95), "slower"), ((0.9, 1.0), "slower or as fast"), ((0.9, 1.1), "slower or faster"), ((1.0, 1.1), "as fast or faster")],
)
def test_a_mixed_result_is_called_so(gains: tuple[float, float], word: str) -> None:
    assert recommend._word(*gains) == word


def test_what_a_model_says_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "PATTERNS", ("4:6",))
    monkeypatch.setattr(advice, "losses", lambda pattern: [])
    text = advise("some", {(64, 64): 1}, plan_with(p2=2.0, p6=1.2), "here", tokens=(16, 1024)).recommendation
    assert text.startswith("Prune to 4:6 and serve in int8: by a model, which `slidesparse bench kernel` can confirm, it is faster in")


def test_dense_weights_may_be_best_in_other_schemes_for_decode_and_for_prefill() -> None:
    def made(pattern: str, scheme: str, *us: float) -> Option:
        speeds = [Speed(m, each, 0.5, 0.5, MEASURED, m) for m, each in zip((1, 4096), us, strict=True)]
        return Option(pattern, scheme, 1, 1, 1.0, speeds, None)

    text = recommended([made(UNPRUNED, "int8", 2.0, 3.0), made(UNPRUNED, "fp8", 1.0, 4.0)], [made("6:8", "int8", 4.0, 6.0)])
    assert text.startswith("Stay dense, in fp8 for decode or int8 for prefill: no pattern is faster")


def test_times_older_than_a_kernel_say_so() -> None:
    plan = plan_with(p2=2.0, p6=1.25)
    told = "These times are older than kernel sm90, which may be faster: run the command on the card itself."
    assert told in advise("some", {(64, 64): 1}, plan, "here").notes
    plan.cells[64, 64, "6:8", "int8"][16].dropped["sm90"] = "runs on GPUs of compute capability 9.0"
    assert not [note for note in advise("some", {(64, 64): 1}, plan, "here").notes if "older" in note]


def test_nothing_known_is_said_to_be_so() -> None:
    found = advise("some", {(64, 64): 1}, Plan(HERE), "here")
    assert found.recommendation == recommended([], []) and "run the command on the card itself" in found.recommendation


# ---------------------------------------------------------------------------------------------- what is asked about


def test_shapes_come_from_weights_from_a_configuration_alone_and_by_hand(tmp_path: Path) -> None:
    models.write(tmp_path / "whole")
    (tmp_path / "config.json").write_text(json.dumps(models.LLAMA))
    merged = {(128, 64): 2, (64, 64): 2, (200, 64): 2, (64, 100): 2}
    assert target_of(str(tmp_path / "whole")).shapes == merged
    assert target_of(str(tmp_path)) == target_of(str(tmp_path / "config.json")) == Target(merged)
    assert target_of("4096x14336").shapes == {(4096, 14336): 1}
    assert target_of("Qwen2.5-7B").shapes == {(4608, 3584): 28, (3584, 3584): 28, (37888, 3584): 28, (3584, 18944): 28}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "BitNet-2B"])
def test_the_list_of_models_has_the_layers_that_transformers_builds(name: str, tmp_path: Path) -> None:
    shape = MODELS[name]
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[shape.model_type]
    config = {
        "architectures": [architecture], "model_type": shape.model_type, "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": 1, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": 32,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(target_of(str(tmp_path)).shapes) == set(shape.linears.values())


def with_experts(path: Path, width: int) -> Path:
    """Qwen2Moe's config.json alone: 4 experts of three matrices of 64 x width in each of two layers, stacked or not."""
    config = {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 64, "intermediate_size": 100,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": width, "shared_expert_intermediate_size": 100,
    }  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_experts_are_told_and_refused_where_they_are_most_of_the_weights(run, tmp_path: Path) -> None:
    found = target_of(str(with_experts(tmp_path / "few", 8)))
    assert found.shapes == {(128, 64): 2, (64, 64): 2, (200, 64): 2, (64, 100): 2}, "shared experts are linear layers, gates are not"
    (note,) = found.notes
    assert "matrices of experts, 2.46e-05 GB or" in note and "stay dense" in note
    status, out, err = run("advise", tmp_path / "few")
    assert status == 0 and "matrices of experts" in out, err
    status, _, err = run("advise", with_experts(tmp_path / "most", 256))
    assert status == 1 and "of all weights, stay dense: advice about the other layers would say little" in " ".join(err.split())
    tensors = models.llama_tensors() | {"model.layers.0.mlp.experts.down_proj": torch.zeros(4, 64, 8, dtype=torch.bfloat16)}
    assert target_of(str(models.write(tmp_path / "stored", tensors))).notes[0].startswith("4 matrices of experts, 4.1e-06 GB")


def test_heads_are_known_by_what_they_do_and_not_by_their_names(tmp_path: Path) -> None:
    config = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 99}))
    assert (99, 64) not in target_of(str(tmp_path)).shapes, "its head is called embed_out"
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in models.LLAMA.items() if key != "architectures"}))
    with pytest.raises(UnsupportedError, match="names no class under `architectures`"):
        target_of(str(tmp_path))


def test_layers_of_another_class_are_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 1}))
    with pytest.raises(UnsupportedError, match=r"GPT2LMHeadModel has Conv1D in place of nn\.Linear"):
        target_of(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("target", "message"),
    [("0x64", "no shape NxK"), ("17", "no name on the hub"), ("{}", "not a config.json"), ("[1]", "does not hold a model configuration")],
)
def test_what_is_none_of_these_is_refused_in_one_line(tmp_path: Path, target: str, message: str) -> None:
    file = tmp_path / "config.json"
    if target[0] in "{[":
        file.write_text(target[:-1] if target == "{}" else target)
    with pytest.raises(CheckpointError, match=message):
        target_of(str(file) if target[0] in "{[" else target)


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="it measures where there is a GPU")
def test_without_a_card_the_times_of_a_known_one_tell_and_are_marked(run) -> None:
    status, out, _ = run("advise", "Qwen2.5-7B")
    assert status == 0 and "NVIDIA H200, measured on 20" in out and "times come with the package" in out
    assert "Stay dense" in out and "~8:10" in out and "for these models, not yours" in out and "linear layers alone" in out
    tables = [line for line in out.splitlines() if line.startswith(" ")]
    assert len(tables) > 15 and max(map(len, tables)) <= 80 and "14:16" not in out
    status, out, _ = run("advise", "Qwen2.5-7B", "--all")
    assert status == 0 and "14:16" in out and "~0." in out
    status, out, _ = run("advise", "4096x14336", "--card", "h100", "--json")
    told = json.loads(out)
    assert status == 0 and told["card"].startswith("NVIDIA H100") and told["layers"] == {"4096 × 14336": 1}
    assert {each["source"] for option in told["options"] for each in option["speeds"]} == {"model"}
    status, _, err = run("advise", "17")
    assert status == 1 and len(err.strip().splitlines()) == 1


def test_with_a_card_the_merged_layers_are_tuned_and_the_plan_tells(run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def tune(layers, **options):
        asked.update(options, layers=layers)
        return plan_with(p2=1.5, p6=1.2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("slidesparse.ops.capability", lambda: (8, 0))
    monkeypatch.setattr("slidesparse.gemm.tune.tune", tune)
    status, out, err = run("advise", "64x64", "--no-vllm", "--again")
    assert status == 0, err
    assert asked["ms"] == TOKENS and asked["again"] is asked["brief"] is True
    kinds = {(layer.n, layer.k, str(layer.pattern), layer.scheme.name) for layer in asked["layers"]}
    assert kinds == {(64, 64, pattern, scheme) for pattern in ("2:4", "6:8") for scheme in ("int8", "bf16")}, "fp8 needs 8.9"
    assert "measured here" in out and "Prune to 6:8 and serve in int8" in out


@pytest.mark.parametrize("how", ["time", "signal"])
def test_advice_that_is_stopped_tells_what_was_measured(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    plan_with(p2=1.5, p6=1.2).save(tmp_path / "plan-nvidia-h200.json")

    def tune(layers, progress, **options):
        progress(1, 20, "64×64 2:4 int8 M=1")
        assert how == "signal", "the time is up"
        raise KeyboardInterrupt

    monkeypatch.setenv("SLIDESPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: HERE.gpu)
    monkeypatch.setattr("slidesparse.ops.capability", lambda: (9, 0))
    monkeypatch.setattr("slidesparse.gemm.tune.tune", tune)
    status, out, err = run("advise", "64x64", "--no-vllm", *(["--minutes", "0"] if how == "time" else []))
    told = "stopped after 0 minutes: 1 of 20" if how == "time" else "interrupted: 1 of 20"
    assert status == (0 if how == "time" else 130) and f"{told} were measured" in err and f"Measuring {told}" in " ".join(out.split())
    assert "Prune to 6:8 and serve in int8" in out


def test_cards_of_the_option_have_plans() -> None:
    assert all(shipped_plan(name).cells for name in advising._PLANS.values()) and set(advising._PLANS) == set(advising.Card)


def test_the_summary_of_the_study_is_that_of_its_results() -> None:
    table = ROOT / "benchmarks" / "results" / "accuracy" / "results.csv"
    assert (ROOT / "src" / "slidesparse" / "bench" / accuracy.FILE).read_text(encoding="utf-8") == accuracy.written(table), "make tables"
