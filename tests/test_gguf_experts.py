"""GGUF files with experts, which transformers merges: a layer's are held at a time, and the file is parsed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slidesparse.errors import CheckpointError

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

import slidesparse.integrations.gguf as module  # noqa: E402 - only where gguf is installed
from slidesparse.integrations.gguf import import_gguf  # noqa: E402
from test_gguf import HEADS, HIDDEN, LAYERS, TOKENS, add_keys  # noqa: E402

EXPERTS, INNER = 4, 32


def write_experts(path: Path, drop: str = "") -> dict[str, np.ndarray]:
    """A tiny Qwen3-MoE in float32, but for a tensor named ``drop``."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    add_keys(writer)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_expert_feed_forward_length(INNER)
    random, values = np.random.default_rng(0), {}
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "output": (len(TOKENS), HIDDEN)}
    for layer in range(LAYERS):
        block = {name: (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        block |= {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q_norm": (HIDDEN // HEADS,), "attn_k_norm": (HIDDEN // HEADS,)}
        block |= {"ffn_gate_inp": (EXPERTS, HIDDEN), "ffn_down_exps": (EXPERTS, HIDDEN, INNER)}
        block |= {f"ffn_{part}_exps": (EXPERTS, INNER, HIDDEN) for part in ("gate", "up")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values[name] = random.standard_normal(shape, dtype=np.float32)
        if name != drop:
            writer.add_tensor(f"{name}.weight", values[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_a_layers_experts_are_written_when_they_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = write_experts(tmp_path / "tiny.gguf")
    parsed: list[object] = []
    named: list[object] = []
    order: list[str] = []
    own, table = gguf.GGUFReader.__init__, gguf.get_tensor_name_map
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda *given: parsed.append(given) or own(*given))
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *given: named.append(given) or table(*given))
    add = module._Shards.add
    monkeypatch.setattr(module._Shards, "add", lambda self, name, tensor: order.append(name) or add(self, name, tensor))
    out = import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense")
    assert len(parsed) == len(named) == 1 and "does not read these keys" not in caplog.text
    assert order.index("model.layers.0.mlp.experts.gate_up_proj") < order.index("model.layers.1.self_attn.q_proj.weight")
    tensors = load_file(out / "model.safetensors")
    for layer in range(LAYERS):
        for part, rows in (("gate", slice(0, INNER)), ("up", slice(INNER, None))):
            found = tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"][:, rows]
            assert torch.equal(found, torch.from_numpy(values[f"blk.{layer}.ffn_{part}_exps"]))
        down = torch.from_numpy(values[f"blk.{layer}.ffn_down_exps"])
        assert torch.equal(tensors[f"model.layers.{layer}.mlp.experts.down_proj"], down)


@pytest.mark.parametrize("part", ["gate", "down"])
def test_half_of_the_experts_is_not_the_whole_model(tmp_path: Path, part: str) -> None:
    write_experts(tmp_path / "tiny.gguf", drop=f"blk.1.ffn_{part}_exps")
    with pytest.raises(CheckpointError, match=r"does not hold the whole model.*layers\.1\.mlp\.experts"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "dense")
