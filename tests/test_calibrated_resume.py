"""Calibrated pruning that was interrupted: the same output, bit by bit, and no block solved twice."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import models
import tiny
from slidesparse import Pattern, convert
from slidesparse.checkpoint import tensorfile
from slidesparse.errors import CheckpointError, OutputExistsError
from slidesparse.integrations.pruning import streaming

pytestmark = pytest.mark.usefixtures("tiny_models")

BLOCKS = 4
METHODS = {
    "wanda": ("wanda", None, "bf16"),
    "admm-int8": ("admm", None, "int8"),
    "auto": ("auto", 8, "bf16"),
    "auto-int8": ("auto", 8, "int8"),
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "dense", num_hidden_layers=BLOCKS)


@pytest.fixture
def ids(tmp_path: Path) -> str:
    return tiny.token_ids(tmp_path / "ids.npy", samples=20)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks that were solved, as they are."""
    numbers: list[int] = []
    solve_layers = streaming.solve_layers

    def count(tasks, *rest):
        numbers.append(int(tasks[0].name.split(".")[2]))
        return solve_layers(tasks, *rest)

    monkeypatch.setattr(streaming, "solve_layers", count)
    return numbers


class Stop:
    """A progress callback that raises at a block, the first being 1."""

    def __init__(self, block: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.block, self.error = block, error

    def __call__(self, done: int, total: int, what: str) -> None:
        assert 0 <= done <= max(total, 0)
        if what.startswith(f"block {self.block} of"):
            raise self.error


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def blocks_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("block-*.solved.safetensors"))


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_goes_on_behind_its_last_solved_block(tmp_path, dense, ids, solved, name):
    method, steps, scheme = METHODS[name]
    recipe = tiny.recipe(method, ids, scheme=scheme, form="packed", reconstruction_steps=steps)
    straight = convert(dense, tmp_path / "straight", recipe).pruning
    assert solved == list(range(BLOCKS))
    solved.clear()
    for block, error in ((2, KeyboardInterrupt), (4, SystemExit)):
        with pytest.raises(error):
            convert(dense, tmp_path / "out", recipe, progress=Stop(block, error))
        assert not (tmp_path / "out").exists()
        assert blocks_in(tmp_path / "out.incomplete") == [f"block-{index:05d}.solved.safetensors" for index in range(block - 1)]
    assert convert(dense, tmp_path / "out", recipe).pruning == straight
    # Progress is told before a block is solved: none was begun twice.
    assert solved == list(range(BLOCKS))
    assert not (tmp_path / "out.incomplete").exists() and not blocks_in(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_killed_process_leaves_whole_blocks_only(tmp_path, dense, ids):
    script = """
import os, signal, sys, torch
torch.set_num_threads(1)
from slidesparse import convert
import tiny
def kill(done, total, what):
    if what.startswith("block 3 of 4: model.layers.2.mlp"):
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], tiny.recipe("auto", sys.argv[3], reconstruction_steps=8), device="cpu", progress=kill)
"""
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script, str(dense), str(out), ids], capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(blocks_in(tmp_path / "out.incomplete")) == 2 and not out.exists()
    recipe = tiny.recipe("auto", ids, reconstruction_steps=8)
    convert(dense, out, recipe, device="cpu")
    convert(dense, tmp_path / "straight", recipe, device="cpu")
    assert files(out) == files(tmp_path / "straight")


def test_the_remains_of_another_job_are_refused(tmp_path, dense, ids, solved):
    base = {"method": "admm", "source": ids, "samples": 10, "seed": 3}
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out", tiny.recipe(**base), progress=Stop(3))
    others = tiny.token_ids(tmp_path / "others.npy", samples=20)
    changes = [
        {"method": "sparsegpt"},
        {"method": "auto"},
        {"source": others},
        {"samples": 11},
        {"length": 23},
        {"seed": 4},
        {"pattern": Pattern.parse("4:6")},
        {"overrides": {"*.down_proj": Pattern.parse("8:10")}},
        {"scheme": "int8"},
        {"reconstruction_steps": 5},
    ]
    before = files(tmp_path / "out.incomplete")
    for change in changes:
        with pytest.raises(OutputExistsError, match=r"out\.incomplete holds the remains of a different run: remove it, .*--overwrite"):
            convert(dense, tmp_path / "out", tiny.recipe(**base | change))
    # The very same ids, in the same file: what it holds counts, not when it was written.
    shutil.copy(ids, tmp_path / "copy.npy")
    shutil.copy(tmp_path / "copy.npy", ids)
    assert files(tmp_path / "out.incomplete") == before and solved == [0, 1]
    convert(dense, tmp_path / "out", tiny.recipe(**base))
    assert solved == [0, 1, 2, 3]


def test_blocks_that_were_trained_to_something_else_are_refused(tmp_path, dense, ids, monkeypatch):
    recipe = tiny.recipe("auto", ids, reconstruction_steps=2)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out", recipe, progress=Stop(3))
    monkeypatch.setattr(sys.modules["slidesparse.checkpoint.convert"], "RECONSTRUCTION", -1)
    with pytest.raises(OutputExistsError, match="remains of a different run"):
        convert(dense, tmp_path / "out", recipe)


def test_overwrite_drops_the_remains_of_another_job(tmp_path, dense, ids):
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out", tiny.recipe("admm", ids), progress=Stop(3))
    convert(dense, tmp_path / "out", tiny.recipe("wanda", ids), overwrite=True)
    convert(dense, tmp_path / "straight", tiny.recipe("wanda", ids))
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_run_without_a_solved_block_leaves_nothing(tmp_path, dense, ids):
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out", tiny.recipe("admm", ids), progress=Stop(1))
    assert {file.name for file in tmp_path.iterdir()} == {"dense", "ids.npy"}


def test_once_all_blocks_are_solved_the_model_is_not_run_again(tmp_path, dense, ids, solved, monkeypatch):
    """An output that appears at the last moment stops a run whose blocks are removed already."""
    recipe = tiny.recipe("sparsegpt", ids, scheme="int8", form="packed")

    def appear(done: int, total: int, what: str) -> None:
        if what.startswith("block"):
            (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(OutputExistsError, match="appeared"):
        convert(dense, tmp_path / "out", recipe, progress=appear)
    assert not blocks_in(tmp_path / "out.incomplete")
    (tmp_path / "out").rmdir()
    monkeypatch.setattr(streaming, "open_model", None)  # not to be called
    report = convert(dense, tmp_path / "out", recipe)
    assert solved == list(range(BLOCKS)) and report.resumed_shards == 1
    monkeypatch.undo()
    assert convert(dense, tmp_path / "straight", recipe).pruning == report.pruning
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_full_disk_is_one_line_and_keeps_the_solved_blocks(tmp_path, dense, ids, solved, monkeypatch):
    recipe, claim = tiny.recipe("admm", ids), os.posix_fallocate

    def full(file: int, *rest: int) -> None:
        if "block-00002" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        claim(file, *rest)

    monkeypatch.setattr(tensorfile.os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"^the disk of .*out\.incomplete is full: free space and run .* to resume$"):
        convert(dense, tmp_path / "out", recipe)
    assert len(blocks_in(tmp_path / "out.incomplete")) == 2 and not list((tmp_path / "out.incomplete").glob("*.part"))
    monkeypatch.setattr(tensorfile.os, "posix_fallocate", claim)
    convert(dense, tmp_path / "out", recipe)
    assert solved == [0, 1, 2, 2, 3]  # the third was solved, but could not be written


def test_room_is_asked_for_what_is_still_to_be_written(tmp_path, dense, ids, monkeypatch):
    recipe = tiny.recipe("wanda", ids, scheme="int8", form="packed")
    convert(dense, tmp_path / "straight", recipe)
    output = sum(tensor.nbytes for tensor in models.read(tmp_path / "straight").values())
    layers = [tensor for name, tensor in models.read(dense).items() if "proj" in name]
    needed = output + sum(tensor.numel() + 4 * len(tensor) for tensor in layers)

    def with_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, free))

    with_free(needed - 200)  # a few bytes of the job are there already
    with pytest.raises(CheckpointError, match="GB free"):
        convert(dense, tmp_path / "out", recipe)
    with_free(needed)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out", recipe, progress=Stop(BLOCKS))
    there = sum(file.stat().st_size for file in (tmp_path / "out.incomplete").iterdir())
    with_free(max(needed - there, output))
    assert there > 3 * sum(tensor.numel() for tensor in layers) / BLOCKS
    convert(dense, tmp_path / "out", recipe)
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_report_of_an_earlier_pruning_does_not_take_this_ones_place(tmp_path, dense, ids):
    convert(dense, tmp_path / "first", tiny.recipe("wanda", ids))
    report = convert(tmp_path / "first", tmp_path / "second", tiny.recipe("admm", ids))
    assert report.pruning.method == "admm"
    assert '"admm"' in (tmp_path / "second/pruning_report.json").read_text()
