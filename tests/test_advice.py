"""Advice can be taken, what is asked for is heeded, and no output encoding or pipe fails a command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import models
import tiny
from slidesparse import convert as convert_by_method
from slidesparse import packing
from slidesparse.checkpoint import Recipe, convert, inspect, verify
from slidesparse.errors import CheckpointError, UnsupportedError
from slidesparse.pattern import Pattern

SIX, TWO = Pattern.parse("6:8"), Pattern.parse("2:4")


def run(*arguments: object, encoding: str = "utf-8", pipe: str = "") -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    paths = os.pathsep.join(sys.path)
    command = f"from slidesparse.cli import main; import sys; sys.argv = {['slidesparse', *map(str, arguments)]!r}; main()"
    shell = f'"{sys.executable}" -c "$COMMAND" {pipe}'
    env = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": encoding, "COMMAND": command}
    return subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, errors="replace", env=env, check=False)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_output_that_cannot_show_an_arrow_is_no_failure(tmp_path, encoding):
    source = models.write(tmp_path / "dense")
    done = run("convert", source, tmp_path / "out", "--method", "magnitude", encoding=encoding)
    assert done.returncode == 0 and "14 layers" in done.stdout, done.stderr
    done = run("inspect", tmp_path / "out", encoding=encoding)
    assert done.returncode == 0 and "mlp.up_proj" in done.stdout, done.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path):
    done = run("inspect", models.write(tmp_path / "dense", models.llama_tensors(layers=40)), "--layers", pipe="| true")
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_streams_that_are_closed_are_no_traceback(tmp_path):
    source = models.write(tmp_path / "dense")
    for pipe in (">&-", ">&- 2>&-"):
        assert run("inspect", source, pipe=pipe).stderr == ""
        done = run("convert", source, tmp_path / "out", "--method", "magnitude", "--overwrite", "--json", pipe=pipe)
        # A slow machine is told how far the conversion is.
        told = [line for line in done.stderr.splitlines() if not re.match(r"converting .* of .*, \d+ s: ", line)]
        assert (done.returncode, told) == (0, []) and (tmp_path / "out/config.json").is_file()


@pytest.mark.parametrize(
    ("asked", "advised"),
    [("3:4", "6:8"), ("1:4", "2:4"), ("2:8", "2:4"), ("4:8", "6:8"), ("7:8", "14:16"), ("5:10", "8:10"), ("63:64", None)],
)
def test_the_nearest_pattern_holds_the_weights(asked, advised):
    with pytest.raises(ValueError) as caught:
        Pattern.parse(asked)
    found = re.search(r"obey (\d+:\d+)", str(caught.value))
    assert (found and found[1]) == advised
    if advised:
        kept, group = map(int, asked.split(":"))
        pattern = Pattern.parse(advised)
        rows = torch.stack([torch.randperm(group) < kept for _ in range(40 * 80)]).view(40, -1).float()
        assert packing.find_violation(rows[:, : rows.shape[1] // pattern.group * pattern.group], pattern) is None


@pytest.mark.parametrize(
    ("asked", "why", "advice"),
    [
        ("6:9", "when it drops 2 of its positions, this one drops 3", "4:6, 6:8, 8:10 (weights that are 6:9 obey 16:18)"),
        ("7:9", "group must be 4 plus a multiple of the stride 2, got 9", "6:8, 8:10, 10:12 (weights that are 7:9 obey 16:18)"),
        ("3:8@4:8", "when it drops 4 of its positions, this one drops 5", "4:8, 8:12, 12:16 (weights that are 3:8 obey 4:8)"),
    ],
)
def test_supported_neighbours_of_a_pattern_are_named(asked, why, advice):
    with pytest.raises(ValueError) as caught:
        Pattern.parse(asked)
    assert str(caught.value).endswith(f"{why}; supported ones that keep about as much: {advice}")


def test_verify_heeds_the_pattern_asked_for(tmp_path):
    source = models.write(tmp_path / "dense")
    for form in ("packed", "dense"):
        out = tmp_path / f"as-{form}"
        convert(source, out, Recipe(SIX, "magnitude", "int8", form))
        assert verify(out, pattern=SIX).ok and not verify(out, pattern=Pattern.parse("4:6")).ok
        report = verify(out, pattern=TWO)
        assert not report.ok and all("row 0, group" in layer.reason for layer in report.layers)
    convert(source, tmp_path / "tight", Recipe(TWO, "magnitude"))
    assert verify(tmp_path / "tight", pattern=SIX).ok, "two of four are six of eight"
    convert(
        models.write(tmp_path / "pairs", models.llama_tensors(inner=112)),
        tmp_path / "4",
        Recipe(Pattern.parse("6:8x2"), "magnitude", "nvfp4"),
    )
    with pytest.raises(UnsupportedError, match="use 6:8x2"):
        verify(tmp_path / "4", pattern=SIX)


def test_nothing_to_convert_says_why(tmp_path):
    heads = {name: torch.randn(8, 64).bfloat16() for name in ("lm_head.weight", "model.embed_tokens.weight")}
    source = models.write(tmp_path / "heads", heads)
    with pytest.raises(UnsupportedError, match=r"embeddings, norms, heads, experts.*name a layer in --only") as caught:
        convert(source, tmp_path / "out", Recipe(SIX, "magnitude"))
    assert "--ignore" not in str(caught.value)
    with pytest.raises(UnsupportedError, match=r"--ignore leave none of 2"):
        convert(source, tmp_path / "out", Recipe(SIX, "magnitude", ignore=("lm_head",)))
    with pytest.raises(UnsupportedError, match=r"no linear weights that can be read"):
        convert(models.write(tmp_path / "none", {"a.bias": torch.zeros(3)}), tmp_path / "out", Recipe(SIX, "magnitude"))


def test_the_kind_of_a_checkpoint_is_named(tmp_path):
    source = models.write(tmp_path / "dense")
    assert inspect(source, scan=False).kind == "dense"
    convert(source, tmp_path / "w8a8", Recipe(scheme="int8", form="dense", obey=False))
    assert inspect(tmp_path / "w8a8", scan=False).kind == "quantised"
    with pytest.raises(CheckpointError, match="claims no pattern") as caught:
        verify(tmp_path / "w8a8")
    assert "dense" not in str(caught.value).removeprefix(str(tmp_path))


# ---------------------------------------------------------------------------------------------- the automatic choice


@pytest.fixture
def model(tmp_path, tiny_models):
    return tiny.build(tmp_path / "dense")


def test_without_a_tokenizer_auto_prunes_by_magnitude_and_says_so(tmp_path, model, caplog):
    convert_by_method(model, tmp_path / "auto", Recipe(SIX, "auto"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "has no tokenizer, so pruning goes by magnitude: give --calibration" in caplog.text
    convert(model, tmp_path / "magnitude", Recipe(SIX, "magnitude"))
    auto, magnitude = models.read(tmp_path / "auto"), models.read(tmp_path / "magnitude")
    assert auto.keys() == magnitude.keys() and all(torch.equal(auto[name], magnitude[name]) for name in auto)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        convert_by_method(model, tmp_path / "no", Recipe(SIX, "admm"))


def test_the_built_in_text_is_cut_to_what_the_model_takes(tmp_path, model):
    tiny.add_tokenizer(model)
    done = run("prune", model, tmp_path / "out", "--samples", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert "of 64 tokens" in json.loads(done.stdout)["pruning"]["calibration"]
