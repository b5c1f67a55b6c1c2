"""Versions of kernels: code counts, everything else does not, and shipped plans are of the kernels as they are."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

import pytest

from slidesparse.gemm import Plan, plans, versions
from slidesparse.gemm.kernels import kernels as table
from slidesparse.gemm.versions import kernel_versions, stripped

SOURCE = '''"""What it does."""

import torch  # the library


def run(x: torch.Tensor, *, rows: int = 16) -> torch.Tensor:
    """Run it."""
    # why
    if rows > 16:
        return x[:rows] * 2
    return x


class Kernel:
    """A kernel."""

    name = "one"
    """Its name."""
'''
once = cache(stripped)
MODULES = sorted(name for name in {module for kernel in table().values() for module in kernel.code} if not name.endswith(".cu"))


def text_of(module: str) -> str:
    *folders, name = module.split(".")
    return (resources.files(".".join(("slidesparse", *folders))) / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda source: source.replace('"""What it does."""', '"""What it does, in other words."""'),
        lambda source: source.replace('"""What it does."""\n', ""),
        lambda source: source.replace('    """Its name."""\n', ""),
        lambda source: source.replace("  # the library", "").replace("    # why\n", "    # another reason\n"),
        lambda source: source.replace("\n\n\n", "\n\n\n\n").replace('"one"', "'one'"),
        lambda source: source.replace("x: torch.Tensor, *, rows: int = 16", "\n    x: torch.Tensor,\n    *,\n    rows: int = 16,\n"),
        lambda source: source.replace("x[:rows] * 2", "(x[:rows]) * (2)").replace("= 16", "= 0x10"),
    ],
)
def test_words_and_formatting_do_not_count(change) -> None:
    assert change(SOURCE) != SOURCE and stripped(change(SOURCE)) == stripped(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rows > 16", "rows >= 16"), ("rows: int = 16", "rows: int = 17"), ("* 2", "* 2.0"), ('"one"', 'b"one"'), ('"one"', "None"),
        ("import torch", "import torch as t"), ("return x\n", "return +x\n"), ("    return x\n", "    return\n"), ("*, rows", "rows"),
        ("def run", "async def run"), ("class Kernel", "class Other"), ("x[:rows]", "x[rows:]"),
    ],
)  # fmt: skip
def test_any_change_of_code_counts(old: str, new: str) -> None:
    assert old in SOURCE and stripped(SOURCE.replace(old, new, 1)) != stripped(SOURCE)


def test_a_body_may_hold_nothing_but_words() -> None:
    assert stripped('def run():\n    """Nothing."""') == stripped("def run():\n    ...") != stripped("def run():\n    return")


@pytest.mark.parametrize("module", MODULES)
def test_every_module_that_a_kernel_names_is_there_and_a_change_of_it_is_noticed(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of(module)
    names = [name for name, kernel in table().items() if module in kernel.code]
    before, others = kernel_versions(), [name for name in table() if name not in names]
    constant = re.search(r"^[A-Z_]+(?::.*?)? = ", text, re.MULTILINE)
    changed = text + "\nADDED = 1\n" if constant is None else text[: constant.start()] + "ADDED = 1\n" + text[constant.start() :]
    commented = text + "\n# a remark\n"
    for source, differ in ((changed, names), (commented, [])):
        monkeypatch.setattr(versions, "stripped", lambda found, source=source: once(source if found == text else found))
        versions._version.cache_clear()
        now = kernel_versions()
        assert [name for name in table() if now[name] != before[name]] == differ and all(now[name] == before[name] for name in others)
    monkeypatch.undo()
    versions._version.cache_clear()


def test_the_authors_number_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernel_versions()["cusparselt"]
    monkeypatch.setattr(type(table()["cusparselt"]), "version", 2)
    now = kernel_versions()["cusparselt"]
    assert now != before and now.partition("-")[2] == before.partition("-")[2] and (before[0], now[0]) == ("1", "2")


def test_cuda_code_counts_and_its_comments_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    text, before, strip = "int a;  // one\n  int b;", kernel_versions(), versions._cuda_stripped
    assert strip(text) == strip("int a; int b; // two") != strip("int a; int c;")
    monkeypatch.setattr(versions, "_cuda_stripped", lambda source: strip(source) + "int added;")
    versions._version.cache_clear()
    now = kernel_versions()
    assert [name for name in table() if now[name] != before[name]] == ["sm90"]
    monkeypatch.undo()
    versions._version.cache_clear()


def test_kernels_name_the_code_that_runs_on_the_card() -> None:
    """Every module with Triton kernels that a plan's times hold is part of a version."""
    for name, kernel in table().items():
        assert kernel.code, name
        assert type(kernel).__module__.removeprefix("slidesparse.") in kernel.code, name
        if name not in ("native", "exact64"):
            assert "ops.kernels_quantize" in kernel.code, f"{name} quantises activations"
    assert "ops.kernels_w8a8" in table()["triton"].code


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_shipped_plans_are_of_these_kernels(gpu: str) -> None:
    path, now = plans._shipped(gpu), kernel_versions()
    found = {}
    for cells in Plan.load(path).cells.values():
        for cell in cells.values():
            found |= {name: (version, now[name]) for name, version in cell.versions.items() if now.get(name, version) != version}
    told = "; ".join(f"{name} is {here} here, {there} there" for name, (there, here) in sorted(found.items()))
    assert not found, (
        f"{path.name} was measured with other kernels ({told}), whose times are not used: measure again, `slidesparse tune`. If the change "
        'cannot alter times, rewrite the versions in the "kernels" line of the plan, and say in the commit why it cannot.'
    )
