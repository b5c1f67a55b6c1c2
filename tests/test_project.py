"""House rules that neither ruff nor import-linter checks."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "src").rglob("*.py"))
PYTHON = [path for folder in ("src", "tests", "examples", "scripts", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert path.name not in ("utils.py", "helpers.py")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.cu")), ids=name_of)
def test_cuda_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_keeps_the_rules(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert caught and (passes_on or not re.search(r"\b(Base)?Exception\b", caught)), f"{where} catches everything"
        elif isinstance(node, ast.Assert):
            pytest.fail(f"{where} asserts")
        elif isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{where} imports a star"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{where} runs text as code"
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            assert name != "sys.path", f"{where} touches sys.path"
            environment = re.fullmatch(r"os\.(environ\w*|getenvb?|putenv|unsetenv)", name)
            assert not environment or path.name == "env.py", f"{where} touches the environment"


def imported_with(module: str) -> set[str]:
    """Top-level packages in memory, and ``cuda`` if CUDA was initialised, after importing ``module`` alone."""
    code = (
        f"import sys, {module}; torch = sys.modules.get('torch'); "
        "print(*{name.partition('.')[0] for name in sys.modules}, 'cuda' if torch and torch.cuda.is_initialized() else '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_every_public_name_is_there_whatever_is_imported_first() -> None:
    shown = "f'{{name}}={{getattr(slidesparse, name)!r:.20}}' for name in slidesparse.__all__"
    code = f"import slidesparse.{{first}}, slidesparse; print(*({shown}))"
    for first in ("checkpoint", "nn"):
        done = subprocess.run([sys.executable, "-c", code.format(first=first)], capture_output=True, text=True, check=True, cwd=ROOT)
        kinds = dict(pair.split("=", 1) for pair in re.findall(r"\w+=<\w+", done.stdout))
        assert kinds == {name: "<class" if name[0].isupper() else "<function" for name in kinds}
        assert len(kinds) == 18


def test_importing_the_library_is_light() -> None:
    assert not imported_with("slidesparse") & {"transformers", "triton", "vllm", "matplotlib", "cuda", "gguf", "typer"}


def test_pattern_arithmetic_needs_the_standard_library_only() -> None:
    # The package's own __init__ may bring torch along, so the room's imports are read, not run.
    for room in ("pattern", "select", "env", "errors"):
        tree = ast.parse((ROOT / "src" / "slidesparse" / f"{room}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names), f"{room} imports {names}"


def test_documents_link_to_files_that_are_there() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_names_in_the_architecture_are_there() -> None:
    """Dotted names are resolved, but for adapters of packages that are not installed, which are looked for in their file."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = sorted(set(re.findall(r"\bslidesparse(?:\.\w+)+", text)))
    assert len(names) > 30
    for name in names:
        assert _there(name), f"docs/architecture.md names {name}"
    paths = re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/.]+)`", text)
    assert len(paths) > 10 and not [path for path in paths if not (ROOT / path).exists()]
    rooms = {path.stem for path in (ROOT / "src" / "slidesparse").iterdir() if not path.name.startswith("_") and path.suffix != ".typed"}
    drawn = text.partition("## The rooms")[2].partition("## ")[0]
    assert not [room for room in rooms if not re.search(rf"\b{room}\b", drawn)], "every room is drawn"


def _there(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT / "src" / Path(*parts[:end])
        if not (base.is_dir() or base.with_suffix(".py").is_file()):
            continue
        if end == len(parts):
            return True
        found = importlib.import_module(".".join(parts[:end]))
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False
