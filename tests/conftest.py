"""Fresh random inputs in every run; the seed is printed in the header and beside every failure, ``--seed`` repeats a run."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("slidesparse", deadline=None, print_blob=True)
hypothesis.settings.load_profile("slidesparse")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat the random inputs of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        config.option.seed = worker["seed"]
    elif config.option.seed is None:
        config.option.seed = secrets.randbelow(1 << 31)
    torch.set_num_threads(1 if worker else 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``needs_gpu`` are skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("needs_gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.option.seed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("random inputs", f"repeat with: pytest --seed {item.config.option.seed} '{item.nodeid}'"))
    return report


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr), as the system sees them."""
    from slidesparse import cli
    from slidesparse.cli import screen

    monkeypatch.setattr(screen, "_EVERY", float("inf"))  # on a slow machine lines of progress would stand between those that are asked for

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slidesparse", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> None:
    """Run the test module's ``interpreted()`` in a process of its own: Triton decides at import whether to interpret."""
    module = request.module.__name__
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import {module}; {module}.interpreted()", str(request.config.option.seed)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of this test's own: it depends on the run's seed and the test's name only."""
    # One 32-bit number from both: a generator on the CPU ignores all higher bits of its seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{request.config.option.seed} {request.node.nodeid}".encode()))


@pytest.fixture
def tiny_models(rng: torch.Generator) -> Iterator[None]:
    """Everything random follows the test's own seed; one thread, since threads wait longer for each other than tiny matrices take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(rng.initial_seed())
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the tensor-parallel rank and size that vLLM's layers believe in."""

    def set_rank(number: int, size: int) -> None:
        for module in ("vllm.model_executor.parameter", "vllm.model_executor.layers.linear"):
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: number)
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: size)

    set_rank(0, 1)
    return set_rank


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, rank: Callable) -> None:
    """As while a model is built that vLLM will compile."""
    monkeypatch.setattr("slidesparse.integrations.vllm.methods.compiles", lambda config: True)


@pytest.fixture
def bfloat16() -> Iterator[None]:
    """The default dtype while a test runs, as while vLLM loads a model."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two threads, and much slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
