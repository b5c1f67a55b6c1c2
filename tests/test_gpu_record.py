"""The record of GPU test runs: a row for a run that came to its end, none for another."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import gpu

FILE = """
import pytest

@pytest.mark.needs_gpu
def test_first():
    pass

@pytest.mark.needs_gpu
def test_second():
    {body}

def test_other():
    raise AssertionError("is not marked")
"""


@pytest.mark.parametrize(
    ("body", "status", "rows"),
    [("assert False", 1, [("1", "1", "0")]), ("pytest.skip('why')", 0, [("1", "0", "1")]), ("raise KeyboardInterrupt", 2, [])],
)
def test_a_row_tells_of_a_whole_run(body: str, status: int, rows: list[tuple[str, ...]], tmp_path: Path, capfd) -> None:
    (tmp_path / "test_some.py").write_text(FILE.format(body=body))
    out = tmp_path / "runs.csv"
    assert gpu.main(out, [str(tmp_path), "-v", "-p", "no:cacheprovider"]) == status
    text = capfd.readouterr()
    assert "test_first PASSED" in text.out and "test_other" not in text.out
    found = list(csv.DictReader(out.open())) if out.exists() else []
    assert [(row["passed"], row["failed"], row["skipped"]) for row in found] == rows
    assert ("no row" in text.err) == (not rows)
