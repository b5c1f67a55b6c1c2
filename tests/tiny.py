"""Tiny random transformers models on disk, what to calibrate them on, and recipes for both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from slidesparse import Pattern, Recipe
from slidesparse.checkpoint import Calibration

SIX = Pattern.parse("6:8")
WORDS = 96
"""Tokens that the models know."""
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 52,  # the last group of 6:8 is ragged
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 16, "sliding_window": 8, "head_dim": 16, "layer_types": None}),
    "phi": ("PhiConfig", {"num_key_value_heads": 2}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": False, "bias": True}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 2}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-projected": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "qwen2-moe": ("Qwen2MoeConfig", {"num_experts": 4, "shared_expert_intermediate_size": 40, **_EXPERTS}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "intermediate_size": 64}),
    "mamba": ("MambaConfig", {"state_size": 8, "intermediate_size": 64}),
    "bert": ("BertConfig", {}),
}


def config(family: str, **changes: object) -> transformers.PretrainedConfig:
    """A configuration of an architecture; gemma3 has blocks of both kinds of attention."""
    kind, extra = FAMILIES[family]
    sizes = _SIZES | extra | changes
    if "layer_types" in sizes:
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * (sizes["num_hidden_layers"] // 2)
    return getattr(transformers, kind)(**sizes)


def build(path: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
    """A random model, saved as the hub has it, without a tokenizer."""
    model = transformers.AutoModelForCausalLM.from_config(config(family, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1 if parameter.dim() == 1 else 0))
    model.save_pretrained(path)
    return path


def token_ids(path: Path, samples: int = 12, length: int = 24, words: int = WORDS) -> str:
    """A file of random token ids. Of few words, the samples held out are much like the others, so that what fits these fits those."""
    np.save(path, torch.randint(3, words, (samples, length)).numpy())
    return str(path)


def add_tokenizer(model: Path) -> None:
    """Give a model a tokenizer of words ``w3 … w95``, which puts nothing before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"?": 0} | {f"w{word}": word for word in range(3, WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(model)


def recipe(method: str, source: str, *, samples: int = 12, length: int = 24, pattern: Pattern = SIX, **more: object) -> Recipe:
    """6:8 in dense form, if not told otherwise."""
    return Recipe(pattern, method, calibration=Calibration(source, samples, length), **{"form": "dense"} | more)
