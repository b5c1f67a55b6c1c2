"""The output directory as a transaction: built beside its final name, resumed when interrupted, renamed when whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import CheckpointError, OutputExistsError

SUFFIX = ".incomplete"
_JOB = "slidesparse-job.json"


class Staging:
    """Builds ``out`` in ``out.incomplete``; it has no config.json until the last moment, so that nothing takes it for a model.

    A second run of the same job finds the shards already finished there; another job's remains are refused unless ``overwrite``.
    """

    def __init__(self, out: Path, source: Path, job: dict[str, Any], overwrite: bool) -> None:
        self.out, self.source, self.overwrite = Path(os.path.abspath(out)), source.resolve(), overwrite
        self.path = self.out.with_name(self.out.name + SUFFIX)
        self._fingerprint = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        self._lock = -1

    def __enter__(self) -> Staging:
        self._check_output()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _JOB, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise CheckpointError(f"another run is writing {self.path}: wait for it, or choose another output") from error
        try:
            self._claim()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._lock)

    def finished(self, name: str, nbytes: int) -> bool:
        """Whether an earlier run of this job already wrote this shard."""
        file = self.path / name
        return file.exists() and file.stat().st_size >= nbytes

    def commit(self, config: dict[str, Any]) -> None:
        """Write config.json last and give the directory its name; what stood there before goes only now."""
        write_json(self.path / "config.json", config)
        (self.path / _JOB).unlink()
        old = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            os.rename(self.out, old)
        os.rename(self.path, self.out)
        shutil.rmtree(old, ignore_errors=True)

    def _check_output(self) -> None:
        out = self.out.resolve()
        if out == self.source or self.source in out.parents or out in self.source.parents:
            raise OutputExistsError(f"output {self.out} and model {self.source} overlap: choose another output")
        refuse_existing(self.out, self.overwrite)

    def _claim(self) -> None:
        found = os.pread(self._lock, 1 << 16, 0).decode(errors="replace")
        leftovers = [file for file in self.path.iterdir() if file.name != _JOB]
        if leftovers and found != self._fingerprint:
            if not self.overwrite:
                raise OutputExistsError(
                    f"{self.path} holds the remains of a different run: remove it, choose another output or give --overwrite"
                )
            for file in leftovers:
                if file.is_dir():
                    raise OutputExistsError(f"{self.path} holds a folder this library did not write ({file.name}): remove it")
                file.unlink()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, self._fingerprint.encode(), 0)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Whatever stands at ``out`` is kept unless it is a checkpoint that may be overwritten.

    Raises:
        OutputExistsError: says which.
    """
    if not out.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists already: choose another output or give --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").exists()):
        raise OutputExistsError(f"{out} is not a checkpoint (no config.json), so it is not overwritten: choose another output")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON so that the file is either absent, the old one or the whole new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
