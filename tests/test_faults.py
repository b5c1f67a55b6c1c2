"""What a library cannot load is told in a line; what this package does wrong in the meantime is not taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from slidesparse.checkpoint import Recipe, convert
from slidesparse.errors import CheckpointError, first_line
from slidesparse.evaluate import complete
from slidesparse.integrations import transformers as adapter
from slidesparse.pattern import Pattern

KINDS = [OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RuntimeError, AssertionError]


@pytest.fixture
def packed(tmp_path: Path, tiny_models: None) -> Path:
    convert(tiny.build(tmp_path / "dense", "llama"), tmp_path / "packed", Recipe(Pattern(6, 8), "magnitude", "int8"))
    return tmp_path / "packed"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_mistake_of_this_package_while_a_model_loads_is_raised_as_it_is(
    kind: type[Exception], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*arguments: object) -> None:
        raise kind("a mistake")

    monkeypatch.setattr(adapter, "check_layer", mistaken)
    with pytest.raises(kind, match="a mistake"):
        adapter.open_model(packed)


def test_an_error_is_told_by_its_first_line_or_by_its_kind() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"
    assert first_line(TypeError(" \n")) == "TypeError" and first_line(OSError("x" * 301)) == "x" * 300
    assert first_line(CheckpointError("x" * 301)) == "x" * 301, "ours are written to be read, and end with the way out"


def test_values_that_make_transformers_fail_are_a_checkpoints_fault(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    for changes in ({"num_attention_heads": "four"}, {"hidden_act": "nonesuch"}, {"vocab_size": -1}, {"rope_parameters": 3}):
        (packed / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        with pytest.raises(CheckpointError, match="transformers cannot load it"):
            adapter.open_model(packed)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_tokenizer_is_said_to_be(packed: Path, text: str) -> None:
    tiny.add_tokenizer(packed)
    (packed / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="transformers cannot load its tokenizer"):
        adapter.load(packed, device="cpu")


@pytest.mark.parametrize("template", ["{{ broken", "{{ raise_exception('no user may speak') }}"])
def test_a_chat_template_that_fails_is_said_to(packed: Path, template: str) -> None:
    tiny.add_tokenizer(packed)
    (packed / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"chat template fails: .*leave out --chat"):
        complete(*adapter.load(packed, device="cpu"), "w3", max_new_tokens=1, chat=True)
