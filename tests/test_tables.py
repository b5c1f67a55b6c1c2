"""Tables of the documents are what the data say."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from slidesparse.bench.rows import Row

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose neighbours it imports as scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = spec_from_file_location("document_tables", ROOT / "benchmarks" / "document_tables.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_between_markers_is_that_of_its_data(tables: ModuleType) -> None:
    found = 0
    for path in tables.documents():
        text = path.read_text(encoding="utf-8")
        found += len(tables.MARKED.findall(text))
        assert tables.written(text, path.name) == text, f"make tables: {path}"
    assert found


def test_each_name_has_a_table_and_others_are_refused(tables: ModuleType) -> None:
    names = ["", "trade"]
    names += [f"{kind}-{card}{end}" for card in tables.CARDS for kind, ends in KINDS.items() for end in ends]
    for name in names:
        table = tables.table_named(name)
        widths = {line.count(" | ") for line in re.findall(r"^\|.*", table, flags=re.MULTILINE)} if name else {1}
        assert len(widths) == 1 and "nan" not in table and "inf×" not in table, name
    text = "<!-- tables: gone begin -->\n<!-- tables: gone end -->"
    with pytest.raises(SystemExit, match="no table is called 'gone'"):
        tables.written(text, "a.md")
    for broken, message in ((text.replace("gone end", "other end"), "ends as 'other'"), (text.partition("\n")[0], "does not end")):
        with pytest.raises(SystemExit, match=message):
            tables.written(broken, "a.md")


KINDS = {"linears": ("-6-8", "-others"), "serving": ("-prefill", "-decode"), "kernels": ("",)}


def test_what_differs_is_named_and_written(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    page, summary = tmp_path / "a.md", tmp_path / "accuracy.json"
    page.write_text("before\n<!-- tables: trade begin -->\nold\n<!-- tables: trade end -->\nbehind\n")
    summary.write_text("[]")
    for name, value in (("ROOT", tmp_path), ("SUMMARY", summary), ("documents", lambda: [page])):
        monkeypatch.setattr(tables, name, value)
    monkeypatch.setattr(sys, "argv", ["document_tables.py", "--check"])
    with pytest.raises(SystemExit, match=r"not what the data say: a\.md, accuracy\.json; run make tables"):
        tables.main()
    assert "old" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["document_tables.py"])
    tables.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("end -->\nbehind\n") and "old" not in text and "| 6:8 fp8 |" in text
    tables.main()
    assert page.read_text() == text and "every table is what the data say" in capsys.readouterr().out


def test_a_model_with_losses_and_speeds_leads_the_trade(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as ``bench serve Qwen2.5-Coder-1.5B --schemes fp8`` writes them."""
    base = Row("serve", "prefill", 4096, scheme="fp8", pattern="6:8", model="Qwen2.5-Coder-1.5B", rival="vLLM", commit="abc", gigabytes=2.0)
    made = [
        replace(base, what=what, m=m, route=route, us=us)
        for what, m, ours in (("prefill", 4096, 80.0), ("decode", 64, 125.0))
        for route, us in (("vLLM", 100.0), ("packed: as the plan has it", ours))
    ]
    known = [row for row in tables.serve_rows("h200") if row.model != base.model]
    monkeypatch.setattr(tables, "serve_rows", lambda card: [*known, *made])
    first, second, *_ = [line for line in tables.trade().splitlines()[2:]]
    assert first.startswith("| **Qwen2.5-Coder-1.5B: losses of the real weights, bytes and speed of random ones, in vLLM")
    assert second == "| 6:8 fp8 | -0.7 ± 0.2 in bf16 | +2.2 % in bf16 | 1.00 | (wall 1.25×) | (wall 0.80×) |"


def test_ratios_of_engines_are_of_one_run(tables: ModuleType) -> None:
    """2:4 int8 with larger CUDA graphs was another run than without, against a dense model with the same graphs."""
    lines = {line.split(" | ")[0].strip("| "): line for line in tables.served("h200", "prefill").splitlines()}
    assert "Qwen2.5-7B, 2:4 int8, CUDA graphs to 2048" in lines and "Qwen2.5-7B, 2:4 int8" in lines
    assert "1.33×" in lines["Qwen2.5-7B, 2:4 int8, CUDA graphs to 2048"] and "1.25×" in lines["Qwen2.5-7B, 2:4 int8"]
    own = [row for row in tables.serve_rows("h100") if (row.what, row.m) == ("prefill", 4096)]
    told = {(row.model, row.pattern, row.scheme, row.route): row for row in own}
    lines = {line.split(" | ")[0].strip("| "): line for line in tables.served("h100", "prefill").splitlines()}
    for label, kind in (("2:4 int8", ("2:4", "int8")), ("2:4 fp8", ("2:4", "fp8"))):
        for setting in ("", ", CUDA graphs to 2048"):
            row = told["Qwen2.5-7B", *kind, f"packed: as the plan has it{setting}"]
            assert f"{row.ratio:.2f}×" in lines[f"Qwen2.5-7B, {label}{setting}"], "as the run itself found it"
