"""The norms of the layers' inputs, which calibrated pruning leaves beside the weights: enough for Wanda, whatever the pattern."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError

NORMS = "calibration_norms.npz"
"""The output's side file: an archive of numpy arrays, which nothing takes for weights."""


def write_norms(path: Path, norms: Mapping[str, Tensor]) -> None:
    """Write the norms float32 ``[K]`` of every layer's inputs, by the layer's name in the checkpoint; whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        arrays: dict[str, Any] = {layer: values.numpy() for layer, values in norms.items()}
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_norms(path: str | Path) -> dict[str, Tensor]:
    """What `write_norms` wrote.

    Raises:
        CheckpointError: the file cannot be read, or holds something else than float32 ``[K]`` of finite values from 0 on.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {layer: np.asarray(archive[layer]) for layer in archive.files}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} holds no norms of layers' inputs: name the {NORMS} of a calibrated pruning") from error
    for layer, values in found.items():
        if values.dtype != np.float32 or values.ndim != 1:
            raise CheckpointError(f"{path}: {layer}: norms must be float32 [K], found {values.dtype} {list(values.shape)}")
        if not np.isfinite(values).all() or (values < 0).any():
            raise CheckpointError(f"{path}: {layer}: norms hold NaN, Inf or values below 0")
    return {layer: torch.from_numpy(values) for layer, values in found.items()}
