"""On a GPU: every fast path is bitwise the CPU's, conversion too, and layers keep the tolerance policy."""

from __future__ import annotations

import pytest
import torch

import models
from slidesparse import pack, prune, reference, testing
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
def test_layers_keep_the_tolerance_policy(scheme, m):
    pattern, k, n = Pattern.parse("6:8"), 516, 264
    dtype = torch.float16 if scheme == "fp16" else torch.bfloat16
    weight = prune.prune(torch.randn(n, k) * 0.05, pattern).to(dtype)
    bias = (torch.randn(n) * 3).to(dtype)
    layer = SlideSparseLinear.from_dense(weight, bias, pattern=pattern, scheme=scheme)
    x = torch.randn(m, k).mul(torch.logspace(-2, 2, m).unsqueeze(-1) if m else 1.0).to(dtype)
    scales, values, x_scale, q = None, weight, None, x
    if SCHEMES[scheme].dynamic:
        values, scales = quantize_weight(weight, SCHEMES[scheme])
        q, x_scale = reference.quantize(x, SCHEMES[scheme])
    exact = reference.linear(q, x_scale, values, scales, bias, torch.float64)
    got = layer.cuda()(x.cuda()).cpu()
    if scheme == "int8":
        testing.check_bitwise(got, exact.to(dtype))
        return
    plain = q.float() @ values.float().t()
    plain = plain if scales is None else plain * scales.view(1, -1) * x_scale
    testing.check_close(got, exact, (plain + bias.float()).to(dtype))
