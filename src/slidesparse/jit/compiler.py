"""One source with its constants to one cubin and what that needs of the GPU; many at once in threads."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from ..errors import CompileError
from .cache import cached
from .nvrtc import toolchain

_LOG = logging.getLogger(__name__)
_LAYOUT = 1
"""Raised whenever an entry of the cache, or what it is made from, changes its meaning."""
_CACHES = (12, 9)
"""The NVRTC from which on its option against its own cache is known."""
_ERROR = re.compile(r"\berror\b|\bfatal\b")


@dataclass(frozen=True)
class Resources:
    """What ptxas reports, over all functions of a source.

    Attributes:
        registers: per thread, of the function that takes most.
        local: bytes of local memory (stack frame) per thread, of the function that takes most.
        spills: bytes of all spill stores and loads.
    """

    registers: int
    local: int
    spills: int


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: its name, the architecture that alone runs it, the cubin, and its resources.

    These are None where ptxas reported none, as when NVRTC takes the result from a cache of its own.
    """

    name: str
    arch: str
    cubin: bytes
    resources: Resources | None


@dataclass(frozen=True)
class Job:
    """What one compilation takes: see ``compile``."""

    source: str
    name: str
    arch: str = "sm_90a"
    constants: Mapping[str, int | str] = field(default_factory=dict)


def compile(source: str, *, name: str, arch: str = "sm_90a", constants: Mapping[str, int | str] | None = None) -> Binary:
    """Compile CUDA C++17, or take it from the cache; the same input and NVRTC give the same bytes.

    Args:
        source: the whole text; ``#include`` finds nothing.
        name: the ``extern "C" __global__`` function to load.
        arch: a real architecture, such as ``sm_90a``.
        constants: macros, as by ``-DNAME=VALUE``.

    Raises:
        CompileError: the source does not compile (the message holds the first error), or has no kernel of that name.
        UnsupportedError: there is no NVRTC here.
    """
    return compile_all([Job(source, name, arch, constants or {})])[0]


def compile_all(jobs: Sequence[Job]) -> list[Binary]:
    """Compile many in threads, equal ones once: NVRTC works outside Python's lock. The order is that of ``jobs``; raises as ``compile``."""
    toolchain()  # Loaded before the threads start, or each would load it.
    keyed = [(_key(job), job) for job in jobs]
    wanted = dict(keyed)
    with ThreadPoolExecutor(max(1, min(len(wanted), os.cpu_count() or 1))) as pool:
        made = dict(zip(wanted, pool.map(_cached, wanted.items()), strict=True))
    return [made[key] for key, _ in keyed]


def _cached(item: tuple[str, Job]) -> Binary:
    key, job = item
    return _from_bytes(job, cached(key, lambda: _to_bytes(_build(job))))


def _key(job: Job) -> str:
    """Hash of everything that the cubin depends on."""
    flags = [flag.decode() for flag in _options(job).as_bytes("nvrtc", "cubin")]
    return hashlib.sha256(json.dumps([_LAYOUT, toolchain().identity, job.source, job.name, flags]).encode()).hexdigest()


def _options(job: Job) -> object:
    from cuda.core import ProgramOptions

    macros = [(name, str(int(value) if isinstance(value, bool) else value)) for name, value in sorted(job.constants.items())]
    # Files that an include could find would not be in the key.
    return ProgramOptions(
        name=f"{job.name}.cu",
        arch=job.arch,
        std="c++17",
        device_as_default_execution_space=True,  # or NVRTC 13.0 takes generic lambdas for host functions
        no_source_include=True,
        no_cache=toolchain().release >= _CACHES,  # a result from NVRTC's own cache has no report of resources
        ptxas_options="-v",
        define_macro=macros or None,
    )


def _build(job: Job) -> Binary:
    from cuda.core import Program

    log = io.StringIO()
    try:
        cubin = bytes(Program(job.source, "c++", _options(job)).compile("cubin", logs=log).code)
    except Exception as error:  # cuda-core does not export the class that it raises
        first = next((line.strip() for line in str(error).splitlines() if _ERROR.search(line)), None)
        if first:
            raise CompileError(f"kernel {job.name!r} does not compile for {job.arch}: {first}") from error
        raise
    _LOG.debug("%s for %s: %s", job.name, job.arch, log.getvalue())
    _check_name(job, cubin)
    return Binary(job.name, job.arch, cubin, _resources(log.getvalue()))


def _resources(log: str) -> Resources | None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not frames or not registers:
        return None
    spills = sum(int(stores) + int(loads) for _, stores, loads in frames)
    return Resources(max(map(int, registers)), max(int(frame) for frame, _, _ in frames), spills)


def _check_name(job: Job, cubin: bytes) -> None:
    kernels = sorted({name.decode() for name in re.findall(rb"\.text\.(\w+)\0", cubin)})
    if job.name not in kernels:
        raise CompileError(f'the source has no kernel {job.name!r}, but {", ".join(kernels) or "none"}: is it extern "C"?')


def _to_bytes(binary: Binary) -> bytes:
    return json.dumps(binary.resources and asdict(binary.resources)).encode() + b"\n" + binary.cubin


def _from_bytes(job: Job, data: bytes) -> Binary:
    head, _, cubin = data.partition(b"\n")
    resources = json.loads(head)
    return Binary(job.name, job.arch, cubin, resources and Resources(**resources))
