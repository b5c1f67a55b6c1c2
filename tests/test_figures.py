"""Pictures and the report: what they show, that both themes and formats are written, and that a page needs nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slidesparse import cli
from slidesparse.bench import plots, report
from slidesparse.bench.accuracy import Loss
from slidesparse.bench.figures import DENSE, SHOWN, Figure, figures
from slidesparse.bench.models import MODELS
from slidesparse.bench.rows import FAILED, Row, Rows, newest, read_folder
from slidesparse.errors import UnsupportedError
from slidesparse.format import SCHEMES

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
STUDY = [
    Loss("small", pattern, "admm", 20 * (1 + cost), 20.0, None, None, 0, scheme)
    for scheme, costs in (("fp8", {"6:8": 0.1}), ("int8", {"2:4": 1.0, "6:8": 0.2}), ("bf16", {"2:4": 0.8, "6:8": 0.05}))
    for pattern, cost in costs.items()
]


def kernel_rows(card: str = "CARD 1") -> list[Row]:
    """The layers of one model: 2:4 twice as fast as dense, 6:8 one and a quarter times, at two numbers of tokens."""
    base = Row("kernel", "linear", scheme="int8", card=card, commit="abc")
    rows = [replace(base, what="roof", route="copy", us=1000.0, gigabytes=4.0, scheme="")]
    for n, k in MODELS["Llama-3.2-1B"].linears.values():
        for m in (16, 4096):
            for pattern, gain in (("2:4", 2.0), ("6:8", 1.25), ("10:12", 1.1)):
                cell = replace(base, n=n, k=k, m=m, pattern=pattern)
                us = n * k * m / 1e6
                rows += [replace(cell, route="dense:triton", us=us, ratio=1.0), replace(cell, route="slid:x", us=us / gain, ratio=gain)]
    return rows


def serve_rows() -> list[Row]:
    base = Row("serve", "decode", m=64, scheme="fp8", pattern="6:8", model="M", card="CARD 1", commit="abc", rival="vLLM")
    slow = replace(base, route="packed: as the plan has it, CUDA graphs to 2048", us=1200.0, ratio=0.9)
    return [
        replace(base, route="vLLM", us=1000.0, ratio=1.0), slow, replace(base, route="packed: as the plan has it", us=800.0, ratio=1.25),
        replace(base, what="prefill", m=8192, route="packed: as the plan has it", us=800.0, ratio=1.5),
    ]  # fmt: skip


def by_kind(rows: list[Row]) -> dict[str, Figure]:
    return {figure.name.partition("-")[0]: figure for figure in figures(rows, STUDY)}


def test_speedups_are_of_the_models_layers_with_bound_and_dense_line() -> None:
    (panel,) = by_kind(kernel_rows())["speedup"].panels
    assert [(line.name, line.points) for line in panel.lines] == [
        ("2:4", [(16, pytest.approx(2)), (4096, pytest.approx(2))]), ("6:8", [(16, pytest.approx(1.25)), (4096, pytest.approx(1.25))]),
    ], "at most six patterns are shown, and not 10:12"  # fmt: skip
    assert [line.bound for line in panel.lines] == [2.0, pytest.approx(4 / 3)] and panel.level == 1.0 and len(SHOWN) == 6


def test_the_roofline_has_measured_roofs() -> None:
    (panel,) = by_kind(kernel_rows())["roofline"].panels
    assert [line.name for line in panel.lines] == [DENSE, "2:4", "6:8"]
    assert all(y == pytest.approx(2.0) for _, y in panel.lines[0].points), "2·M·N·K in M·N·K / 10^6 µs are 2 tera-operations a second"
    compute, memory = panel.roofs
    assert [y for _, y in compute.points] == [pytest.approx(2.0)] * 2
    assert [y / x for x, y in memory.points] == [pytest.approx(4.0)] * 2, "4 GB in a millisecond are 4 TB/s"
    assert memory.points[0] < memory.points[1] == (pytest.approx(0.5), pytest.approx(2.0)), "it rises, and ends where products bind"


def test_decoding_is_shown_against_dense_of_the_same_run_and_the_trade_by_pattern() -> None:
    found = by_kind([*kernel_rows(), *serve_rows()])
    (panel,) = found["decode"].panels
    assert [(line.name, line.points, line.labels) for line in panel.lines] == [(DENSE, [(64, 1.0)], ["64k"]), ("6:8", [(64, 1.25)], [])]
    speed, size = found["trade"].panels
    assert [(line.name, line.labels) for line in speed.lines] == [("fp8, small", ["6:8"])]
    assert speed.lines[0].points == [(1.5, pytest.approx(10))], "the loss is that of the scheme which was timed"
    base = replace(serve_rows()[2], m=8, ratio=1.1)
    more = [replace(base, m=m, route="packed: as the plan has it, CUDA graphs to 2048") for m in (8, 16, 32)]
    (panel,) = by_kind([*serve_rows(), *more])["decode"].panels
    assert [m for m, _ in panel.lines[1].points] == [8, 16, 32, 64], "one line is of one setting, that of the most points"
    assert [(line.name, line.labels, line.points[-1]) for line in size.lines] == [
        ("fp8, small", ["6:8"], (0.875, pytest.approx(10))), ("int8, small", ["2:4", "6:8"], (0.875, pytest.approx(20))),
        ("bf16, small", ["2:4", "6:8"], (0.8125, pytest.approx(5))),
    ], "those with a speed first, bytes of the scheme"  # fmt: skip
    (alone, _) = by_kind(kernel_rows())["trade"].panels
    assert [line.name for line in alone.lines] == ["int8, small"], "what was not timed has no line against speed"
    assert alone.lines[0].points == [(pytest.approx(2.0), pytest.approx(100)), (pytest.approx(1.25), pytest.approx(20))]
    assert "trade" not in {figure.name.partition("-")[0] for figure in figures(kernel_rows(), STUDY[:1])}, "nor any picture without one"


def test_dense_is_what_the_ratio_is_against_in_transformers_too() -> None:
    theirs = "transformers, bf16"
    plain = [replace(row, rival=theirs, route=theirs if row.route == "vLLM" else row.route) for row in serve_rows()]
    dense = replace(plain[0], what="prefill", m=8192)
    found = by_kind([*plain, dense])
    (panel,) = found["decode"].panels
    assert [(line.name, line.points, line.labels) for line in panel.lines] == [(DENSE, [(64, 1.0)], ["64k"]), ("6:8", [(64, 1.25)], [])]
    assert "run by transformers on" in found["decode"].title
    speed, _ = found["trade"].panels
    assert [x for x, _ in speed.lines[0].points] == [1.5] and speed.x.endswith("in transformers"), "dense rows are no gain"


def test_the_readmes_picture_has_the_lines_of_the_rows() -> None:
    (figure,) = [each for each in figures(read_folder(RESULTS)) if each.name == "trade-nvidia-h200"]
    notes = re.findall("<!-- (.*?) -->", (RESULTS.parent.parent / "docs" / "tradeoff.svg").read_text(encoding="utf-8"))
    lines = [line for panel in figure.panels for line in panel.lines]
    assert [note for note in notes if ", " in note and note.partition(",")[0] in SCHEMES] == [line.name for line in lines]
    assert [note for note in notes if note in SHOWN] == [label for line in lines for label in line.labels]


def test_cards_and_runs_are_not_mixed() -> None:
    assert {figure.name for figure in figures([*kernel_rows(), *kernel_rows("CARD 2")], STUDY)} == {
        f"{kind}-card-{number}" for kind in ("speedup", "roofline", "trade") for number in (1, 2)
    }
    again = [replace(row, commit="def") for row in kernel_rows() if row.pattern == "6:8"]
    kept = newest([*kernel_rows(), *again])
    assert {(row.pattern, row.commit) for row in kept if row.pattern} == {("6:8", "def"), ("2:4", "abc"), ("10:12", "abc")}
    assert not list(figures([Row("kernel", "linear", status=FAILED, card="CARD 1")], STUDY))


def test_both_themes_and_formats_are_written_the_same_each_time(tmp_path: Path) -> None:
    figure = by_kind(kernel_rows())["speedup"]
    made = plots.draw(figure, tmp_path / "a")
    assert [file.name for file in made] == [f"speedup-card-1-{theme}.{kind}" for theme in ("light", "dark") for kind in ("svg", "png")]
    for file, again in zip(made, plots.draw(figure, tmp_path / "b"), strict=True):
        assert file.stat().st_size > 5000 and file.read_bytes() == again.read_bytes(), file.name


def test_without_matplotlib_pictures_say_what_to_install_and_a_page_goes_without(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'slidesparse\[plot\]'"):
        plots.draw(by_kind(kernel_rows())["speedup"], tmp_path)
    text = report.page(kernel_rows(), "title")
    assert "slidesparse[plot]" in text and "<img" not in text and "efficiency" in text


class Page(HTMLParser):
    """What a page holds: tags that are open, links, tables' rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.rows = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_is_whole() -> None:
    broken = Row("kernel", "linear", status=FAILED, why="<out of memory> & more", card="CARD 1")
    text = report.page([*kernel_rows(), *serve_rows(), broken], "a & b")
    page = Page(text)
    assert not page.open and page.links and all(link.startswith("data:") for link in page.links)
    assert not re.search(r"<(link|script)[^>]*(src|href)", text) and "a &amp; b" in text and "&lt;out of memory&gt; &amp; more" in text
    assert page.rows > len(kernel_rows()) and "CARD 1" in text.partition("</ul>")[0] and "efficiency = " in text


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_SORTED = """<script>
const body = document.querySelector("table").tBodies[0], head = document.querySelectorAll("th")[3];
const numbers = () => [...body.rows].map(row => +row.cells[3].dataset.n);
head.click(); const up = numbers(); head.click(); const down = numbers();
const rising = up.every((each, at) => !at || up[at - 1] <= each), falling = down.every((each, at) => !at || down[at - 1] >= each);
document.title = `${rising} ${falling} ${up.length > 1} ${[...document.images].every(each => each.naturalWidth > 100)}`;
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
def test_a_browser_shows_the_pictures_and_sorts_by_a_click(tmp_path: Path) -> None:
    rows = [row for row in kernel_rows() if row.pattern != "10:12"]
    (tmp_path / "page.html").write_text(report.page(rows, "title").replace("</body>", _SORTED))
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    words.append(f"file://{tmp_path}/page.html")
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>true true true true</title>" in shown


def test_the_commands_write_pictures_and_a_page_beside_the_rows(monkeypatch, capsys, tmp_path: Path) -> None:
    table = Rows(tmp_path / "kernel.csv")
    for row in (row for row in kernel_rows() if row.pattern != "10:12"):
        table.add(row)
    monkeypatch.setattr(plots, "FORMATS", ("svg",))
    for words in (["plot", tmp_path], ["report", tmp_path]):
        monkeypatch.setattr(sys, "argv", ["slidesparse", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, capsys.readouterr().err
    assert {"speedup-card-1-dark.svg", "roofline-card-1-light.svg"} <= {file.name for file in (tmp_path / "pictures").iterdir()}
    assert len(table.rows) < Page((tmp_path / "report.html").read_text()).rows


def test_a_page_replaces_only_pages(run, tmp_path: Path) -> None:
    table = Rows(tmp_path / "kernel.csv")
    table.add(kernel_rows()[0])
    before = table.path.read_bytes()
    status, _, said = run("report", tmp_path, "--out", table.path)
    assert status == 1 and "kernel.csv is there, and not a page that report wrote" in said and table.path.read_bytes() == before
    assert [run("report", tmp_path)[0] for _ in range(2)] == [0, 0]


def test_the_repositorys_rows_fill_every_picture() -> None:
    names = {figure.name for figure in figures(read_folder(RESULTS))}
    kinds, cards = ("speedup", "roofline", "decode", "prefill", "trade"), ("nvidia-h200", "nvidia-h100-80gb-hbm3")
    assert names == {f"{kind}-{card}" for kind in kinds for card in cards}
