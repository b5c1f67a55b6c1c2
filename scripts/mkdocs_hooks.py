"""What the site has besides docs: the README as its first page, other pages of the root, and the data that pages link to."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the root's pages, and every file outside docs that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, site_path(name), content=(ROOT / name).read_text(encoding="utf-8")))
    data = {path for page in (*PAGES, *(str(each.relative_to(ROOT)) for each in (ROOT / "docs").rglob("*.md"))) for path in linked(page)}
    for name in sorted(data - set(PAGES)):
        if not name.startswith("docs/"):
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Point relative links of the repository to the places of their files in the site."""
    here = repository_path(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        there = os.path.normpath(os.path.join(os.path.dirname(here), link[2]))
        target = os.path.relpath(site_path(there), os.path.dirname(page.file.src_uri) or ".")
        return f"{link[1]}{target}{link[3]}" if (ROOT / there).exists() else link[0]

    return LINK.sub(moved, markdown)


def linked(page: str) -> set[str]:
    """Files of the repository that a page links to, relative to its root."""
    found = (os.path.normpath(os.path.join(os.path.dirname(page), link[2])) for link in LINK.finditer((ROOT / page).read_text("utf-8")))
    return {name for name in found if (ROOT / name).is_file()}


def site_path(name: str) -> str:
    return "index.md" if name == "README.md" else name.removeprefix("docs/")


def repository_path(name: str) -> str:
    if name == "index.md":
        return "README.md"
    return name if name in PAGES else f"docs/{name}"
