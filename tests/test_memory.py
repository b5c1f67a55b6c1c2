"""Conversion streams: peak memory stays under 3 × the largest tensor + 300 MB, whatever the model's size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models

_SCRIPT = """
import resource, sys
limit = int(sys.argv[3])
from slidesparse.checkpoint import Recipe, convert
from slidesparse.pattern import Pattern
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
convert(sys.argv[1], sys.argv[2], Recipe(Pattern.parse("6:8"), "magnitude", "int8"))
status = open("/proc/self/status").read()
print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="importing the CUDA build of torch alone takes the allowance")
def test_peak_memory_is_bounded(tmp_path: Path):
    tensors = {"model.embed_tokens.weight": torch.randn(8000, 1024).bfloat16()}
    tensors |= {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(8192, 1024).bfloat16() for i in range(28)}
    largest = max(tensor.nbytes for tensor in tensors.values())
    source = models.write(tmp_path / "dense", tensors)
    assert sum(tensor.nbytes for tensor in tensors.values()) > 3 * largest + 400_000_000
    del tensors
    limit = 3 * largest + 300_000_000
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(source), str(tmp_path / "out"), str(limit)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) * 1024 < limit
