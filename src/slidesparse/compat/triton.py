"""Names of Triton outside ``triton`` and ``triton.language``, and how a compiled kernel is launched without Triton's own binding.

Importing this imports Triton; a name that it lacks raises ImportError with the way out, and kernels of torch run instead.
"""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from triton.runtime.jit import JITFunction

from .versions import installed, lacks

try:
    from triton.errors import TritonError
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError(lacks("triton", f"name of these: {error}")) from error

__all__ = ["Direct", "TensorDescriptor", "TritonError", "direct", "gdc_launch_dependents", "gdc_wait"]

_LOG = logging.getLogger(__name__)


class Direct(NamedTuple):
    """A compiled kernel's launch: ``run(grid x, y, z, stream, *before, *the kernel's arguments)``."""

    run: Callable[..., None]
    before: tuple[Any, ...]
    parameters: Sequence[str]
    """The kernel's parameters by name."""


def direct(kernel: Any, compiled: Any) -> Direct | None:
    """The launch of what ``kernel[grid](...)`` returned; None where this Triton launches in another way than is known here."""
    names = getattr(kernel, "arg_names", None)
    if names is None or not launches_as_known():
        return None
    # No metadata for hooks, and no hooks around the launch.
    return Direct(compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), names)


@cache
def launches_as_known() -> bool:
    """Whether Triton itself passes grid, stream, function, metadata, launch metadata and two hooks before a kernel's own arguments.

    Only Triton's source tells this order, so it is looked up in the method that launches; says once that launches take longer without it.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(JITFunction.run)))
    except (OSError, TypeError, SyntaxError, AttributeError):
        tree = ast.Module([], [])
    if any(_is_known(node) for node in ast.walk(tree)):
        return True
    _LOG.warning(
        "triton %s launches kernels in a way that slidesparse does not know: every launch costs more host time, results are the same",
        installed("triton"),
    )
    return False


def _is_known(node: ast.AST) -> bool:
    """Whether a piece of Triton's source is the call of a compiled kernel with the arguments that are known."""
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(".run") or len(node.args) != 10:
        return False
    given = [ast.unparse(one) for one in node.args]
    ends = ("_0", "_1", "_2", "stream", ".function", ".packed_metadata", "launch_metadata", "enter_hook", "exit_hook")
    return all(text.endswith(end) for text, end in zip(given, ends, strict=False)) and isinstance(node.args[-1], ast.Starred)
