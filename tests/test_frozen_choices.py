"""The shipped plans choose what they chose when `freeze_choices` wrote it down: a choice that changes is seen, with its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import freeze_choices
from slidesparse.gemm import Plan

SHOWN = 400


def kept(path: Path) -> freeze_choices.Frozen:
    return json.loads(freeze_choices.data_file(path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", freeze_choices.PLANS, ids=lambda path: path.stem)
def test_the_shipped_plans_choose_what_they_chose(path: Path) -> None:
    lines = freeze_choices.report(kept(path), json.loads(freeze_choices.as_json(freeze_choices.frozen(path))), Plan.load(path))
    more = [f"… {len(lines) - SHOWN} lines more: python tests/freeze_choices.py --check"] if len(lines) > SHOWN else []
    assert not lines, "\n".join(["if this is meant: python tests/freeze_choices.py", *lines[:SHOWN], *more])


def test_there_is_data_of_every_plan_and_of_no_other() -> None:
    assert {freeze_choices.data_file(path) for path in freeze_choices.PLANS} == set(freeze_choices.DATA.glob("choices-*.json"))
    assert len(freeze_choices.PLANS) == 2


def test_what_differs_is_shown_with_its_times() -> None:
    path = freeze_choices.PLANS[0]
    before, after, plan = kept(path), kept(path), Plan.load(path)
    assert freeze_choices.report(before, after, plan) == []
    layer = next(name for name, rows in after["cells"].items() if name.endswith(" whole") and rows[-1][3] != rows[-1][1])
    row = after["cells"][layer][-1]
    m, dense, dense_us, sparse, sparse_us, *_ = row
    row[3:5] = dense, dense_us
    served = next(name for name, parts in after["adapter"].items() if len(parts["down_proj"].get("ours", [])) > 1)
    _, first = after["adapter"][served]["down_proj"]["ours"][0]
    after["adapter"][served]["down_proj"] = {"vLLM's": "the test says so"}
    after["inspect"]["Qwen2.5-7B 6:8 int8"][0] = "another line"
    lines = [" ".join(line.split()) for line in freeze_choices.report(before, after, plan)]
    assert f"{layer} M={m} {sparse} {sparse_us:.2f} {dense_us:.2f} {dense} {dense_us:.2f} {dense_us:.2f}" in lines
    assert any(line.startswith(f"{served}, down_proj: ours") and "the test says so" in line for line in lines)
    assert any(line.startswith(f"{served}, down_proj M=") and f" {first} " in line and " vLLM's " in line for line in lines)
    assert "+another line" in lines and any("geometric mean" in line for line in lines)


def test_routes_stay_apart_when_they_are_shortened() -> None:
    for path in freeze_choices.PLANS:
        plan = Plan.load(path)
        routes = {route for key in plan.cells for route in plan.routes(key)}
        assert len({freeze_choices.short(route) for route in routes}) == len(routes) > 50
    assert freeze_choices.short("not measured: dense runs") == "not measured: dense runs"
