"""Every environment variable the library reads; no other module touches ``os.environ``, and nobody writes it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def debug() -> bool:
    """``SLIDESPARSE_DEBUG=1``: the command line shows tracebacks instead of one-line errors."""
    return os.environ.get("SLIDESPARSE_DEBUG", "") not in ("", "0")


def cache_folder() -> Path:
    """Where measured plans and compiled kernels are kept: ``SLIDESPARSE_CACHE``, or ``slidesparse`` in the user's cache folder."""
    chosen = os.environ.get("SLIDESPARSE_CACHE", "")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slidesparse"


def for_child(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is started, these variables added; this process keeps its own."""
    return {**os.environ, **more}
