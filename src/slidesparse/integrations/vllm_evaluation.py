"""Scoring a text by vLLM, and lm-eval's model object that runs a checkpoint in vLLM; our plugin is found by vLLM itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat.versions import check_vllm
from ..errors import EvaluationError, UnsupportedError
from ..evaluate.windows import check_windows, windows

try:
    import vllm
except ImportError as error:
    raise UnsupportedError(f"runtime vllm needs vLLM, which cannot be imported ({error}): pip install 'slidesparse[vllm]'") from error

ENGINE = {"dtype": "auto", "max_num_batched_tokens": 4096, "gpu_memory_utilization": 0.85}
"""Log-probabilities of a prompt need memory that vLLM does not plan for: float32 logits of every token of a step."""
REQUESTS = 64
"""Windows handed over at a time."""


def open_engine(path: Path, *, context: int) -> Any:
    """An engine for texts in windows of ``context`` tokens."""
    check_vllm(vllm.__version__)
    return vllm.LLM(model=str(path), max_model_len=context + 1, **ENGINE)


def open_runner(path: Path) -> Any:
    """lm-eval's model object; its engine is under ``model``."""
    check_vllm(vllm.__version__)
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(pretrained=str(path), batch_size="auto", **ENGINE)


def close(engine: Any) -> None:
    """Stop the engine, so that its memory is free for the next one."""
    engine.llm_engine.engine_core.shutdown()
    gc.collect()
    torch.cuda.empty_cache()


def text_losses(engine: Any, token_ids: Tensor, *, context: int, stride: int, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Losses float64 ``[tokens]``, in nats, of the tokens that `slidesparse.evaluate.perplexity` scores, in the same windows.

    Raises:
        ValueError: see `check_windows`.
        EvaluationError: windows longer than the engine takes.
    """
    ids = check_windows(token_ids, context, stride)
    room = engine.llm_engine.model_config.max_model_len - 1
    if min(context, ids.numel()) > room:
        raise EvaluationError(f"vLLM generates a token behind each window: --context can be {room} at most with this model, not {context}")
    asking = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    todo = list(windows(ids.numel(), context, stride))
    found: list[float] = []
    for start in range(0, len(todo), REQUESTS):
        part = todo[start : start + REQUESTS]
        prompts = [ids[begin:end].tolist() for begin, end, _ in part]
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], asking, use_tqdm=False)
        for answer, prompt, (_, _, first) in zip(answers, prompts, part, strict=True):
            found += [-each[token].logprob for each, token in zip(answer.prompt_logprobs[first:], prompt[first:], strict=True)]
        if progress is not None:
            progress(part[-1][1], ids.numel())
    return torch.tensor(found, dtype=torch.float64)
