"""Sparse checkpoints that no engine reads any more: bit masks beside the kept values, of 16 and 8 bits, read without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.utils.helpers import pack_bitmasks

import models
from slidesparse import packing, reference
from slidesparse import verify as verify_with_readers
from slidesparse.checkpoint import Checkpoint, Recipe, convert, inspect, verify
from slidesparse.checkpoint.tensorfile import TensorReader
from slidesparse.errors import CheckpointError, UnsupportedError
from slidesparse.pattern import Pattern

TWO, SIX = Pattern.parse("2:4"), Pattern.parse("6:8")
LAYER = "model.layers.1.mlp.up_proj"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def stored(name: str, weight: torch.Tensor, form: str, *, old: bool = False) -> dict[str, torch.Tensor]:
    """One weight as the compressors of compressed-tensors 0.6 to 0.13 wrote it; ``old`` names hold ``.weight``."""
    integers = packing.integer_view(weight)
    if form == "sparse-24-bitmask":  # the two largest of four, whether or not they are zero
        scores = weight.float().abs().reshape(-1, 4)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(2, dim=1).indices, True).view(weight.shape)
        compressed = integers[keep].view(weight.dtype).reshape(len(weight), -1)
    else:
        keep = weight.float() != 0
        compressed = integers[keep].view(weight.dtype)
    bitmask = pack_bitmasks(keep)
    shape = torch.tensor(weight.shape)
    found = {"compressed": compressed, "bitmask": bitmask, "shape": shape.reshape(-1, 1) if form == "sparse-24-bitmask" else shape}
    if form == "sparse-bitmask":
        counts = keep.reshape(-1, weight.shape[-1]).sum(-1)
        found["row_offsets"] = counts.cumsum(0) - counts
    return {f"{name}{'.weight' if old else ''}.{suffix}": tensor for suffix, tensor in found.items()}


def masked(pattern: Pattern, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A small Llama whose layers obey a pattern; some rows have fewer weights, one has none."""
    tensors = {}
    for name, weight in models.llama_tensors(dtype).items():
        if "proj" in name:
            weight = reference.prune(weight, pattern)
            weight[3, 8:40], weight[5] = 0, 0
        tensors[name] = weight
    return tensors


def write(tmp_path: Path, form: str, scheme: str = "bf16", every: bool = False) -> tuple[Path, Path]:
    """The sparse checkpoint and its dense reference; ``every`` weight is sparse as the oldest files have it, norms and embeddings too."""
    pattern = TWO if form == "sparse-24-bitmask" else SIX
    dense = masked(pattern, DTYPES.get(scheme, torch.bfloat16))
    config, quantization = models.LLAMA, {"quant_method": "compressed-tensors", "format": "dense"}
    if scheme not in DTYPES:
        dense, config = models.w8a8(dense, kind=scheme), models.w8a8_config(kind=scheme)
        quantization = config["quantization_config"]
    sparsity = {"format": form, "sparsity_structure": "2:4" if pattern is TWO else "unstructured", "targets": ["Linear"], "ignore": []}
    tensors = {}
    for name, tensor in dense.items():
        layer = name.removesuffix(".weight")
        sparse = name.endswith(".weight") and (every or "proj" in name)
        tensors |= stored(layer, tensor, form, old=every) if sparse else {name: tensor}
    reference_path = models.write(tmp_path / "reference", dense, config)
    return models.write(
        tmp_path / "sparse", tensors, config | {"quantization_config": quantization | {"sparsity_config": sparsity}}
    ), reference_path


@pytest.mark.parametrize("scheme", ["bf16", "fp16", "int8", "fp8"])
@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
def test_bit_masks_are_packed_without_loss(tmp_path, form, scheme):
    source, dense = write(tmp_path, form, scheme)
    convert(source, tmp_path / "packed", Recipe())
    convert(dense, tmp_path / "expected", Recipe())
    out, expected = models.read(tmp_path / "packed"), models.read(tmp_path / "expected")
    assert out.keys() == expected.keys()
    for name, tensor in expected.items():
        assert out[name].dtype == tensor.dtype and torch.equal(packing.integer_view(out[name]), packing.integer_view(tensor)), name
    assert models.config_of(tmp_path / "packed")["quantization_config"] == models.config_of(tmp_path / "expected")["quantization_config"]
    assert verify(tmp_path / "packed", source).ok and verify(tmp_path / "packed", dense).ok


@pytest.mark.parametrize("scheme", ["bf16", "int8"])
def test_bit_masks_become_dense_and_pruned_and_quantised(tmp_path, scheme):
    source, dense = write(tmp_path, "sparse-24-bitmask", scheme)
    convert(source, tmp_path / "dense", Recipe(form="dense"))
    out, expected = models.read(tmp_path / "dense"), models.read(dense)
    assert out.keys() == expected.keys() and all(torch.equal(out[name].float(), tensor.float()) for name, tensor in expected.items())
    assert verify(tmp_path / "dense", source).ok
    report = convert(source, tmp_path / "int8", Recipe(SIX, "magnitude", "int8"))
    assert verify(tmp_path / "int8", source).ok and {layer.scheme for layer in report.layers} == {"int8"}
    with pytest.raises(UnsupportedError, match=r"sparse weights with a bit mask: wanda needs 16- or 32-bit weights"):
        convert(source, tmp_path / "no", Recipe(SIX, "wanda"))


def test_what_is_not_converted_is_restored(tmp_path):
    source, dense = write(tmp_path, "sparse-bitmask", every=True)
    report = convert(source, tmp_path / "packed", Recipe(ignore=(LAYER,)))
    out, expected = models.read(tmp_path / "packed"), models.read(dense)
    assert LAYER in report.kept_dense and not any("compressed" in name or "bitmask" in name for name in out)
    for name in (f"{LAYER}.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(out[name], expected[name]), name
    assert verify(tmp_path / "packed", source).ok
    out["model.norm.weight"][3] += 1
    models.edit_tensors(tmp_path / "packed", **out)
    assert verify(tmp_path / "packed", source).other_tensors == ["model.norm"]


def test_inspect_and_verify_read_the_sparse_checkpoint_itself(tmp_path):
    source, dense = write(tmp_path, "sparse-24-bitmask", "fp8")
    found = inspect(source)
    assert found.kind == "quantised" and found.pattern == "2:4" and found.scheme == "fp8" and len(found.layers) == 14
    assert found.layer_bytes < 0.7 * found.dense_layer_bytes and found.dense_layer_bytes == inspect(dense).layer_bytes
    assert verify(source, dense, pattern=TWO).ok and verify(source, pattern=SIX).ok
    assert verify_with_readers(source, pattern=TWO).ok
    assert inspect(source, scan=False).layers[0].form == "sparse weights with a bit mask"


def test_damage_is_named(tmp_path):
    source, _ = write(tmp_path, "sparse-24-bitmask")
    bitmask = models.read(source)[f"{LAYER}.bitmask"]
    for row, value, told in ((7, 0xFF, r"row 7 has \d+ bits"), (0, 0, r"row 0 has \d+ bits")):
        damaged = bitmask.clone()
        damaged[row, 2] = value
        models.edit_tensors(source, **{f"{LAYER}.bitmask": damaged})
        with pytest.raises(CheckpointError, match=rf"layer {LAYER}: bitmask: {told}"):
            convert(source, tmp_path / "out", Recipe())
    models.edit_tensors(source, **{f"{LAYER}.bitmask": bitmask, f"{LAYER}.shape": torch.tensor([100, 60])})
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.compressed has shape \[100, 32\], expected \[100, 30\]"):
        inspect(source)
    tensors = {name: tensor for name, tensor in models.read(source).items() if name != f"{LAYER}.bitmask"}
    source = models.write(tmp_path / "less", tensors, models.config_of(source))
    with pytest.raises(CheckpointError, match=rf"layer {LAYER} has no bitmask"):
        inspect(source)
    source, _ = write(tmp_path / "other", "sparse-bitmask")
    models.edit_tensors(source, **{f"{LAYER}.row_offsets": models.read(source)[f"{LAYER}.row_offsets"] + 1})
    with pytest.raises(CheckpointError, match=rf"layer {LAYER}: bitmask: row 0 has"):
        convert(source, tmp_path / "out", Recipe())


def test_rows_of_many_blocks_come_in_order(tmp_path):
    weight = reference.prune(torch.randn(2048, 1024).bfloat16(), TWO)
    config = models.LLAMA | {
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}
    }
    source = models.write(tmp_path / "sparse", stored("a.up_proj", weight, "sparse-24-bitmask"), config, shards=2)
    with TensorReader() as reader:
        blocks = list(Checkpoint.open(source).layers["a.up_proj"].blocks(reader))
    assert len(blocks) == 8 and torch.equal(torch.cat([block.values for block in blocks]), weight)
