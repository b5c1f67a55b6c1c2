"""nvfp4: nearest codes by brute force, the layout of compressed-tensors, and packing its bytes pair by pair."""

from __future__ import annotations

import pytest
import torch

from layers import made, tokens
from slidesparse import reference
from slidesparse.errors import PatternError, WeightError
from slidesparse.format import SCHEMES, packed_tensors
from slidesparse.gemm import Runner
from slidesparse.packing import check_packed, pack, restore, slide
from slidesparse.pattern import Pattern
from slidesparse.pruning import prune
from slidesparse.quantization import dequantize_nvfp4, expand_nvfp4, nvfp4_global_scale, quantize_nvfp4, scaled_nvfp4
from slidesparse.tolerance import check_bitwise

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4 = SCHEMES["nvfp4"]


def nearest(value: float) -> int:
    """The e2m1 code by looking at all of them: ties to the even code, zero without sign."""
    code = min(range(8), key=lambda c: (abs(CODES[c] - abs(value)), c & 1))
    return code | (8 if value < 0 and code else 0)


def codes_of(packed: torch.Tensor) -> list[int]:
    return [nibble for byte in packed.flatten().tolist() for nibble in (byte & 15, byte >> 4)]


def test_every_tie_and_everything_between():
    values = [i / 16 for i in range(-96, 97)]
    values += [6.0] * (-len(values) % 15)
    blocks = torch.tensor([[6.0, *values[i : i + 15]] for i in range(0, len(values), 15)])
    packed, scale = quantize_nvfp4(blocks, 1.0)
    assert (scale.float() == 1).all()
    assert codes_of(packed) == [nearest(value) for value in blocks.flatten().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_weights_against_brute_force(dtype, rng):
    weight = (torch.randn(6, 48, generator=rng) * torch.logspace(-3, 1, 6).unsqueeze(-1)).to(dtype)
    weight[2, 16:32] = 0
    world = nvfp4_global_scale(float(weight.abs().max()))
    packed, scale = quantize_nvfp4(weight, world)
    assert packed.shape == (6, 24) and packed.dtype == torch.uint8
    assert scale.shape == (6, 3) and scale.dtype == torch.float8_e4m3fn
    largest = weight.float().view(6, 3, 16).abs().amax(-1)
    assert torch.equal(scale.float(), (largest / 6 * world).clamp(max=448).to(torch.float8_e4m3fn).float())
    assert scale.float().max() == 448
    step = (scale.float() / world).repeat_interleave(16, -1)
    scaled = torch.where(step > 0, weight.float() / step, 0)
    assert codes_of(packed) == [nearest(value) for value in scaled.flatten().tolist()]
    back = dequantize_nvfp4(packed, scale, torch.tensor([world]))
    signed = torch.tensor([CODES[c & 7] * (-1 if c & 8 else 1) for c in codes_of(packed)]).view(6, 48)
    assert torch.equal(back, signed * step)


def test_global_scale():
    assert nvfp4_global_scale(6.0) == 448.0
    assert nvfp4_global_scale(0.0) == 1.0
    assert nvfp4_global_scale(1e-45) == 1.0, "a scale that overflows counts as an all-zero tensor"


def test_refusals():
    with pytest.raises(WeightError, match="multiple of 16, got 24"):
        quantize_nvfp4(torch.ones(2, 24), 1.0)
    weight = torch.ones(2, 32)
    weight[1, 3] = float("nan")
    with pytest.raises(WeightError, match="row 1, column 3"):
        quantize_nvfp4(weight, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_both_16_bit_types_hold_every_value_times_every_scale_and_give_it_back(dtype):
    """All 256 pairs of codes by all scales that there may be, against products of Python's numbers."""
    scale = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).view(-1, 1).expand(-1, 32).contiguous()
    pairs = torch.arange(256, dtype=torch.uint8).expand(len(scale), -1).contiguous()
    whole = expand_nvfp4(pairs, scale, dtype)
    signed = [CODES[code & 7] * (-1 if code & 8 else 1) for code in codes_of(pairs[:1])]
    assert whole.dtype == dtype and whole.double().tolist() == [[value * one for value in signed] for one in scale[:, 0].tolist()]
    world = torch.tensor([nvfp4_global_scale(0.37)])
    check_bitwise(scaled_nvfp4(whole, scale, world), dequantize_nvfp4(pairs, scale, world))


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_stays_resident_has_16_bits(dtype, memory):
    weights, dense = made(24, 64, "nvfp4", "6:8x2")
    run, x = Runner(weights, memory=memory), tokens(5, 64, dtype)
    y = run(x)
    assert run.resident_bytes == (24 * 64 * 2 if memory == "fast" else 0)
    assert not [one for copy in run.ready.copies.values() for one in copy if one.dtype == torch.float32 and one.numel() > 1]
    check_bitwise(y, (x.float() @ dense.t()).to(dtype))


@pytest.mark.parametrize("text", ["6:8x2", "2:4x2", "8:12x2@4:8"])
def test_bytes_pack_as_pairs(text, rng):
    pattern = Pattern.parse(text)
    weight = prune(torch.randn(5, 96, generator=rng), pattern)
    packed_bytes, scale = quantize_nvfp4(weight, nvfp4_global_scale(float(weight.abs().max())))
    assert not packed_bytes[(weight.view(5, 48, 2) == 0).all(-1)].any(), "a pruned pair is the byte 0"
    stored = NVFP4.pattern_stored(pattern)
    assert stored.unit == 1
    packed = pack(packed_bytes, stored)
    check_packed(packed)
    specs = {spec.suffix: (spec.dtype, spec.shape) for spec in packed_tensors(NVFP4, pattern, 5, 96)}
    assert specs["weight_values"] == (packed.values.dtype, tuple(packed.values.shape))
    assert specs["weight_keep"] == (packed.keep.dtype, tuple(packed.keep.shape))
    assert specs["weight_scale"] == (scale.dtype, tuple(scale.shape))
    assert torch.equal(restore(packed), packed_bytes)
    assert torch.equal(slide(packed), reference.slide(packed_bytes, stored)[0])


def test_an_element_wise_mask_is_refused(rng):
    weight = torch.randn(4, 64, generator=rng).abs() + 1
    weight.view(4, -1, 8)[..., [0, 2]] = 0
    with pytest.raises(PatternError):
        pack(quantize_nvfp4(weight, 1.0)[0], NVFP4.pattern_stored(Pattern.parse("6:8x2")))


def test_layout_is_that_of_compressed_tensors(rng):
    theirs = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers", reason="compressed-tensors is not installed")
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    one = torch.ones(4, 8).to(torch.float8_e4m3fn)
    unpacked = theirs.unpack_fp4_from_uint8(every, 4, 128, dtype=torch.float32)
    assert torch.equal(dequantize_nvfp4(every, one, torch.ones(1)), unpacked)
    weight = torch.randn(4, 64, generator=rng)
    world = nvfp4_global_scale(float(weight.abs().max()))
    packed, scale = quantize_nvfp4(weight, world)
    cpu = theirs.quantize_and_pack_fp4(weight, scale.float(), global_scale=torch.tensor([world]))
    ours, other = (theirs.unpack_fp4_from_uint8(p, 4, 64, dtype=torch.float32) for p in (packed, cpu))
    assert torch.equal(ours, other), "equal values; the sign of a zero may differ"
