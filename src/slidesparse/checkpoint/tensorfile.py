"""Row-wise reading and writing of safetensors files.

The safetensors library maps whole files to read and takes whole tensors to write; converting a model larger than memory needs
neither, so this module reads and writes byte ranges of the same files (header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its dtype as safetensors names it, shape, and where its bytes lie."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            CheckpointError: a dtype this library does not compute with.
        """
        if self.dtype_name not in DTYPES:
            raise CheckpointError(f"{self.path}: tensor {self.name} has dtype {self.dtype_name}, which is not supported here")
        return DTYPES[self.dtype_name]


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in file order) and metadata of a safetensors file, with every offset checked against the file's size.

    Raises:
        CheckpointError: not a safetensors file, truncated, or offsets that contradict the shapes.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is truncated or not a safetensors file ({size} bytes): fetch it again")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(text)
        metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
        tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header ({error}): fetch it again") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    end = 8 + length
    for info in ordered.values():
        if info.start != end:
            raise CheckpointError(f"{path}: damaged safetensors header, tensor {info.name} starts at {info.start} instead of {end}")
        end += info.nbytes
    if end != size:
        missing = end - size
        how = f"truncated, {missing} bytes are missing" if missing > 0 else f"damaged, {-missing} bytes too long"
        raise CheckpointError(f"{path} is {how}: fetch it again")
    return ordered, metadata


def _tensor_info(path: Path, name: str, entry: dict[str, Any], base: int) -> TensorInfo:
    begin, end = (int(i) for i in entry["data_offsets"])
    shape = tuple(int(i) for i in entry["shape"])
    dtype = str(entry["dtype"])
    if begin < 0 or end < begin or any(i < 0 for i in shape):
        raise ValueError(f"tensor {name} has impossible offsets or shape")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"tensor {name}: {dtype} {list(shape)} does not take {end - begin} bytes")
    return TensorInfo(name, dtype, shape, path, base + begin, end - begin)


class TensorReader:
    """Reads byte ranges and rows of tensors; keeps files open until closed."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read_bytes(self, info: TensorInfo, offset: int, count: int) -> Tensor:
        """``count`` bytes of a tensor as uint8.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        buffer = np.empty(count, dtype=np.uint8)
        done = 0
        try:
            if info.path not in self._files:
                self._files[info.path] = os.open(info.path, os.O_RDONLY)
            while done < count:
                got = os.preadv(self._files[info.path], [memoryview(buffer)[done:]], info.start + offset + done)  # type: ignore[arg-type]  # numpy tells from Python 3.12 on
                if got == 0:
                    raise CheckpointError(f"{info.path} ends inside tensor {info.name}: it changed while being read")
                done += got
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {info.name} from {info.path}: {error.strerror}") from error
        return torch.from_numpy(buffer)

    def read_rows(self, info: TensorInfo, first: int, last: int) -> Tensor:
        """Rows ``first … last - 1`` of a tensor of one or more dimensions."""
        if info.nbytes == 0:
            return torch.empty(last - first, *info.shape[1:], dtype=info.dtype)
        row = info.nbytes // info.shape[0]
        data = self.read_bytes(info, first * row, (last - first) * row)
        return data.view(info.dtype).view(last - first, *info.shape[1:])

    def read(self, info: TensorInfo) -> Tensor:
        """A whole (small) tensor."""
        return self.read_bytes(info, 0, info.nbytes).view(info.dtype).view(info.shape)


class TensorWriter:
    """Writes one safetensors file piece by piece; it takes its name only once every byte of every tensor is there."""

    def __init__(self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str] | None = None) -> None:
        """``tensors`` maps names to (safetensors dtype, shape, bytes); the disk space is claimed at once."""
        self.path = path
        self._part = path.with_name(path.name + ".part")
        # Wide types first keeps every tensor aligned to its element.
        order = sorted(tensors.items(), key=lambda item: (-_itemsize(item[1][0]), item[0]))
        header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
        end = 0
        for name, (dtype, shape, nbytes) in order:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self._start = {name: base + header[name]["data_offsets"][0] for name in tensors}
        self._missing = {name: nbytes for name, (_, _, nbytes) in tensors.items()}
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.posix_fallocate(self._file, 0, base + end)
            os.pwrite(self._file, len(text).to_bytes(8, "little") + text, 0)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._discard()
            return
        incomplete = [name for name, count in self._missing.items() if count]
        if incomplete:
            self._discard()
            raise CheckpointError(f"{self.path}: tensor {incomplete[0]} was not written completely")
        os.fsync(self._file)
        os.close(self._file)
        os.replace(self._part, self.path)

    def write(self, name: str, offset: int, data: Tensor) -> int:
        """Write a piece of a tensor ``offset`` bytes into it; returns the bytes written."""
        view = memoryview(data.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # as above
        done = 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], self._start[name] + offset + done)
        self._missing[name] -= done
        return done

    def _discard(self) -> None:
        os.close(self._file)
        self._part.unlink(missing_ok=True)


def _itemsize(dtype_name: str) -> int:
    return DTYPES[dtype_name].itemsize if dtype_name in DTYPES else 1
