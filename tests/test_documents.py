"""The documents say what the code does: commands and options, quoted errors, versions, lengths."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import slidesparse
from dist import MODEL
from slidesparse.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_page_of_commands_is_what_help_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import write_commands

    assert write_commands.PAGE.read_text(encoding="utf-8") == write_commands.page(), "run .venv/bin/python scripts/write_commands.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    for line in re.findall(r"^(?:    |\t)(slidesparse .*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        if line.startswith("slidesparse:") or "[OPTIONS]" in line or line.startswith("slidesparse COMMAND"):
            continue
        _, name, *words = shlex.split(line, comments=True)
        command = group.commands[name]
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, f"{page.name}: {line}"


def test_python_that_is_shown_runs(tmp_path: Path) -> None:
    for package in ("transformers", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quickstart.md")]
    blocks = [code for page in pages for code in re.findall(r"```python\n(.*?)```", page, re.S)]
    assert len(blocks) == 3
    done = subprocess.run([sys.executable, "-c", "\n".join([MODEL, *blocks])], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_quoted_errors_are_those_of_the_code() -> None:
    said = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(re.sub(r"%[sd]", "…", node.value))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## It is slower")[0]
    quoted = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(quoted) > 25
    parts = [part.strip(" …") for error in quoted for part in error.split("…")]
    assert [part for part in parts if len(part) > 3 and not any(part in text for text in said)] == []


def test_one_version_everywhere() -> None:
    assert f"\nversion: {slidesparse.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == slidesparse.__version__


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md", "docs/serving.md"])
def test_pages_that_must_stay_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 120


def test_sentences_of_the_readme_are_short() -> None:
    text = re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    prose = [block for block in text.split("\n\n") if not block.lstrip("\n").startswith(("    ", "|", "#", "!", "[Quickstart"))]
    sentences = [sentence for block in prose for sentence in re.split(r"(?<=[.:])\s+", block)]
    assert len(sentences) > 20
    assert [sentence for sentence in sentences if len(sentence.split()) > 20] == []


def test_every_page_can_be_reached() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", page.read_text(encoding="utf-8")):
            there = (page.parent / target).resolve()
            if "://" not in target and there not in seen and there.exists():
                waiting.append(there)
    assert not set(PAGES) - seen


def test_pages_of_the_site_are_listed() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]))
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert there <= listed


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    homes = {name: f"slidesparse.{home}.{name}" for name, home in slidesparse._HOMES.items()}
    assert [name for name, home in homes.items() if f"\n::: {home}\n" not in page] == []
