"""The user's compiled kernels: cuda-core's folder of atomic files, with a checksum and a lock, so that one process compiles."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..env import cache_folder

if TYPE_CHECKING:
    from cuda.core.utils import FileStreamProgramCache

_LOG = logging.getLogger(__name__)
_LIMIT = 256 << 20
"""Bytes of the whole cache; what was not read for longest goes first."""
_PATIENCE = 120
"""Seconds to wait for another process that compiles the same; after that both do."""


def cached(key: str, build: Callable[[], bytes]) -> bytes:
    """The bytes that ``build`` returns, from the cache where they are there unharmed.

    Where the cache cannot be read or written the bytes are built, and one warning says so. ``key`` is a hash in hexadecimal digits.
    """
    try:
        folder = cache_folder() / "kernels"
        store = _store(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _warn("the user's cache folder", _reason(error))
        return build()
    found = _read(store, folder, key)
    if found is not None:
        return found
    from filelock import FileLock, Timeout

    # A fixed number of files for any number of kernels; two that share one merely wait for each other.
    lock = FileLock(folder / "locks" / f"{key[:2]}.lock", timeout=_PATIENCE)
    try:
        (folder / "locks").mkdir(exist_ok=True)
        lock.acquire()
    except Timeout:
        _LOG.warning("waited %d seconds for another process to compile a kernel; compiling it here", _PATIENCE)
    except (OSError, NotImplementedError) as error:
        _warn(folder, _reason(error))
    try:
        found = _read(store, folder, key)  # by the process that held the lock
        if found is None:
            found = build()
            _write(store, folder, key, found)
        return found
    finally:
        lock.release()


@cache
def _store(folder: Path) -> FileStreamProgramCache:
    from cuda.core.utils import FileStreamProgramCache

    return FileStreamProgramCache(folder, max_size_bytes=_LIMIT)


def _read(store: FileStreamProgramCache, folder: Path, key: str) -> bytes | None:
    try:
        entry = store.get(key)
    except OSError as error:
        _warn(folder, _reason(error))
        return None
    if entry is None or entry[:32] == _checksum(key, entry[32:]):
        return entry and entry[32:]
    _LOG.warning("a kernel cached in %s is damaged and compiled again", folder)
    return None


def _write(store: FileStreamProgramCache, folder: Path, key: str, data: bytes) -> None:
    try:
        store[key] = _checksum(key, data) + data
    except OSError as error:
        _warn(folder, _reason(error))


def _checksum(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + data).digest()


def _reason(error: Exception) -> str:
    # Without the file's name, which differs every time.
    return getattr(error, "strerror", None) or str(error)


@cache
def _warn(folder: Path | str, reason: str) -> None:
    """Say once in a process that kernels are compiled anew in every process."""
    _LOG.warning("compiled kernels cannot be kept in %s: %s; every process compiles them anew", folder, reason)
