"""A model's name on the Hugging Face hub in the place of a folder: ``org/name``, or ``org/name@revision``."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, first_line
from .calibration import TOKENIZER_FILES

_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
_ADDRESS = re.compile(r"(?:https?|hf):/+(?:[\w-]+(?:\.[\w-]+)+/)?([\w-][\w.-]*/[\w-][\w.-]*).*")
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
_OTHER_FORMS = ("consolidated*", "original/*", "onnx/*")
"""The same weights once more."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""What a disk answers that takes no files."""


def model_folder(model: str | Path) -> Path:
    """The folder of a model: the one of that name, or where the hub's model of that name lies in the user's cache, fetched if need be.

    A whole model in the cache is taken as it is, without asking the hub whether there is a newer one. A name under a folder that is there
    means a path.

    Raises:
        CheckpointError: neither; one line says what the hub answered, or that it or the cache could not be reached.
    """
    path, asked = Path(model), _NAME.fullmatch(str(model))
    if (address := _ADDRESS.fullmatch(str(model))) is not None:
        raise CheckpointError(f"{model} is an address: give the model's name on the hub, {address[1]}")
    if path.exists() or asked is None or path.parent.is_dir():
        return path
    name, revision = asked.groups()
    found = _cached(name, revision)
    if found is not None and any((found / file).is_file() for file in TOKENIZER_FILES):
        return found
    try:
        return _snapshot(name, revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if found is not None:
            return found
        raise CheckpointError(f"{model} is no folder here, and {_reason(error, name, revision)}") from error


def config_file(model: str) -> Path:
    """config.json of the hub's model of that name, fetched alone.

    Raises:
        CheckpointError: it is no such name; one line says what the hub answered, or that it or the cache could not be reached.
    """
    asked = _NAME.fullmatch(model)
    if asked is None:
        raise CheckpointError(f"{model} is no folder, no config.json, no shape NxK and no name on the hub (org/name)")
    name, revision = asked.groups()
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(f"{model} is no folder here, and {_reason(error, name, revision)}") from error


def _cached(name: str, revision: str | None) -> Path | None:
    try:
        folder = _snapshot(name, revision, local_files_only=True)
        Checkpoint.open(folder)
    except (LocalEntryNotFoundError, OSError, CheckpointError):
        return None  # not there, or not whole
    return folder


def _snapshot(name: str, revision: str | None, **options: bool) -> Path:
    chosen: dict[str, Any] = {"allow_patterns": list(_FILES), "ignore_patterns": list(_OTHER_FORMS), **options}
    return Path(snapshot_download(name, revision=revision, **chosen))


def _reason(error: Exception, name: str, revision: str | None) -> str:
    """What went wrong, and the way out."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror}): make room there, or set HF_HOME to another folder"
    return f"{_answer(error, name, revision)}: give a folder or another name"


def _answer(error: Exception, name: str, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return f"the hub gives {name} only to those who have accepted its terms and are logged in (hf auth login)"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub's {name} has no revision {revision or 'main'}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub knows no model {name} (or it is private: hf auth login)"
    return f"the hub cannot be reached to download it ({first_line(error)})"
