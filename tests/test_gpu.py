"""On a GPU: every fast path is bitwise the CPU's, conversion too, and layers give the oracle's answers."""

from __future__ import annotations

import pytest
import torch

import models
from slidesparse import pack, prune, reference
from slidesparse.checkpoint import Recipe, convert
from slidesparse.format import SCHEMES
from slidesparse.nn import SlideSparseLinear
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.quant import quantize_weight

pytestmark = [
    pytest.mark.needs_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(pack.integer_view(a.cpu()), pack.integer_view(b.cpu()))


@pytest.mark.parametrize("pattern", [*KNOWN, Pattern.parse("6:8x2")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_prune_quantise_pack_restore_slide_are_bitwise_the_cpus(dtype, pattern):
    weight = torch.randn(129, pattern.group * pattern.unit * 21 + 2).to(dtype)
    pruned = prune.prune(weight.cuda(), pattern)
    assert same(pruned, prune.prune(weight, pattern))
    for scheme in ("int8", "fp8"):
        values, scale = quantize_weight(pruned, SCHEMES[scheme])
        cpu_values, cpu_scale = quantize_weight(pruned.cpu(), SCHEMES[scheme])
        assert same(values, cpu_values) and same(scale, cpu_scale)
        packed, expected = pack.pack(values, pattern), reference.pack(cpu_values, pattern)
        assert same(packed.values, expected.values) and torch.equal(packed.keep.cpu(), expected.keep)
        pack.check_packed(packed)
        assert same(pack.restore(packed), reference.restore(expected))
        assert same(pack.slide(packed), reference.slide(reference.restore(expected), pattern)[0])


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "nvfp4"])
def test_conversion_is_bitwise_the_cpus(tmp_path, scheme):
    pattern = Pattern.parse("6:8x2" if scheme == "nvfp4" else "6:8")
    source = models.write(tmp_path / "dense", models.llama_tensors(inner=112))
    for device in ("cpu", "cuda"):
        convert(source, tmp_path / device, Recipe(pattern, "magnitude", scheme), device=device)
    cpu, gpu = models.read(tmp_path / "cpu"), models.read(tmp_path / "cuda")
    assert cpu.keys() == gpu.keys() and all(same(cpu[name], gpu[name]) for name in cpu)


@pytest.mark.parametrize("m", [0, 1, 7, 16, 63, 1000])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "fp16"])
def test_layers_give_the_oracles_answers(scheme, m):
    pattern, k, n = Pattern.parse("6:8"), 516, 264
    weight = prune.prune(torch.randn(n, k) * 0.05, pattern)
    dtype = torch.float16 if scheme == "fp16" else torch.bfloat16
    layer = SlideSparseLinear.from_dense(weight.to(dtype), (torch.randn(n) * 3).to(dtype), pattern=pattern, scheme=scheme)
    x = torch.randn(m, k).mul(torch.logspace(-2, 2, m).unsqueeze(-1) if m else 1.0).to(dtype)
    expected = layer(x).float()
    got = layer.cuda()(x.cuda()).cpu().float()
    if scheme == "int8":
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
