"""Conversion and verification with what other libraries bring: calibrated pruning runs the model, readers say how they read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path

from .. import checkpoint
from ..checkpoint import Calibration, ConversionReport, Recipe, VerifyReport
from ..checkpoint.convert import Progress
from ..checkpoint.recipe import AUTO
from ..errors import UnsupportedError
from ..pattern import Pattern
from .calibration import TOKENIZER_FILES
from .hub import model_folder
from .reading import find_reader

_LOG = getLogger(__name__)


def convert(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> ConversionReport:
    """`slidesparse.checkpoint.convert`, for every pruning method; ``auto`` means ``magnitude`` where no text can be run, which is logged.

    ``source`` is a folder, or a model's name on the hub. ``trust_remote_code`` lets Python files of the model be run, to know its modules
    and to calibrate.

    Raises:
        UnsupportedError: a calibrated method without transformers, or a model that it cannot follow; see also the function named above.
    """
    source = model_folder(source)
    if recipe.calibrated and find_spec("transformers") is None and recipe.method != AUTO:
        raise UnsupportedError(f"{recipe.method} runs the model through transformers: pip install 'slidesparse[hf]'")
    if recipe.method == AUTO:
        recipe = _possible(recipe, source)
    solver = None
    if recipe.calibrated:
        from .pruning import solve

        solver = partial(solve, trust_remote_code=trust_remote_code)
    read = partial(find_reader, code=source if trust_remote_code else None)
    return checkpoint.convert(source, out, recipe, overwrite=overwrite, device=device, progress=progress, solver=solver, find_reader=read)


def _possible(recipe: Recipe, source: Path) -> Recipe:
    """What the automatic choice comes to for a model: calibrated pruning, where the model can be run on the text."""
    config = checkpoint.source.read_config(source)
    built_in = recipe.calibration.source is None
    if find_spec("transformers") is None:
        why = "transformers is not installed, so pruning goes by magnitude: pip install 'slidesparse[hf]' for calibrated methods"
    elif built_in and not any((source / name).is_file() for name in TOKENIZER_FILES):
        why = f"{source} has no tokenizer, so pruning goes by magnitude: give --calibration token ids (.npy), or copy the tokenizer there"
    else:
        places = [config, *(part for part in config.values() if isinstance(part, dict))]
        takes = [part["max_position_embeddings"] for part in places if type(part.get("max_position_embeddings")) is int]
        length = min([recipe.calibration.length, *(takes[:1] if built_in else ())])
        return replace(recipe, calibration=replace(recipe.calibration, length=length))
    _LOG.warning("%s", why)
    return replace(recipe, method="magnitude", calibration=Calibration(), reconstruction_steps=None)


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    pattern: Pattern | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """`slidesparse.checkpoint.verify`, which also reads the configuration as transformers and compressed-tensors do, where they are."""
    path, against = model_folder(path), None if against is None else model_folder(against)
    read = partial(find_reader, code=path if trust_remote_code else None)
    return checkpoint.verify(path, against, pattern=pattern, progress=progress, find_reader=read)


def hide_progress_bars() -> None:
    """Switch transformers' own progress bars off where it is there, for programs that show theirs."""
    if find_spec("transformers") is not None:
        from ..compat.transformers import logging

        logging.disable_progress_bar()
