"""Continuing a prompt, and turning a text file into tokens, with any model and tokenizer of transformers' interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError


def complete(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, temperature: float = 0.0, chat: bool = False, seed: int = 0
) -> str:
    """The text that follows ``prompt``, without it: greedy at temperature 0, sampled from ``seed`` on otherwise.

    Raises:
        CheckpointError: ``chat`` without a chat template or with one that fails, or more tokens than the model has positions for.
        ValueError: a prompt that holds no token.
    """
    check_predicts(model)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise CheckpointError("the model has no chat template: leave out --chat")
    if chat:
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": prompt}]
        try:
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        except TemplateError as error:
            raise CheckpointError(f"the model's chat template fails: {error}: mend it, or leave out --chat") from error
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("the prompt holds no token: give some text")
    answers = bool(getattr(model.config, "is_encoder_decoder", False))  # in a sequence of their own
    check_fits(model, inputs["input_ids"], max(length, max_new_tokens) if answers else length + max_new_tokens)
    sampling = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    return tokenizer.decode(tokens[0, 0 if answers else length :], skip_special_tokens=True)


def check_predicts(model: Any, *, text: bool = False) -> None:
    """Whether a model continues text, and, where a ``text`` is to be scored, reads it as one sequence.

    Raises:
        CheckpointError: it does not; the message names its class.
    """
    kind, reads = type(model).__name__, getattr(model, "main_input_name", "input_ids")
    if not getattr(model, "can_generate", lambda: True)():
        raise CheckpointError(f"{kind} continues no text: generate and eval need a model with a language-model head")
    if reads != "input_ids":
        raise CheckpointError(f"{kind} reads {reads}, not text: generate and eval need a model that continues text")
    if text and getattr(model.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{kind} reads text with an encoder: perplexity is that of a model that only continues it")


def tokenize_file(tokenizer: Any, path: str | Path, *, max_tokens: int | None = None) -> Tensor:
    """Tokens int64 ``[T]`` of a UTF-8 text file, special tokens as the tokenizer adds them, at most ``max_tokens``.

    Raises:
        CheckpointError: the file cannot be read, is not UTF-8, or holds fewer than two tokens.
    """
    tokens = tokenizer(read_text(path), return_tensors="pt", verbose=False)["input_ids"][0][:max_tokens]
    if tokens.numel() < 2:
        raise CheckpointError(f"{path} holds {tokens.numel()} tokens: perplexity needs at least 2")
    return tokens


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        CheckpointError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def check_fits(model: Any, ids: Tensor, length: int) -> None:
    """Whether ``length`` tokens at a time, these among them, are within the model's positions and vocabulary.

    Raises:
        CheckpointError: they are not; the message names both numbers.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    positions, vocabulary = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    if positions and length > positions:
        raise CheckpointError(f"{length} tokens at a time are more than the model's {positions} positions: ask for fewer")
    if vocabulary and ids.numel() and int(ids.max()) >= vocabulary:
        raise CheckpointError(f"the tokenizer gives token {int(ids.max())}, the model knows {vocabulary}: they do not belong together")
