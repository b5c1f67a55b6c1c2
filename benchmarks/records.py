"""What every benchmark writes: one CSV row per figure, with the machine and the commit in front."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slidesparse.gemm.machine import this_machine


@contextmanager
def records(path: str | Path, commit: str) -> Iterator[Callable[[dict[str, object]], None]]:
    """A CSV file as the function that adds a row to it; an interrupted run keeps its rows, and the first one names the columns."""
    here = this_machine()
    head = {"date": datetime.date.today().isoformat(), "commit": commit, "gpu": here.gpu, "driver": here.driver}
    head |= {"cuda": here.cuda, "torch": here.torch, "cusparselt": here.cusparselt}
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter | None = None

        def add(row: dict[str, object]) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, head | row, lineterminator="\n")
                writer.writeheader()
            writer.writerow(head | row)
            file.flush()

        yield add
