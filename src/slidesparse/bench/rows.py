"""The one schema of all benchmarks: a `Row` is one figure, or why there is none, with the machine that it comes from."""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from .. import __version__
from ..errors import CheckpointError
from ..measure import Timing

OK = "ok"
WRONG = "wrong"
FAILED = "failed"
REFUSED = "refused"
PUBLISHED = "published"
STATUSES = (OK, WRONG, FAILED, REFUSED, PUBLISHED)
"""Measured and right; measured and not right; broke off; cannot run here; told by others, not measured."""

_INTEGERS, _NUMBERS = ("m", "n", "k"), ("us", "us_p20", "us_p80", "ratio", "error", "kernels_us", "gigabytes", "joules")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: what was timed: ``linear`` (whole), ``product``, ``lift``, ``prefill``, ``decode``, ``roof``.
        m: tokens; requests in a batch for ``decode``.
        route: who ran, ``layout:kernel:variant`` or another engine's name.
        rival: whose time the ratio is against: the fastest dense one of the same scheme, timed beside it.
        us: microseconds, median, with 20th and 80th percentile.
        timer: ``sustained``, ``in turn``, or ``host clock`` on a CPU.
        ratio: the rival's time over this one: above 1 is faster.
        error: largest error against the oracle.
        kernels_us: what the kernels of a step take.
        gigabytes: memory of weights; joules: energy a token.
        status: one of `STATUSES`; ``why`` says more.
    """

    bench: str
    what: str
    m: int = 0
    n: int = 0
    k: int = 0
    scheme: str = ""
    pattern: str = ""
    route: str = ""
    rival: str = ""
    us: float | None = None
    us_p20: float | None = None
    us_p80: float | None = None
    timer: str = ""
    ratio: float | None = None
    error: float | None = None
    kernels_us: float | None = None
    gigabytes: float | None = None
    joules: float | None = None
    status: str = OK
    why: str = ""
    model: str = ""
    card: str = ""
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    triton: str = ""
    cusparselt: str = ""
    commit: str = ""
    date: str = ""

    @property
    def cell(self) -> tuple[object, ...]:
        """What a run measures at once, on which machine: a cell whose rows are there is not measured again."""
        phase = self.what if self.bench == "serve" else ""
        size = self.m, self.n, self.k
        return self.bench, phase, self.model, *size, self.scheme, self.pattern, self.card, self.driver, self.torch, self.commit

    @property
    def speedup(self) -> float | None:
        """The ratio, of rows that may be counted."""
        return self.ratio if self.status == OK else None


COLUMNS = tuple(field.name for field in fields(Row))


def here(commit: str | None = None) -> Row:
    """A row that holds nothing but this machine, to be filled by ``dataclasses.replace``."""
    today = datetime.date.today().isoformat()
    row = Row("", "", card="cpu", torch=torch.__version__, commit=commit or code_version(), date=today)
    if not torch.cuda.is_available():
        return row
    from ..gemm.machine import this_machine

    about = asdict(this_machine())
    return replace(row, card=about.pop("gpu"), **about)


def device() -> str:
    """Where benchmarks run: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(row: Row, timing: Timing, device: str) -> Row:
    """A row with its time, and how it was taken."""
    timer = "host clock" if device == "cpu" else "sustained" if timing.sustained else "in turn"
    return replace(row, us=timing.p50, us_p20=timing.p20, us_p80=timing.p80, timer=timer, status=OK)


def status_of(why: str) -> str:
    """The status of a route that `slidesparse.gemm.tune` dropped, by its reason."""
    if why.startswith(("max error", "returned", "none of its variants")):
        return WRONG
    return FAILED if "memory" in why else REFUSED


def code_version() -> str:
    """The commit of the checkout that holds this package; the package's version elsewhere.

    Where files of ``src`` differ from the commit, ``-dirty`` and a hash of the differences stand behind: other changes are another version.
    """
    root = Path(__file__).parents[3]
    commit = _git(root, "rev-parse", "--short=7", "HEAD") if (root / ".git").exists() else None
    if commit is None:
        return __version__
    changed = _git(root, "diff", "HEAD", "--binary", "--", "src") or b""
    names = (_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", "src") or b"").split(b"\0")
    new = [name for name in names if (root / os.fsdecode(name)).is_file()]  # a checkout within this one is listed as a folder
    if not changed and not new:
        return commit.decode().strip()
    digest = hashlib.sha256(changed)
    for name in new:
        digest.update(name + (root / os.fsdecode(name)).read_bytes())
    return f"{commit.decode().strip()}-dirty-{digest.hexdigest()[:6]}"


def _git(root: Path, *words: str) -> bytes | None:
    """What git says; None where there is none, or the folder is no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


class Rows:
    """A CSV file of rows: what is there is kept, what is added is on disk at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            _mend(path)
        self.rows = read(path) if path.exists() else []
        self._cells = {row.cell for row in self.rows}

    def has(self, row: Row) -> bool:
        """Whether the cell of this row was measured."""
        return row.cell in self._cells

    def replace(self, row: Row, new: Sequence[Row]) -> None:
        """Put ``new`` rows in place of those of this row's cell, in one step: times of two runs are not compared."""
        rows = [*(each for each in self.rows if each.cell != row.cell), *new]
        half = self.path.with_name(f"{self.path.name}.partial")
        half.write_text(_lines([COLUMNS, *map(_values, rows)]), encoding="utf-8")
        half.replace(self.path)
        self.rows, self._cells = rows, {each.cell for each in rows}

    def add(self, row: Row) -> None:
        """Write a row."""
        first = not self.rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(_lines([*([COLUMNS] if first and not file.tell() else []), _values(row)]))
        self.rows.append(row)
        self._cells.add(row.cell)


def _values(row: Row) -> list[str]:
    return [_text(getattr(row, name)) for name in COLUMNS]


def _lines(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _mend(path: Path) -> None:
    """Cut off a last line without an end: a run was stopped while it wrote."""
    text = path.read_bytes()
    whole, head = text[: text.rfind(b"\n") + 1], ",".join(COLUMNS).encode()
    if whole.startswith(head + b"\n") and whole != text:
        os.truncate(path, len(whole))
    elif not whole and head.startswith(text):
        path.unlink()


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        CheckpointError: other columns, or a value that makes no sense; names file and line.
    """
    lines = list(_records(path))
    columns = lines[0] if lines else []
    if tuple(columns) != COLUMNS:
        differ = ", ".join(sorted({*COLUMNS} ^ {*columns})) or "their order"
        raise CheckpointError(f"{path}: its columns are not those of benchmark rows; what differs: {differ}")
    return [_parsed(path, line, values) for line, values in enumerate(lines[1:], 2) if values]


def read_folder(folder: Path) -> list[Row]:
    """The rows of all files of a folder that hold such rows, or those of one file.

    Raises:
        CheckpointError: there are none.
    """
    files = [folder] if folder.is_file() else sorted(folder.glob("*.csv"))
    rows = [row for file in files if folder.is_file() or _header(file) == COLUMNS for row in read(file)]
    if not rows:
        raise CheckpointError(f"{folder}: no rows of benchmarks in it: slidesparse bench kernel --out {folder / 'kernel.csv'} writes some")
    return rows


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of rows of one card, layer, pattern and number of tokens those of the last run alone: times of two runs are not compared.

    Engines are compared within a run when it is made: of each the last ratio counts.
    """
    last: dict[tuple[object, ...], tuple[str, str]] = {}
    for row in rows:
        last[_place(row)] = row.commit, row.driver
    return [row for row in rows if last[_place(row)] == (row.commit, row.driver)]


def _place(row: Row) -> tuple[object, ...]:
    engine = row.route if row.bench == "serve" else ""
    return row.bench, row.what, row.model, row.m, row.n, row.k, row.scheme, row.pattern, row.card, engine


def _header(file: Path) -> tuple[str, ...]:
    try:
        return tuple(next(_records(file), ()))
    except CheckpointError:
        return ()  # no file of rows


def _records(path: Path) -> Iterator[list[str]]:
    """The values of each line of a table; what is not UTF-8 becomes a sign that is in no number."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        try:
            yield from csv.reader(file)
        except csv.Error as error:
            raise CheckpointError(f"{path} is no table of rows: {error}") from error


def _parsed(path: Path, line: int, found: Sequence[str]) -> Row:
    if len(found) != len(COLUMNS):
        raise CheckpointError(f"{path}, line {line}: {len(found)} values for {len(COLUMNS)} columns: remove the line")
    values = dict(zip(COLUMNS, found, strict=True))
    try:
        numbers = {name: int(values[name]) for name in _INTEGERS} | {
            name: float(values[name]) if values[name] else None for name in _NUMBERS
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}, line {line}: {error}") from error
    if values["status"] not in STATUSES:
        raise CheckpointError(f"{path}, line {line}: status {values['status']!r} is none of {', '.join(STATUSES)}")
    return Row(**(values | numbers))  # type: ignore[arg-type]  # the columns are those of the fields


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def machines(rows: Sequence[Row]) -> Iterator[str]:
    """Each machine of the rows in one line."""
    for card, driver, torch_, triton, library, commit in dict.fromkeys(
        (row.card, row.driver, row.torch, row.triton, row.cusparselt, row.commit) for row in rows
    ):
        parts = {"driver": driver, "torch": torch_, "triton": triton, "cuSPARSELt": library, "commit": commit}
        yield ", ".join([card, *(f"{name} {value}" for name, value in parts.items() if value)])
