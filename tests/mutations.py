"""Break the code in small ways and see which changes no test notices: ``python -m tests.mutations [--sample N] [--seed S] [ROOM ...]``.

Changes are made in a copy of the tree. Without rooms those of `KNOWN`, which were found to survive once, are tried; with rooms random ones:
comparisons, numbers, operators and conditions of a room's modules. `make mutate` runs both. A survivor is a missing test, or a change that
means nothing.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SOURCE = Path("src/slidesparse")

ROOMS = {
    "pattern": (["pattern.py"], ["pattern", "format", "reference"]),
    "format": (["format.py"], ["format", "convert", "nn", "state"]),
    "packing": (["packing"], ["pack", "bitmask", "sharding", "format"]),
    "plan": (["gemm/plan.py", "gemm/choose.py", "gemm/route.py"], ["plan", "choose", "layouts", "frozen_choices"]),
    "quantization": (["quantization.py"], ["quant", "nvfp4", "rounding", "reference"]),
}
"""Modules, and tests that are about them."""

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


class Mutation(NamedTuple):
    """A text of a file, what stands there instead, and the tests that should notice."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]


KNOWN = (
    Mutation("gemm/tune.py", "*expected(draw), roundings=roundings)", "*expected(draw))", ("tune",)),
    Mutation("gemm/tune.py", "torch.cat([x[:_CHECKED_ROWS], x[-_CHECKED_ROWS:]])", "x[: 2 * _CHECKED_ROWS]", ("tune",)),
    Mutation("gemm/tune.py", "for draw, call in enumerate(calls[:2])", "for draw, call in enumerate(calls[:1])", ("tune",)),
    Mutation("gemm/tune.py", "fcntl.flock(folder, fcntl.LOCK_EX)", "pass", ("tune",)),
    Mutation("gemm/op.py", "runner.behind(normed, bias)", "runner.behind(normed)", ("behind",)),
    Mutation("gemm/op.py", "gate_up.unflatten(1, (2, -1))", "gate_up.unflatten(1, (1, -1))", ("behind",)),
    Mutation("gemm/runner.py", "(bias.shape == (ready.problem.n,) and bias", "(bias", ("pipeline",)),
    Mutation("checkpoint/transform.py", "{recipe.seed}/{plan.layer.name}/{block.first}", "{recipe.seed}", ("convert",)),
    Mutation("checkpoint/transform.py", "{plan.layer.name}/{block.first}", "{plan.layer.name}", ("convert",)),
    Mutation("checkpoint/staging.py", "os.fsync(file.fileno())", "pass", ("convert", "outputs")),
    Mutation("checkpoint/tensorfile.py", "os.fsync(self._file)", "pass", ("convert", "outputs")),
    Mutation("nn/pack_model.py", "matches(name, list(ignore))", "False", ("nn",)),
    Mutation("nn/source.py", " or module._forward_pre_hooks", "", ("nn",)),
    Mutation("evaluate/generation.py", ">= vocabulary", "> vocabulary", ("evaluate",)),
    Mutation("env.py", 'Path.home() / ".cache"', "Path.home()", ("plan",)),
    Mutation("env.py", 'os.environ.get("XDG_CACHE_HOME") or ', "", ("plan",)),
    Mutation("gemm/choose.py", "at >= m)", "at > m)", ("choose",)),
    Mutation("measure.py", "repeat * len(variants[name]) for", "len(variants[name]) for", ("measure",)),
    Mutation("ops/kernels_quantize.py", "fma(x32, high + tl.zeros_like(x32), x32 * low)", "fma(x32, high, 0.0)", ("compiled_branches",)),
    Mutation("ops/kernels_quantize.py", "max.u16x2 $0", "min.u16x2 $0", ("compiled_branches",)),
    Mutation("ops/kernels_quantize.py", "quotient.to(tl.float8e4nv)", "quotient.to(tl.float8e5)", ("compiled_branches",)),
    Mutation("ops/kernels_fused.py", "[1.0 + power]", "[2.0 + power]", ("compiled_branches",)),
    Mutation("ops/kernels_fused.py", '"mul.rn.bf16x2 $0', '"add.rn.bf16x2 $0', ("compiled_branches",)),
)
"""Changes that survived a review of the tests."""


class _Places(ast.NodeTransformer):
    """Counts the places of a module that can be changed, and changes the one of number ``chosen``."""

    def __init__(self, chosen: int = -1) -> None:
        self.chosen, self.seen, self.told = chosen, 0, ""

    def _here(self, node: ast.AST, what: str) -> bool:
        self.seen += 1
        if self.seen - 1 == self.chosen:
            self.told = f"line {node.lineno}: {what} in {ast.unparse(node)[:90]}"
        return self.seen - 1 == self.chosen

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        for number, operator in enumerate(node.ops):
            if type(operator) in SWAPS and self._here(node, f"{type(operator).__name__} → {SWAPS[type(operator)].__name__}"):
                node.ops[number] = SWAPS[type(operator)]()
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if type(node.op) in SWAPS and self._here(node, f"{type(node.op).__name__} → {SWAPS[type(node.op)].__name__}"):
            node.op = SWAPS[type(node.op)]()
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        if self._here(node, f"{type(node.op).__name__} → {SWAPS[type(node.op)].__name__}"):
            node.op = SWAPS[type(node.op)]()
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return node.operand if isinstance(node.op, ast.Not) and self._here(node, "not → nothing") else node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) is int and self._here(node, f"{node.value} → {node.value + 1}"):
            return ast.copy_location(ast.Constant(node.value + 1), node)
        if type(node.value) is bool and self._here(node, f"{node.value} → {not node.value}"):
            return ast.copy_location(ast.Constant(not node.value), node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if self._here(node.test, "if → if not"):
            node.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node  # words of messages are nobody's promise


def random_ones(room: str, count: int, chance: random.Random) -> Iterator[tuple[Mutation, str]]:
    """So many changes of a room, each a whole file, with a line that says what they are."""
    names, tests = ROOMS[room]
    paths = [path for name in names for path in ([ROOT / SOURCE / name] if name.endswith(".py") else (ROOT / SOURCE / name).glob("*.py"))]
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(paths)}
    places = []
    for path, text in texts.items():
        counter = _Places()
        counter.visit(ast.parse(text))
        places += [(path, number) for number in range(counter.seen)]
    for path, number in chance.sample(places, min(count, len(places))):
        change = _Places(number)
        changed = ast.unparse(ast.fix_missing_locations(change.visit(ast.parse(texts[path]))))
        name = str(path.relative_to(ROOT / SOURCE))
        yield Mutation(name, texts[path], changed, tuple(tests)), f"{name} {change.told}"


def survives(mutation: Mutation, copy: Path) -> bool:
    """Whether the tests pass with the change, made in a copy of the tree.

    Raises:
        ValueError: the text is not there.
    """
    path = copy / SOURCE / mutation.path
    text = path.read_text(encoding="utf-8")
    if mutation.old not in text:
        raise ValueError(f"{mutation.path} does not hold {mutation.old!r}: bring the list up to date")
    path.write_text(text.replace(mutation.old, mutation.new, 1), encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in mutation.tests)]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, check=False, timeout=900)
    except subprocess.TimeoutExpired:
        return False  # a loop without an end is noticed
    finally:
        path.write_text(text, encoding="utf-8")
    return done.returncode == 0


def main() -> int:
    """Try the changes, print those that survive, and return 1 if one of `KNOWN` does."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("rooms", nargs="*", choices=[*ROOMS, []], help="random changes of these rooms; the known ones without")
    parser.add_argument("--sample", type=int, default=20, help="so many changes of every room")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    asked, left = parser.parse_args(), 0
    tried = [(one, f"{one.path} {one.old} → {one.new or 'nothing'}") for one in KNOWN]
    if asked.rooms:
        chance = random.Random(asked.seed)
        tried = [item for room in asked.rooms for item in random_ones(room, asked.sample, chance)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("src", "tests", "examples", "docs", "benchmarks", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "mkdocs.yml", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"):
            shutil.copy(ROOT / name, copy / name)
        for mutation, told in tried:
            if survives(mutation, copy):
                left += 1
                print(f"survives: {told}", flush=True)
    print(f"{len(tried)} changes, {left} survive" + (f", seed {asked.seed}" if asked.rooms else ""))
    return int(left > 0 and not asked.rooms)


if __name__ == "__main__":
    sys.exit(main())
