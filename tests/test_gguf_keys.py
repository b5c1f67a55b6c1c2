"""Every key of a GGUF file counts: it shapes the model, or it is named; what the class cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slidesparse.errors import CheckpointError

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from slidesparse.integrations.gguf import import_gguf  # noqa: E402 - only where gguf is installed
from test_gguf import HIDDEN, INNER, TOKENS, config_of, write_gguf  # noqa: E402

ROWS = len(TOKENS)
HEAD = HIDDEN // 2
VECTORS = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
OUTER: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (ROWS, HIDDEN),
    "output.weight": (ROWS, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, INNER),
    **{name: (HIDDEN,) for name in VECTORS},
}
PHI3 = OUTER | {"blk.0.attn_qkv.weight": (3 * HIDDEN, HIDDEN), "blk.0.attn_output.weight": (HIDDEN, HIDDEN)}
PHI3 |= {"blk.0.ffn_up.weight": (2 * INNER, HIDDEN)}
QWEN = OUTER | {f"blk.0.ffn_{name}.weight": (INNER, HIDDEN) for name in ("gate", "up")}
QWEN2 = QWEN | {f"blk.0.attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
QWEN2 |= {f"blk.0.attn_{name}.bias": (HIDDEN,) for name in "qkv"}


def write(path: Path, architecture: str, tensors: dict[str, tuple[int, ...]], more: Callable[[gguf.GGUFWriter], None]) -> Path:
    """One block of an architecture, of random float32 weights."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (ROWS - 3)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_pad_token_id(0)
    more(writer)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loads(out: Path) -> bool:
    """Whether transformers reads the checkpoint with nothing missing, left over or of another shape."""
    from transformers import AutoModelForCausalLM

    _, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    return not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_rope_turns_as_many_dimensions_as_the_file_says(tmp_path: Path) -> None:
    path = write(tmp_path / "phi3.gguf", "phi3", PHI3, lambda writer: writer.add_rope_dimension_count(HEAD * 3 // 4))
    out = import_gguf(path, tmp_path / "dense")
    assert config_of(out)["rope_parameters"]["partial_rotary_factor"] == 0.75 and loads(out)
    path = write(tmp_path / "qwen2.gguf", "qwen2", QWEN2, lambda writer: writer.add_rope_dimension_count(HEAD // 2))
    with pytest.raises(CheckpointError, match="rope turns 16 dimensions of each head"):
        import_gguf(path, tmp_path / "out")


def test_heads_are_of_the_size_that_the_file_says(tmp_path: Path) -> None:
    def long(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(48)
        writer.add_value_length(48)

    own = {f"blk.0.attn_{name}.weight": (96, HIDDEN) for name in "qkv"} | {"blk.0.attn_output.weight": (HIDDEN, 96)}
    own |= {f"blk.0.attn_{name}_norm.weight": (48,) for name in "qk"}
    out = import_gguf(write(tmp_path / "qwen3.gguf", "qwen3", QWEN | own, long), tmp_path / "dense")
    assert config_of(out)["head_dim"] == 48 and loads(out)


def test_tensors_of_other_shapes_than_the_keys_describe_are_refused(tmp_path: Path) -> None:
    for name, told in (("blk.0.ffn_up.weight", r"up_proj\.weight is \[80, 64\]"), ("token_embd.weight", r"embed_tokens\.weight is \[80,")):
        path = write(tmp_path / "odd.gguf", "qwen2", QWEN2 | {name: (80, HIDDEN)}, lambda writer: None)
        with pytest.raises(CheckpointError, match=told):
            import_gguf(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_chat_templates_with_names_and_further_ends_of_text_come_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_chat_template([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}])
        writer.add_eot_token_id(0)

    write_gguf(tmp_path / "tiny.gguf", more=more)
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense")
    assert AutoTokenizer.from_pretrained(out).chat_template == {"default": "plain", "tool_use": "with tools"}
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_keys_of_the_tokenizer_and_of_rope_that_nobody_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_float32("llama.rope.scaling.yarn_beta_fast", 16.0)
        writer.add_float32("llama.rope.scaling.attn_factor", 2.0)
        writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", True)

    write_gguf(tmp_path / "tiny.gguf", more=more)
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense")
    assert config_of(out)["rope_parameters"]["beta_fast"] == 16.0
    told = "these keys of the model: rope.scaling.attn_factor, tokenizer.ggml.remove_extra_whitespaces"
    assert [record.message.partition("read ")[2] for record in caplog.records] == [told]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", more=lambda writer: writer.add_type("adapter"))
    with pytest.raises(CheckpointError, match="holds no model, but what"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
