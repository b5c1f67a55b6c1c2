"""Which version of a kernel was timed: a hash of the code that the kernel consists of, behind a number that the author raises."""

from __future__ import annotations

import ast
import hashlib
import re
from functools import cache
from importlib import resources

from .kernels import kernels


def kernel_versions() -> dict[str, str]:
    """The version of every kernel by name."""
    return {name: _version(kernel.version, kernel.code) for name, kernel in kernels().items()}


@cache
def _version(number: int, code: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for module in sorted(code):
        cuda = module.endswith(".cu")
        *folders, name = module.removesuffix(".cu").split(".")
        file = resources.files(".".join(("slidesparse", *folders))) / f"{name}{'.cu' if cuda else '.py'}"
        text = file.read_text(encoding="utf-8")
        digest.update((_cuda_stripped(text) if cuda else stripped(text)).encode())
    return f"{number}-{digest.hexdigest()[:10]}"


def stripped(source: str) -> str:
    """The syntax tree of a module as text, without docstrings and comments; the same from every version of Python."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return _text(tree)


def _cuda_stripped(source: str) -> str:
    """CUDA C++ without comments and layout."""
    return " ".join(re.sub(r"//[^\n]*", "", source).split())


def _text(node: object) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (f"{name}={_text(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
    return f"{type(node).__name__}({','.join(fields)})"
