"""GGUF files become ordinary dense checkpoints; what is not a whole GGUF file is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slidesparse.errors import CheckpointError, OutputExistsError

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from slidesparse.integrations.gguf import import_gguf  # noqa: E402 - only where gguf is installed

HIDDEN, INNER, HEADS, LAYERS = 64, 96, 2, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(ord("a"), ord("z") + 1)), "Ġ", "ab", "abc"]


def write_gguf(path: Path, tied: bool = True, meta: Callable = lambda writer: None) -> dict[str, np.ndarray]:
    """A tiny Llama with Q8_0 weights; returns the values they dequantise to."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    meta(writer)
    random, values = np.random.default_rng(0), {}

    def add(name: str, *shape: int) -> None:
        data = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values[name] = data
            writer.add_tensor(name, data)
            return
        raw = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
        values[name] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add("token_embd.weight", len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(TOKENS), HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize(("dtype", "tied"), [("bf16", True), ("fp32", False)])
def test_the_checkpoint_holds_the_dequantised_weights(tmp_path: Path, dtype: str, tied: bool) -> None:
    values = write_gguf(tmp_path / "tiny.gguf", tied)
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense", dtype=dtype)
    tensors = load_file(out / "model.safetensors")
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj"),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj"),
        ("output_norm", "model.norm"),
        *([] if tied else [("output", "lm_head")]),
    ):
        assert torch.equal(tensors[f"{ours}.weight"], torch.from_numpy(values[f"{theirs}.weight"]).to(wanted)), ours
    config = json.loads((out / "config.json").read_text())
    assert ("lm_head.weight" in tensors) is not tied
    assert config["tie_word_embeddings"] is tied
    assert "quantization_config" not in config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "tiny.gguf"]


def test_the_checkpoint_loads_and_speaks_with_the_files_tokens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf")
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("abc", return_tensors="pt").input_ids
    assert ids.tolist() == [[TOKENS.index("abc")]]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert torch.isfinite(model(ids).logits).all()


def test_an_output_that_is_there_is_kept_unless_asked(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "dense"
    out.mkdir()
    (out / "mine").touch()
    (out / "config.json").write_text("{}")  # only what looks like a checkpoint is ever replaced
    with pytest.raises(OutputExistsError, match="exists already"):
        import_gguf(tmp_path / "tiny.gguf", out)
    assert (out / "mine").exists()
    import_gguf(tmp_path / "tiny.gguf", out, overwrite=True)
    assert not (out / "mine").exists() and (out / "config.json").exists()


def test_what_is_not_a_whole_gguf_file_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="no such file"):
        import_gguf(tmp_path / "missing.gguf", out)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        import_gguf(other, out)
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for length in (4, 20, 1000, len(whole) // 2, len(whole) - 100):
        other.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            import_gguf(other, out)
        assert "\n" not in str(caught.value) and "other.gguf" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf", "tiny.gguf"]


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        (lambda writer: writer.add_uint16("split.count", 2), "is one of 2 parts of a split file"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), r"asks for rope scaling \(linear\)"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(16, dtype=np.float32)), "asks for rope scaling"),
    ],
)
def test_what_would_be_left_out_is_refused(tmp_path: Path, meta: Callable, told: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", meta=meta)
    with pytest.raises(CheckpointError, match=told):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_neighbours_are_not_taken_for_parts_of_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE({"z": 0}, [])))
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids == [TOKENS.index("abc")]
    assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"] == HIDDEN


def test_a_failed_write_leaves_nothing_and_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "dense"
    out.mkdir()
    (out / "mine").touch()
    (out / "config.json").write_text("{}")  # only what looks like a checkpoint is ever replaced

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(tmp_path / "tiny.gguf", out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "tiny.gguf"] and (out / "mine").exists()


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int3"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="int3")
