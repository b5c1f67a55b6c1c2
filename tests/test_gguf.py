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
pytest.importorskip("transformers")

import slidesparse.integrations.gguf as module  # noqa: E402 - only where gguf is installed
from slidesparse.integrations.gguf import import_gguf  # noqa: E402

HIDDEN, INNER, HEADS, LAYERS = 64, 96, 2, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(ord("a"), ord("z") + 1)), "Ġ", "ab", "abc"]


def add_keys(writer: gguf.GGUFWriter) -> None:
    """A tiny Llama's sizes and tokenizer."""
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


def write_gguf(
    path: Path,
    tied: bool = True,
    *,
    matrices: str = "Q8_0",
    biases: bool = False,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    drop: str = "",
) -> dict[str, np.ndarray]:
    """A tiny Llama with matrices of that type and float32 vectors; returns the values that the file holds.

    ``more`` adds keys and tensors, and a tensor named ``drop`` is left out.
    """
    writer = gguf.GGUFWriter(path, "llama")
    more(writer)
    add_keys(writer)
    random, values = np.random.default_rng(0), {}

    def add(name: str, *shape: int) -> None:
        data = random.standard_normal(shape, dtype=np.float32)
        if name == drop:
            return
        if len(shape) == 1:
            values[name] = data
            writer.add_tensor(name, data)
            return
        kind = gguf.GGMLQuantizationType[matrices]
        raw = gguf.quants.quantize(data, kind)
        values[name] = gguf.quants.dequantize(raw, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)

    add("token_embd.weight", len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
            if biases:
                add(f"blk.{layer}.{name}.bias", HIDDEN)
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


def test_a_failed_write_leaves_nothing_and_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "dense"
    out.mkdir()
    (out / "mine").touch()
    (out / "config.json").write_text("{}")  # only what looks like a checkpoint is ever replaced

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "TensorWriter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(tmp_path / "tiny.gguf", out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "tiny.gguf"] and (out / "mine").exists()


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int3"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="int3")


def config_of(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    ("matrices", "main"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)]
)
def test_no_bit_of_the_file_is_lost_but_of_quantised_weights(tmp_path: Path, matrices: str, main: torch.dtype) -> None:
    values = write_gguf(tmp_path / "tiny.gguf", matrices=matrices)
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense")
    stored = load_file(out / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == main and config_of(out)["dtype"] == str(main).removeprefix("torch.")
    assert torch.equal(stored["model.layers.1.mlp.up_proj.weight"], torch.from_numpy(values["blk.1.ffn_up.weight"]).to(main))
    # Random float32 vectors fit no narrower type.
    assert torch.equal(stored["model.norm.weight"], torch.from_numpy(values["output_norm.weight"]))


def test_a_vector_that_fits_takes_the_type_of_the_weights(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "tiny.gguf",
        drop="output_norm.weight",
        more=lambda writer: writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32)),
    )
    stored = load_file(import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense") / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.bfloat16 and stored["model.layers.0.input_layernorm.weight"].dtype == torch.float32


def test_rope_scaling_comes_along(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    def long(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    for more, wanted in (
        (linear, {"rope_type": "linear", "factor": 4.0}),
        (yarn, {"rope_type": "yarn", "original_max_position_embeddings": 64}),
    ):
        write_gguf(tmp_path / "tiny.gguf", more=more)
        found = config_of(import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense", overwrite=True))["rope_parameters"]
        assert wanted.items() <= found.items() and found["rope_theta"] == 10000.0
    write_gguf(tmp_path / "tiny.gguf", more=long)
    with pytest.raises(CheckpointError, match="rope scaling 'longrope'"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "other")


def test_rope_frequencies_are_llama_3s_or_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, scaled = (
        LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters={"rope_theta": 10000.0} | rope)
        for rope in ({"rope_type": "default"}, scaling)
    )
    inverse = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0]
    dim = plain.hidden_size // plain.num_attention_heads
    factors = (10000.0 ** -(torch.arange(0, dim, 2) / dim) / inverse).numpy()
    write_gguf(tmp_path / "tiny.gguf", more=lambda writer: writer.add_tensor("rope_freqs.weight", factors.astype(np.float32)))
    found = config_of(import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense"))["rope_parameters"]
    assert scaling.items() <= found.items()
    write_gguf(
        tmp_path / "tiny.gguf", more=lambda writer: writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, dim // 2, dtype=np.float32))
    )
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not Llama 3\.1's"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "other")


def test_biases_find_their_place(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "tiny.gguf", biases=True)
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense")
    assert config_of(out)["attention_bias"] is True
    stored = load_file(out / "model.safetensors")["model.layers.0.self_attn.v_proj.bias"]
    assert torch.equal(stored.float(), torch.from_numpy(values["blk.0.attn_v.bias"]))


def test_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", more=lambda writer: writer.add_tensor("blk.0.ffn_up.bias", np.ones(INNER, np.float32)))
    with pytest.raises(CheckpointError, match=r"no place for blk\.0\.ffn_up\.bias"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    write_gguf(tmp_path / "tiny.gguf", drop="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")

    def part(writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 3)

    write_gguf(tmp_path / "tiny.gguf", more=part)
    with pytest.raises(CheckpointError, match="part 1 of 3"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_keys_that_nobody_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "plain")
    assert not caplog.records
    write_gguf(tmp_path / "tiny.gguf", more=lambda writer: writer.add_float32("llama.attention.clamp_kqv", 8.0))
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense")
    assert "attention.clamp_kqv" in caplog.text


def test_what_lies_beside_the_file_is_not_read(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))).save_pretrained(tmp_path)
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense")
    assert AutoTokenizer.from_pretrained(out)("abc").input_ids == [TOKENS.index("abc")] and config_of(out)["hidden_size"] == HIDDEN


def test_a_large_model_goes_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", tied=False)
    whole = AutoModelForCausalLM.from_pretrained(import_gguf(tmp_path / "tiny.gguf", tmp_path / "whole"))
    monkeypatch.setattr(module, "_SHARD_BYTES", 20000)
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "parts")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3 and not list(out.glob("*.part"))
    for name, tensor in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
