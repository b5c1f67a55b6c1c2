"""The shipped plans choose what they chose when `freeze_choices` wrote it down: a choice that changes is seen, with its times."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import freeze_choices

SHOWN = 400


def kept(path: Path) -> freeze_choices.Frozen:
    return json.loads(freeze_choices.data_file(path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", freeze_choices.PLANS, ids=lambda path: path.stem)
def test_the_shipped_plans_choose_what_they_chose(path: Path) -> None:
    lines = freeze_choices.report(kept(path), json.loads(freeze_choices.as_json(freeze_choices.frozen(path))))
    more = [f"… {len(lines) - SHOWN} lines more: python tests/freeze_choices.py --check"] if len(lines) > SHOWN else []
    assert not lines, "\n".join(["if this is meant: python tests/freeze_choices.py", *lines[:SHOWN], *more])


def test_there_is_data_of_every_plan_and_of_no_other() -> None:
    assert {freeze_choices.data_file(path) for path in freeze_choices.PLANS} == set(freeze_choices.DATA.glob("choices-*.json"))
    assert len(freeze_choices.PLANS) == 2


def test_what_differs_is_shown_with_its_times(tmp_path: Path) -> None:
    path = freeze_choices.PLANS[0]
    before, after = kept(path), kept(path)
    assert freeze_choices.report(before, after) == [] == freeze_choices.changes(before, after)
    name = next(name for name, rows in after["cells"].items() if name + "out" in after["cells"] and rows[-1][3] != rows[-1][1])
    m, dense, dense_us, slid, slid_us, *_ = row = after["cells"][name][-1]
    row[3:5] = dense, dense_us
    after["keeps"][name] = ["dense", 1.0]
    served = next(name for name, parts in after["adapter"].items() if isinstance(parts["down_proj"], list))
    after["adapter"][served]["down_proj"] = "the test says so"
    after["measured"] = "another day"
    lines = freeze_choices.report(before, after)
    layer, _, form = name.rpartition(" ")
    assert lines[0] == f"{path.name}: 1 cells differ"
    assert lines[2].split("\t") == [path.stem, layer, form, str(m), "fast", slid, str(slid_us), dense, str(dense_us), str(dense_us)]
    assert lines[3] == f"1 of them run in {dense_us / slid_us:.4f} of the time (geometric mean)"
    assert any(line.startswith(f"keeps {name}, : ") and line.endswith("['dense', 1.0]") for line in lines)
    assert any(line.startswith(f"adapter {served}, down_proj: [") and line.endswith(" → the test says so") for line in lines)
    assert "another day" in lines[-1] and len(lines) == 7
    freeze_choices.write_csv(tmp_path / "changes.csv", freeze_choices.changes(before, after))
    header, only = list(csv.reader((tmp_path / "changes.csv").open(encoding="utf-8")))
    assert ",".join(header) == "gpu,layer,form,M,memory,before,before_us,after,after_us,best_dense_us" and only == lines[2].split("\t")


def test_without_vllms_kernels_is_told_where_that_differs_and_else_taken_from_what_is_told() -> None:
    """A change counts for processes without vLLM too, unless they are told apart."""
    path = freeze_choices.PLANS[0]
    after = kept(path)
    alike = next(name for name in after["cells"] if name.endswith(" with") and name + "out" not in after["cells"])
    apart = next(name for name in after["cells"] if name.endswith(" without"))
    for name in (alike, apart):
        after["cells"][name][0][4] *= 2
    found = {(one.layer, one.form, one.memory) for one in freeze_choices.changes(kept(path), after)}
    both = {(alike.removesuffix(" with"), form, "fast") for form in ("with", "without")}
    assert found == both | {(apart.removesuffix(" without"), "without", "fast")}


@pytest.mark.parametrize("path", freeze_choices.PLANS, ids=lambda path: path.stem)
def test_nothing_that_stays_is_of_another_layout_than_what_runs(path: Path) -> None:
    data = kept(path)
    for name, rows in data["cells"].items():
        *layouts, nbytes = data["keeps"][name]
        assert {row[3].partition(":")[0] for row in rows} <= set(layouts) and 0 < nbytes <= 1.25, name
        assert {row[5].partition(":")[0] for row in rows} == {"packed"}, name
