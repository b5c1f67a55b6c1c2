"""The output directory as a transaction: built beside its final name, resumed when interrupted, renamed when whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import CheckpointError, OutputExistsError

SUFFIX = ".incomplete"
_JOB = "slidesparse-job.json"
_FINISHED = "*.safetensors"


class Staging:
    """Builds ``out`` in ``out.incomplete``; it has no config.json until the last moment, so that nothing takes it for a model.

    A second run of the same job finds the shards already finished there; another job's remains are refused unless ``overwrite``, and
    a directory that no run of this library made is never touched. A run that fails before any shard is finished leaves nothing.
    """

    def __init__(self, out: Path, source: Path, job: dict[str, Any], overwrite: bool) -> None:
        self.out, self.source, self.overwrite = Path(os.path.abspath(out)), source.resolve(), overwrite
        if not self.out.name:
            raise OutputExistsError(f"{out} cannot be an output: name a directory to create")
        self.path = self.out.with_name(self.out.name + SUFFIX)
        self._fingerprint = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        self._lock = -1
        self._replaces = False

    def __enter__(self) -> Staging:
        self._check_places()
        refuse_existing(self.out, self.overwrite)
        self._replaces = self.out.exists()
        if self.path.exists() and not (self.path / _JOB).is_file():
            raise OutputExistsError(f"{self.path} is in the way and no run of slidesparse made it: move it, or choose another output")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / _JOB, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take_lock()
            self._claim()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is not None and self.path.exists() and not any(self.path.glob(_FINISHED)):
                self._clear()
                with contextlib.suppress(OSError):
                    (self.path / _JOB).unlink()
                    self.path.rmdir()
        finally:
            os.close(self._lock)

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are there."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())

    def commit(self, config: dict[str, Any]) -> None:
        """Write config.json last and give the directory its name; what stood there before goes only after that.

        Raises:
            OutputExistsError: something appeared at the output during the run; the finished work is kept and can be resumed.
            OSError: the disk is full, or a rename failed; everything is as it was before.
        """
        if not self._replaces and os.path.lexists(self.out):
            raise OutputExistsError(f"{self.out} appeared while this run was writing: move it and run the same command again")
        refuse_existing(self.out, self.overwrite)
        aside = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent)) if self._replaces else None
        try:
            write_json(self.path / "config.json", config)  # before anything moves: this may find the disk full
            if aside is not None:
                os.rename(self.out, aside / "old")
            os.rename(self.path, self.out)
        except BaseException:
            if aside is not None and not self.out.exists():
                os.rename(aside / "old", self.out)
            (self.path / "config.json").unlink(missing_ok=True)
            raise
        finally:
            if aside is not None and self.out.exists():
                shutil.rmtree(aside, ignore_errors=True)
        (self.out / _JOB).unlink()

    def _check_places(self) -> None:
        if self.out.is_symlink():
            raise OutputExistsError(f"{self.out} is a symbolic link: name the directory itself")
        for place in (self.out.resolve(), self.path.resolve()):
            if place == self.source or self.source in place.parents or place in self.source.parents:
                raise OutputExistsError(f"output {place} and model {self.source} overlap: choose another output")

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another run is writing {self.path}: wait for it, or choose another output") from error
        except OSError:
            return  # a file system without locks
        try:
            same = os.path.samestat(os.fstat(self._lock), os.stat(self.path / _JOB))
        except FileNotFoundError:
            same = False
        if not same:
            raise CheckpointError(f"another run has just finished {self.out}")

    def _claim(self) -> None:
        found = os.pread(self._lock, 1 << 16, 0).decode(errors="replace")
        if any(self.path.glob(_FINISHED)) and found != self._fingerprint and not self.overwrite:
            raise OutputExistsError(
                f"{self.path} holds the remains of a different run: remove it, choose another output or give --overwrite"
            )
        if found != self._fingerprint:
            self._clear()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, self._fingerprint.encode(), 0)

    def _clear(self) -> None:
        """Remove what a run left: files, and folders that are half-written or copied from the source."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                if not entry.name.endswith(".part") and not (self.source / entry.name).is_dir():
                    raise OutputExistsError(f"{self.path} holds a folder that slidesparse did not write ({entry.name}): move it")
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != _JOB:
                entry.unlink()


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Whatever stands at ``out`` is kept unless it is a checkpoint that may be overwritten.

    Raises:
        OutputExistsError: says which.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").exists()):
        raise OutputExistsError(f"{out} exists and is not a checkpoint (no config.json), so it is not overwritten: choose another output")
    if not overwrite:
        raise OutputExistsError(f"{out} exists already: choose another output or give --overwrite")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON as `write_text` writes a text."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text so that the file is either absent, the old one or the whole new one.

    Raises:
        OSError: it cannot be written; names the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write that fails does not say where
        raise
