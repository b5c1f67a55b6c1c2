"""Layouts hold the very weights, in as many bytes as they say before they are made."""

from __future__ import annotations

import pytest
import torch

import stand_ins
from layers import DTYPE, made
from slidesparse import reference
from slidesparse.format import SCHEMES
from slidesparse.gemm import Problem, Weights
from slidesparse.gemm.layouts import LAYOUTS, Copy
from slidesparse.ops import cusparselt
from slidesparse.pattern import KNOWN, Pattern
from slidesparse.quantization import dequantize_nvfp4
from slidesparse.tolerance import check_bitwise

CPU, SM90 = torch.device("cpu"), (9, 0)
REASON = cusparselt.unavailable("cuda")
SHAPES = [(24, 64), (33, 100), (1, 16), (7, 172)]
"""The last groups of most patterns are ragged."""


def wanted(weights: Weights, problem: Problem) -> torch.Tensor:
    """The oracle's dense weights, as kernels of this problem read them."""
    dense = reference.restore(weights.packed)
    if weights.scheme.pair:
        dense = dequantize_nvfp4(dense, weights.scale, torch.ones(1))
    assert torch.equal(dense.to(problem.compute_dtype).double(), dense.double()), "the type holds every weight"
    return dense.to(problem.compute_dtype)


def nbytes(copy: Copy) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in copy if tensor is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "fp16", "nvfp4"])
@pytest.mark.parametrize("pattern", [*map(str, KNOWN), "12:16@4:8", "2:3@1:2"])
def test_packed_and_dense_give_back_the_weights_in_the_bytes_they_say(pattern: str, scheme: str, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        if scheme == "nvfp4":
            kept, at, hardware = pattern.partition("@")
            k, pattern_of_layer = -(-k // 16) * 16, f"{kept}x2{at}{hardware}"
        else:
            pattern_of_layer = pattern
        weights, _ = made(n, k, scheme, pattern_of_layer)
        problem = weights.problem(dtype, CPU, None)
        expected = wanted(weights, problem)
        for name in ("packed", "dense"):
            layout = LAYOUTS[name]
            copy = layout.prepare(problem, weights)
            check_bitwise(layout.dense(problem, copy), expected)
            # Scales, which every layout needs, do not count.
            assert layout.nbytes(problem) == nbytes(copy[: 2 if name == "packed" else 1]), (name, problem)


def test_packed_copies_nothing() -> None:
    for scheme in ("int8", "nvfp4"):
        weights, _ = made(24, 64, scheme, "6:8x2" if scheme == "nvfp4" else "6:8")
        copy = LAYOUTS["packed"].prepare(weights.problem(DTYPE, CPU, None), weights)
        held = (weights.packed.values, weights.packed.keep, weights.scale, *([weights.global_scale] if scheme == "nvfp4" else []))
        assert all(one is other for one, other in zip(copy, held, strict=True))


def test_pairs_of_single_values_are_restored_together() -> None:
    weights, dense = made(24, 64, "int8", "6:8x2")
    problem = weights.problem(DTYPE, CPU, None)
    for name in ("packed", "dense"):
        check_bitwise(LAYOUTS[name].dense(problem, LAYOUTS[name].prepare(problem, weights)), dense)


SLIDABLE = [("2:4", 64, 96), ("4:6", 33, 100), ("6:8", 48, 172), ("8:10", 16, 40), ("14:16", 7, 64)]


def check_slid(scheme: str, pattern: str, n: int, k: int, device: str) -> Copy:
    weights, dense = made(n, k, scheme, pattern, device)
    problem, layout = (
        weights.problem(weights.scheme.dtype if scheme in ("bf16", "fp16") else DTYPE, torch.device(device), None),
        LAYOUTS["slid"],
    )
    copy = layout.prepare(problem, weights)
    check_bitwise(layout.dense(problem, copy).cpu(), dense)
    rows, _ = layout.padded(problem)
    assert len(copy) == (2 if scheme == "int8" else 1)
    if scheme == "int8":
        check_bitwise(copy[1][:n].cpu(), weights.channel_scale.view(-1).cpu())
        assert copy[1].shape == (rows,) and copy[1][n:].eq(1).all()
    return copy


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "fp16"])
@pytest.mark.parametrize(("pattern", "n", "k"), SLIDABLE)
def test_slid_weights_are_in_order_whatever_the_library_makes_of_them(pattern: str, n: int, k: int, scheme: str, monkeypatch) -> None:
    """With a stand-in for the library, which compresses nothing."""
    stand_ins.pretend_a_card(monkeypatch)
    copy = check_slid(scheme, pattern, n, k, "cpu")
    align = cusparselt.alignment(SCHEMES[scheme].dtype)
    assert copy[0].shape[0] % align == copy[0].shape[1] % align == 0
    assert (copy[0].float() != 0).unflatten(1, (-1, 4)).sum(-1).max() <= 2


@pytest.mark.needs_gpu
@pytest.mark.skipif(REASON is not None, reason=f"no cuSPARSELt: {REASON}")
@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16", "fp16"])
@pytest.mark.parametrize(("pattern", "n", "k"), [*SLIDABLE, ("6:8", 520, 1030)])
def test_compressed_weights_come_back_in_the_bytes_that_were_told(pattern: str, n: int, k: int, scheme: str) -> None:
    kind = SCHEMES[scheme]
    if reason := cusparselt.unavailable("cuda", kind.dtype):
        pytest.skip(reason)
    copy = check_slid(scheme, pattern, n, k, "cuda")
    problem = Problem(n, k, Pattern.parse(pattern), kind, SM90, kind.dtype if scheme in ("bf16", "fp16") else DTYPE)
    if torch.cuda.get_device_capability() == SM90:
        assert copy[0].numel() == LAYOUTS["slid"].nbytes(problem)


@pytest.mark.parametrize(
    ("dtype", "n", "k", "bits"),
    [  # what cuSPARSELt 0.8.0 takes on an H200 beside the values, in bytes
        (torch.int8, 32, 32, 512), (torch.int8, 96, 96, 2048), (torch.int8, 64, 1568, 12800), (torch.int8, 192, 160, 4608),
        (torch.bfloat16, 16, 16, 256), (torch.bfloat16, 48, 144, 1536), (torch.bfloat16, 64, 96, 1024), (torch.bfloat16, 80, 16, 768),
        (torch.bfloat16, 144, 80, 2560), (torch.bfloat16, 144, 144, 3840), (torch.bfloat16, 528, 1552, 112896),
    ],
)  # fmt: skip
def test_compressed_bytes_are_the_librarys(dtype: torch.dtype, n: int, k: int, bits: int) -> None:
    assert cusparselt.compressed_bytes(n, k, dtype) == n * k * dtype.itemsize // 2 + bits


@pytest.mark.parametrize(
    ("n", "k", "slid", "megabytes_8_bit", "share"),
    [
        # 6:8 makes K 1.5 times as wide; half the values stay, and two bits of each: 0.5 · 1.5 + 0.125 · 1.5 = 0.9375 of int8.
        (4608, 3584, 5376, 15.482880, 0.9375),
        (3584, 3584, 5376, 12.042240, 0.9375),
        (37888, 3584, 5376, 127.303680, 0.9375),
        (3584, 18944, 28416, 63.651840, 0.9375),
    ],
)
def test_slid_bytes_of_a_7b_models_linears(n: int, k: int, slid: int, megabytes_8_bit: float, share: float) -> None:
    """Qwen2.5-7B's: by hand from the description of the compressed form. 16-bit values keep as many bits for half as many bytes."""
    six = Pattern(6, 8)
    assert six.slid_k(k) == slid
    for scheme in ("int8", "fp8"):
        problem = Problem(n, k, six, SCHEMES[scheme], SM90, DTYPE)
        assert LAYOUTS["slid"].nbytes(problem) == round(megabytes_8_bit * 1e6)
        assert LAYOUTS["slid"].nbytes(problem) == share * LAYOUTS["dense"].nbytes(problem)
    problem = Problem(n, k, six, SCHEMES["bf16"], SM90, DTYPE)
    assert LAYOUTS["slid"].nbytes(problem) == n * slid + n * slid // 8
    assert LAYOUTS["packed"].nbytes(problem) == n * k * 6 // 8 * 2 + n * k // 8


def test_slid_bytes_count_the_padding() -> None:
    # N 33 → 64 and K' 156 → 160 in 8 bits; kept bits in tiles of 64 rows by 64 columns: 64 · 160 / 2 + 64 · 192 / 8.
    assert LAYOUTS["slid"].nbytes(Problem(33, 100, Pattern(6, 8), SCHEMES["int8"], SM90, DTYPE)) == 5120 + 1536
    # N 33 → 48 and K' 156 → 160 in 16 bits; tiles of 32 rows by 64 columns: 48 · 160 + 64 · 192 / 8.
    assert LAYOUTS["slid"].nbytes(Problem(33, 100, Pattern(6, 8), SCHEMES["bf16"], SM90, DTYPE)) == 7680 + 1536
