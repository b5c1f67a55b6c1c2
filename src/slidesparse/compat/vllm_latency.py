"""vLLM's own latency benchmark, and how much memory an engine's weights take: names that its next version may move."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedError
from .versions import not_imported

try:
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.benchmarks import latency
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError as error:
    raise UnsupportedError(not_imported("vllm", error)) from error

__all__ = ["LLM", "EngineArgs", "SamplingParams", "engine_of", "latency", "model_gigabytes", "parser"]


def parser() -> Any:
    """Reads what `vllm bench latency` reads."""
    made = FlexibleArgumentParser()
    latency.add_cli_args(made)
    return made


def engine_of(words: list[str]) -> Any:
    """The engine that these arguments describe; the benchmark, which would make one at every call, gets this one."""
    made = LLM.from_engine_args(EngineArgs.from_cli_args(parser().parse_args(words)))
    LLM.from_engine_args = classmethod(lambda cls, arguments: made)
    return made


def model_gigabytes(engine: Any) -> float:
    """What the weights of an engine in this process take."""
    return float(engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model_memory_usage / 1e9)
