"""How short the road of a conversion is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

import models
import slidesparse

SOURCE = Path(slidesparse.__file__).parent


def files_of(call: Callable[[], object]) -> list[str]:
    """The library's files whose code runs in a call."""
    seen: set[Path] = set()

    def look(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCE):
            seen.add(path.relative_to(SOURCE))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(map(str, seen))


def test_a_layers_conversion_runs_code_of_five_packages(tmp_path: Path) -> None:
    """A package is a folder below the library's; all modules that stand in none count as one."""
    source = models.write(tmp_path / "dense", {"model.layers.0.mlp.up_proj.weight": torch.randn(64, 64).bfloat16()})
    recipe = slidesparse.Recipe(slidesparse.Pattern(6, 8), "magnitude", "int8")
    slidesparse.convert(source, tmp_path / "warm", recipe)  # imports what is imported late
    found = files_of(lambda: slidesparse.convert(source, tmp_path / "out", recipe))
    packages = {file.partition("/")[0] if "/" in file else "slidesparse" for file in found}
    assert {"checkpoint", "prune", "pack"} < packages, "the conversion itself was counted"
    assert len(packages) <= 5, packages
    assert "reference.py" not in found, "the oracle judges conversions, so it takes no part in them"
