"""Rows of benchmarks: one schema, files that a run goes on with, and the version of the code that they name."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slidesparse import __version__
from slidesparse.bench import rows
from slidesparse.bench.rows import COLUMNS, FAILED, Rows
from slidesparse.errors import CheckpointError


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    table = Rows(tmp_path / "new" / "rows.csv")
    first = replace(rows.here("abc"), bench="kernel", what="linear", m=4, n=8, k=16, us=12.5, ratio=1.25, why='a "word", and more')
    table.add(first)
    table.add(replace(first, m=5, us=None, status=FAILED))
    assert Rows(table.path).rows == table.rows == rows.read_folder(tmp_path / "new")
    assert first.card == "cpu" and first.torch == torch.__version__ and first.commit == "abc" and first.date
    assert table.path.read_text().splitlines()[0] == ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ok", "fine"), "line 2: status 'fine'"),
        (("12.5", "fast"), "line 2: could not"),
        (("us_p20,", ""), "columns are not those of benchmark rows; what differs: us_p20$"),
    ],
)
def test_a_file_of_something_else_is_refused_with_its_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    table = Rows(tmp_path / "rows.csv")
    table.add(replace(rows.here("abc"), bench="kernel", what="linear", us=12.5))
    table.path.write_text(table.path.read_text().replace(*change, 1))
    with pytest.raises(CheckpointError, match=message):
        Rows(table.path)


@pytest.mark.parametrize("kept", [0, 5, -1, -30])
def test_a_run_goes_on_behind_a_line_that_was_cut_off(tmp_path: Path, kept: int) -> None:
    one = replace(rows.here("abc"), bench="kernel", what="linear")
    table = Rows(tmp_path / "rows.csv")
    for m in (1, 2):
        table.add(replace(one, m=m))
    table.path.write_bytes(table.path.read_bytes()[:kept])
    Rows(table.path).add(replace(one, m=3))
    assert [row.m for row in rows.read(table.path)] == ([3] if kept >= 0 else [1, 3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines, "x" * 200_000], "field larger than"),
        (lambda lines: [*lines, f"{lines[1]},one more"], f"line 3: {len(COLUMNS) + 1} values for {len(COLUMNS)} columns"),
        (lambda lines: [*lines, lines[1].partition(",")[0]], f"line 3: 1 values for {len(COLUMNS)} columns"),
    ],
    ids=["no-table", "too-many", "too-few"],
)
def test_damaged_lines_are_one_error_that_names_the_file(tmp_path: Path, damage, message: str) -> None:
    table = Rows(tmp_path / "rows.csv")
    table.add(replace(rows.here("abc"), bench="kernel", what="linear"))
    table.path.write_text("\n".join([*damage(table.path.read_text().splitlines()), ""]))
    with pytest.raises(CheckpointError, match=rf"rows\.csv.*{message}"):
        rows.read(table.path)


def test_tables_of_others_in_the_folder_disturb_nobody(tmp_path: Path) -> None:
    Rows(tmp_path / "rows.csv").add(replace(rows.here("abc"), bench="kernel", what="linear"))
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9,b\n1,2\n")
    (tmp_path / "long.csv").write_text("x" * 200_000)
    assert len(rows.read_folder(tmp_path)) == 1


def test_a_folder_without_rows_says_how_to_get_some(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CheckpointError, match="slidesparse bench kernel --out"):
        rows.read_folder(tmp_path)


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit of two files, in which this package seems to lie."""
    (tmp_path / "src" / "slidesparse" / "bench").mkdir(parents=True)
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "src" / "slidesparse" / "bench" / "rows.py"))
    assert rows.code_version() == __version__
    (tmp_path / "src" / "one.py").write_text("1")
    (tmp_path / "rows.csv").write_text("what another run wrote")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        git(tmp_path, *words)
    return tmp_path


def test_other_changes_of_a_checkout_are_other_versions(checkout: Path) -> None:
    clean = rows.code_version()
    assert re.fullmatch(r"[0-9a-f]{7}", clean)
    for name in ("rows.csv", "new.csv"):
        (checkout / name).write_text("what a run writes here")
        assert rows.code_version() == clean, "rows are no code"
    (checkout / "src" / "one.py").write_text("2")
    second = rows.code_version()
    assert re.fullmatch(clean + r"-dirty-[0-9a-f]{6}", second) and rows.code_version() == second
    (checkout / "src" / "new.py").write_text("3")
    third = rows.code_version()
    (checkout / "src" / "new.py").write_text("4")
    assert len({second, third, rows.code_version()}) == 3


def test_new_files_of_any_name_are_in_the_version_and_checkouts_within_are_not(checkout: Path) -> None:
    clean = rows.code_version()
    inner = checkout / "src" / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "one.py").write_text("1")
    git(inner, "add", ".")
    git(inner, "commit", "-qm", "a")
    assert rows.code_version() == clean
    (checkout / "src" / "größe 1.py").write_text("3")
    first = rows.code_version()
    (checkout / "src" / "größe 1.py").write_text("4")
    assert first != clean and rows.code_version() not in (clean, first)
