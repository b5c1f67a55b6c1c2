"""Every environment variable the library reads; no other module touches ``os.environ``, and nobody writes it."""

from __future__ import annotations

import os


def debug() -> bool:
    """``SLIDESPARSE_DEBUG=1``: the command line shows tracebacks instead of one-line errors."""
    return os.environ.get("SLIDESPARSE_DEBUG", "") not in ("", "0")
