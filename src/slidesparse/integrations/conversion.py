"""The conversion with everything that pruning may need: calibrated methods run the model through transformers."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path

from .. import checkpoint
from ..checkpoint import Calibration, ConversionReport, Recipe
from ..checkpoint.convert import Progress
from ..checkpoint.recipe import AUTO
from ..errors import UnsupportedError

_LOG = getLogger(__name__)


def convert(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> ConversionReport:
    """`slidesparse.checkpoint.convert`, for every pruning method; without transformers ``auto`` means ``magnitude``, which is logged.

    Raises:
        UnsupportedError: a calibrated method without transformers, or a model that it cannot follow; see also the function named above.
    """
    if recipe.calibrated and find_spec("transformers") is None:
        if recipe.method != AUTO:
            raise UnsupportedError(f"{recipe.method} runs the model through transformers: pip install 'slidesparse[hf]'")
        _LOG.warning("transformers is not installed, so pruning goes by magnitude: pip install 'slidesparse[hf]' for calibrated methods")
        recipe = replace(recipe, method="magnitude", calibration=Calibration(), reconstruction_steps=None)
    solver = None
    if recipe.calibrated:
        from .pruning import solve

        solver = solve
    return checkpoint.convert(source, out, recipe, overwrite=overwrite, device=device, progress=progress, solver=solver)


def hide_progress_bars() -> None:
    """Switch transformers' own progress bars off where it is there, for programs that show theirs."""
    if find_spec("transformers") is not None:
        from .transformers import hide_progress_bars as hide

        hide()
