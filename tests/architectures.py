"""Tiny random models of many architectures, and what they are fed; ``python tests/architectures.py`` prints what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1, 8]])
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_BERT = {key: value for key, value in TEXT.items() if key not in ("head_dim", "num_key_value_heads")}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "in_channels": 3, "spatial_merge_size": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2}
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _text(*_: Any) -> dict[str, Tensor]:
    return {"input_ids": IDS}


def _both(*_: Any) -> dict[str, Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}


def _image(count: int, token: int = 63) -> Callable[..., dict[str, Tensor]]:
    """Text with ``count`` places of an image of 8 × 8 pixels."""
    ids = torch.cat((IDS[:, :2], torch.full((1, count), token), IDS[:, 2:]), 1)
    return lambda *_: {
        "input_ids": ids,
        "pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8),
        "token_type_ids": (ids == token).long(),
    }


def _patches(*_: Any) -> dict[str, Tensor]:
    """The same for Qwen's, as rows of patches: one of 2 × 2 patches, merged into one place."""
    ids = torch.cat((IDS[:, :1], torch.tensor([[61, 63, 62]]), IDS[:, 1:]), 1)
    pixels = torch.linspace(-1, 1, 4 * 96).view(4, 96)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]]), "mm_token_type_ids": (ids == 63).int()}


def _sound(*_: Any) -> dict[str, Tensor]:
    return {"input_features": torch.linspace(-1, 1, 8 * 32).view(1, 8, 32), "decoder_input_ids": IDS[:, :4]}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, its tiny configuration, and inputs of a call."""

    kind: str
    config: str
    sizes: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[..., dict[str, Tensor]] = _text

    def build(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        """A random model whose outputs tell its weights apart."""
        kind, config = getattr(transformers, self.kind), getattr(transformers, self.config)(**self.sizes)
        try:
            model = kind._from_config(config, dtype=dtype).eval()
        except NotImplementedError:  # transformers 5.6 draws RWKV's weights by a function that torch has for 32 bits only
            model = kind._from_config(config, dtype=torch.float32).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and "norm" not in name:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
                elif parameter.dim() == 1 and name.endswith("bias"):
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        return model


def _lm(name: str, sizes: dict[str, Any] | None = None, base: dict[str, Any] = TEXT) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", base | (sizes or {}))


def _seeing(name: str, text: dict[str, Any], vision: dict[str, Any], inputs: Callable[..., dict[str, Tensor]], **more: Any) -> Architecture:
    tokens = {"image_token_id": 63, "tie_word_embeddings": text.get("tie_word_embeddings", False)}
    return Architecture(
        f"{name}ForConditionalGeneration", f"{name}Config", tokens | more | {"text_config": TEXT | text, "vision_config": vision}, inputs
    )


_QWEN_TOKENS = {"vision_start_token_id": 61, "vision_end_token_id": 62, "video_token_id": 60}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _lm("Llama"),
    "llama-tied": _lm("Llama", {"tie_word_embeddings": True}),
    "mistral": _lm("Mistral"),
    "qwen2": _lm("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": _lm("Qwen3"),
    "gemma2": _lm("Gemma2", {"tie_word_embeddings": True}),
    "phi3": _lm("Phi3"),
    "granite": _lm("Granite"),
    "cohere": _lm("Cohere", {"tie_word_embeddings": True}),
    "olmo2": _lm("Olmo2"),
    "stablelm": _lm("StableLm", {"num_key_value_heads": 2}),
    "opt": _lm("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16, "tie_word_embeddings": True}, _BERT),
    "gpt-neox": _lm("GPTNeoX", {}, _BERT),
    "falcon": _lm("Falcon", {"bias": True, "new_decoder_architecture": False}, _BERT),
    "bloom": _lm("Bloom", {"n_layer": 2, "n_head": 2, "tie_word_embeddings": True}, _BERT),
    "mamba": _lm("Mamba", {"state_size": 8, "time_step_rank": 8, "intermediate_size": 64, "tie_word_embeddings": True}, _BERT),
    "rwkv": _lm("Rwkv", {"attention_hidden_size": 32, "context_length": 64}, _BERT),
    "mixtral": _lm("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": _lm("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 40, **_EXPERTS}),
    "qwen3-moe": _lm("Qwen3Moe", {"num_experts": 4, **_EXPERTS}),
    "deepseek-v3": _lm(
        "DeepseekV3",
        {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **_EXPERTS, **_LATENT, "head_dim": 8},
    ),
    "llama4-text": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 16, "no_rope_layers": None},
    ),
    "dbrx": Architecture(
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": 64,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
            # Of one size: transformers 5.6 takes the experts' width for the model's.
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "modernbert-decoder": _lm(
        "ModernBertDecoder", {"tie_word_embeddings": True, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}, _BERT
    ),
    "gemma3": _seeing(
        "Gemma3",
        {
            "tie_word_embeddings": True,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        _VISION,
        _image(4),
        mm_tokens_per_image=4,
        image_token_index=63,
        boi_token_index=61,
        eoi_token_index=62,
    ),
    "llava": _seeing("Llava", {"model_type": "llama"}, _VISION | {"model_type": "clip_vision_model"}, _image(4), image_token_index=63),
    "paligemma": _seeing(
        "PaliGemma",
        {"model_type": "gemma", "tie_word_embeddings": True},
        _VISION | {"model_type": "siglip_vision_model", "projection_dim": 32},
        _image(4),
        image_token_index=63,
        projection_dim=32,
    ),
    "qwen2-vl": _seeing(
        "Qwen2VL",
        {"rope_parameters": _MROPE, "rope_scaling": _MROPE},
        _QWEN_VISION | {"embed_dim": 32, "hidden_size": 32, "temporal_patch_size": 2},
        _patches,
        **_QWEN_TOKENS,
    ),
    "qwen2.5-vl": _seeing(
        "Qwen2_5_VL",
        {"rope_parameters": _MROPE, "rope_scaling": _MROPE, "tie_word_embeddings": True},
        _QWEN_VISION
        | {"intermediate_size": 48, "out_hidden_size": 32, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [0]},
        _patches,
        **_QWEN_TOKENS,
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        _both,
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        _sound,
    ),
    "bert": Architecture("BertForMaskedLM", "BertConfig", _BERT | {"tie_word_embeddings": True}),
    "bert-classifier": Architecture("BertForSequenceClassification", "BertConfig", _BERT | {"num_labels": 3}),
}


@torch.no_grad()
def outputs(model: nn.Module, architecture: Architecture) -> Tensor:
    """What a call gives, float32."""
    dtype = next(model.parameters()).dtype
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in architecture.inputs().items()}
    if "token_type_ids" in given and not any(word in architecture.kind for word in ("Gemma3", "PaliGemma")):
        given.pop("token_type_ids")
    return model(**given).logits.float()


def apart(a: Tensor, b: Tensor) -> float:
    """Relative difference; infinite where anything is not finite, or not of one shape."""
    if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return float((a - b).norm() / a.norm().clamp(min=1e-9))


@dataclass
class Outcome:
    """How far packed form and twin are from the masked model, of 16 and of 8 bits (or why there is none), and the layers converted."""

    layers: list[str]
    packed: float
    twin: float
    packed_int8: float
    twin_int8: float | str


def run(name: str, folder: Path, *, twin_int8: bool = True) -> Outcome:
    """Prune a model, convert it to both forms with 16 and 8 bits, and load all of them, the twin of 8 bits if that is asked for.

    The twins are loaded as stock transformers does; what it made up or left out raises.
    """
    import slidesparse.integrations.transformers  # noqa: F401 - registers the packed form
    from slidesparse import Pattern, Recipe, convert
    from slidesparse.errors import UnsupportedError

    architecture, six = ARCHITECTURES[name], Pattern.parse("6:8")
    architecture.build().save_pretrained(folder / "dense")
    report = convert(folder / "dense", folder / "masked", Recipe(six, "magnitude", form="dense"))
    expected = outputs(load(architecture, folder / "masked"), architecture)
    if apart(expected, outputs(load(architecture, folder / "dense"), architecture)) == 0.0:
        raise ValueError(f"{name}: pruning changes nothing that the outputs show")
    found = []
    for scheme in (None, "int8"):
        for form in ("packed", "dense"):
            out = folder / f"{form}-{scheme}"
            try:
                convert(folder / "dense", out, Recipe(six, "magnitude", scheme, form))
            except UnsupportedError as refusal:
                found.append(str(refusal))
            else:
                asked = twin_int8 or out.name != "dense-int8"
                found.append(apart(expected, outputs(load(architecture, out), architecture)) if asked else "not loaded")
    return Outcome([layer.name for layer in report.layers], *found)


def load(architecture: Architecture, folder: Path) -> Any:
    """The model as ``from_pretrained`` gives it.

    Raises:
        ValueError: tensors are missing or left over.
    """
    model, told = getattr(transformers, architecture.kind).from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(map(str, told[kind]))[:3] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[kind]}
    if wrong:
        raise ValueError(f"{folder.name}: {wrong}")
    return model.eval()


if __name__ == "__main__":
    import sys
    import tempfile
    import time

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"{'architecture':20} layers   packed     twin  packed8   twin8   seconds")
    for each in sys.argv[1:] or ARCHITECTURES:
        torch.manual_seed(0)
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            try:
                got = run(each, Path(temporary))
                told = got.twin_int8 if isinstance(got.twin_int8, str) else f"{got.twin_int8:8.4f}"
                row = f"{len(got.layers):6} {got.packed:8.4f} {got.twin:8.4f} {got.packed_int8:8.4f} {told:>8}"
            except Exception as error:  # a table has a row for everything
                row = f"{type(error).__name__}: {' '.join(str(error).split())[:260]}"
        print(f"{each:20} {row} {time.perf_counter() - begun:6.1f}", flush=True)
