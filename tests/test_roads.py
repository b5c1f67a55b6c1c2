"""How long the roads are: the packages whose code runs for one thing, counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import models
import slidesparse

HOME = Path(slidesparse.__file__).parent


def files_run(call: Callable[[], Any]) -> set[Path]:
    """The files of the library, seen from its folder, of which a call runs code."""
    names: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            names.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return {Path(name).relative_to(HOME) for name in names if HOME in Path(name).parents}


def package_of(file: Path) -> str:
    """The folder below the library's, one for all modules that stand in none."""
    return file.parts[0] if len(file.parts) > 1 else "slidesparse"


def test_a_layers_conversion_runs_five_packages(tmp_path: Path):
    source = models.write(tmp_path / "dense", {"model.layers.0.mlp.up_proj.weight": torch.randn(64, 64).bfloat16()})
    recipe = slidesparse.Recipe(slidesparse.Pattern(6, 8), "magnitude", "int8")
    slidesparse.convert(source, tmp_path / "warm", recipe)  # imports what is imported late
    files = files_run(lambda: slidesparse.convert(source, tmp_path / "out", recipe))
    packages = {package_of(file) for file in files}
    assert {"checkpoint", "prune", "pack"} < packages, "the conversion itself was counted"
    assert len(packages) <= 5, packages
    assert Path("reference.py") not in files, "the oracle judges conversions, so it takes no part in them"
