"""Models that bring Python files of their own: not run unasked, run with --trust-remote-code, and never in the way of --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from slidesparse import load
from slidesparse.errors import CheckpointError

CODE = """
print("a library prints when it is imported")
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        print("and when a model is made")
        super().__init__(config)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A Llama of a class of its own, whose embeddings have a name that tells nothing."""
    source = tiny.build(tmp_path / "own")
    tiny.add_tokenizer(source)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "own.py").write_text(CODE)
    return source


def run(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", "from slidesparse.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_code_is_run_when_it_is_trusted_only(own: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Python files of its own \(own\.OwnConfig, own\.OwnForCausalLM\).* --trust-remote-code"):
        load(own, device="cpu")
    cache = tmp_path / "modules"
    command = ("generate", own, "w3 w17", "--max-new-tokens", "2", "--json")
    refused = run(*command, cache=cache)
    assert refused.returncode == 1 and refused.stdout == "" and len(refused.stderr.strip().splitlines()) == 1
    assert "--trust-remote-code" in refused.stderr and not cache.exists()
    told = run(*command, "--trust-remote-code", cache=cache)
    assert json.loads(told.stdout)["prompt"] == "w3 w17" and "and when a model is made" in told.stderr


def test_a_report_is_json_alone(own: Path, tmp_path: Path) -> None:
    cache, ids = tmp_path / "modules", tiny.token_ids(tmp_path / "ids.npy")
    calibrated = ("--method", "wanda", "--calibration", ids, "--length", "24")
    made = run("convert", own, tmp_path / "packed", *calibrated, "--trust-remote-code", "--json", cache=cache)
    assert made.returncode == 0, made.stderr
    assert len(json.loads(made.stdout)["layers"]) == 14 and "when a model is made" in made.stderr
    checked = run("verify", tmp_path / "packed", "--trust-remote-code", "--json", cache=cache)
    assert json.loads(checked.stdout)["ok"]
    assert (tmp_path / "packed" / "own.py").read_text() == CODE
    answer = run("generate", tmp_path / "packed", "w3 w17", "-n", "2", "--trust-remote-code", "--json", cache=cache)
    assert json.loads(answer.stdout)["text"] is not None
