"""Models whose class nobody knows, and files that are not of the class: what stays, and what is told."""

from __future__ import annotations

import pytest
import torch

import models
from slidesparse import Pattern, Recipe, convert, verify
from slidesparse.checkpoint import inspect
from slidesparse.errors import UnsupportedError

SIX = Pattern.parse("6:8")


def test_where_no_class_is_known_matrices_with_a_row_for_every_token_stay(tmp_path):
    own = {"model.embed_tokens": "model.emb", "model.norm": "model.last"}
    tensors = {
        name.replace(*next(((a, b) for a, b in own.items() if a in name), ("", ""))): t for name, t in models.llama_tensors().items()
    }
    tensors["output.weight"] = torch.randn(96, 64).bfloat16()
    config = models.LLAMA | {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    source = models.write(tmp_path / "own", tensors, config)
    report = convert(source, tmp_path / "out", Recipe(SIX, "magnitude", form="dense"))
    assert set(report.kept_dense) == {"model.emb", "output"} and len(report.layers) == len(inspect(source).layers) == 14
    models.write(tmp_path / "bare", models.read(tmp_path / "out"), config)
    assert verify(tmp_path / "bare", pattern=SIX).ok
    assert len(convert(source, tmp_path / "head", Recipe(SIX, "magnitude", only=("*", "output"))).layers) == 15


def test_layers_that_are_none_of_the_class_are_not_called_embeddings(tmp_path):
    config = models.LLAMA | {"tie_word_embeddings": False}
    tensors = {name.replace("_proj.", "_proj.base_layer."): t for name, t in models.llama_tensors().items()}
    source = models.write(tmp_path / "adapted", tensors | {"lm_head.weight": torch.randn(96, 64).bfloat16()}, config)
    told = r"no layer to convert: layer \S+\.base_layer is no linear layer of this class of model.*, such as lm_head$"
    with pytest.raises(UnsupportedError, match=told):
        convert(source, tmp_path / "out", Recipe(SIX, "magnitude"))
