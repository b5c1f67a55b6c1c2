"""Models of other classes than causal language models: opened by the class that config.json names, run or refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from architectures import ARCHITECTURES
from slidesparse import Recipe, convert, load
from slidesparse.errors import CheckpointError
from slidesparse.evaluate import check_predicts, complete
from slidesparse.nn import SlideSparseLinear


def packed(name: str, folder: Path) -> Path:
    ARCHITECTURES[name].build().save_pretrained(folder / "dense")
    convert(folder / "dense", folder / "packed", Recipe(tiny.SIX, "magnitude", "int8"))
    tiny.add_tokenizer(folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("name", ["llama", "llava", "gemma3", "paligemma", "qwen2-vl", "qwen2.5-vl", "t5", "rwkv", "llama4-text"])
def test_what_continues_text_does(name: str, tmp_path: Path) -> None:
    model, tokenizer = load(packed(name, tmp_path), device="cpu")
    assert type(model).__name__ == ARCHITECTURES[name].kind
    assert any(isinstance(module, SlideSparseLinear) for module in model.modules())
    assert isinstance(complete(model, tokenizer, "w3 w17 w42", max_new_tokens=3), str)
    if name == "t5":
        with pytest.raises(CheckpointError, match="T5ForConditionalGeneration reads text with an encoder"):
            check_predicts(model, text=True)
    else:
        check_predicts(model, text=True)


@pytest.mark.parametrize(
    ("name", "told"), [("bert", "continues no text"), ("bert-classifier", "continues no text"), ("whisper", "reads input_features")]
)
def test_what_does_not_is_refused(name: str, told: str, tmp_path: Path) -> None:
    model, tokenizer = load(packed(name, tmp_path), device="cpu")
    assert type(model).__name__ == ARCHITECTURES[name].kind
    for call in (lambda: complete(model, tokenizer, "w3 w17", max_new_tokens=3), lambda: check_predicts(model, text=True)):
        with pytest.raises(CheckpointError, match=f"{ARCHITECTURES[name].kind} {told}"):
            call()


@pytest.mark.parametrize("names", [["LLaMAForCausalLM"], [], ["MistralForCausalLM"]])
def test_names_that_mean_no_class_of_this_model(names: list[str], tmp_path: Path) -> None:
    """An old name, none, or one of another type: a causal language model of the type it is."""
    import json

    source = tiny.build(tmp_path / "dense")
    config = json.loads((source / "config.json").read_text()) | {"architectures": names}
    (source / "config.json").write_text(json.dumps(config))
    assert type(load(source, device="cpu", tokenizer=False)[0]).__name__ == "LlamaForCausalLM"
    convert(source, tmp_path / "packed", Recipe(tiny.SIX, "magnitude"))
    assert type(load(tmp_path / "packed", device="cpu", tokenizer=False)[0]).__name__ == "LlamaForCausalLM"
