"""The branches that only compiled kernels take, bitwise the oracle on a CPU: under the interpreter, with what it lacks emulated."""

from __future__ import annotations

import importlib.util
import sys
from fractions import Fraction
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import emulation
from slidesparse.ops.row_config import RowConfig

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted() -> None:
    """Everything the interpreter is asked for; runs in a process of its own, which Triton reads the choice from at import."""
    import test_expand
    import test_fused
    import test_ops
    import test_rescale
    import test_w8a8
    from slidesparse.pattern import KNOWN, Pattern

    emulation.install()
    torch.manual_seed(int(sys.argv[1]))
    few, small = (("6:8", 0), ("8:10", 1)), RowConfig(8, 8, 1)
    hosts = [import_module(f"slidesparse.ops.{name}") for name in ("quantize", "fused")]
    for sm90 in (False, True):
        for host in hosts:
            host.is_hopper = lambda device, sm90=sm90: sm90
            for name in ("_groups_call", "_gather_call", "_lift_call", "_call"):
                if hasattr(host, name):
                    getattr(host, name).cache_clear()
        for dtype in test_ops.DTYPES:
            test_ops.check_kernels("cpu", 14, 61, dtype, few, configs=(small,))
        test_ops.check_kernels("cpu", 14, 255, torch.bfloat16, few, configs=(RowConfig(16, 1, 1),))
        for dtype, pattern, scheme in ((torch.bfloat16, "6:8", "int8"), (torch.float16, "8:10", "fp8"), (torch.float32, None, "int8")):
            test_fused.check_fused("cpu", 7, 60, dtype, pattern, scheme, RowConfig(2, 8, 1), emulated=True)
    test_rescale.check("cpu", 5, 70, 80, test_rescale.SUMS, test_rescale.OUTPUTS)
    for dtype in (torch.int8, torch.bfloat16):
        for pattern in KNOWN:
            test_expand.check_kernels("cpu", 5, 61, pattern, dtype, test_expand.Tile(4, 1, 2))
        test_expand.check_kernels("cpu", 5, 144, Pattern(6, 8), dtype, test_expand.Tile(4, 1, 2))
    arguments = test_w8a8.operands(7, 33, 17, torch.bfloat16, pad=3)
    tile = test_w8a8.Tile(16, 32, 32, 2, 4, swap=True)
    got = test_w8a8.kernels.launch_w8a8(*arguments, torch.bfloat16, tile, descriptors=False)
    test_w8a8.check_bitwise(got, test_w8a8.expected(*arguments, torch.bfloat16))


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_compiled_branches_are_bitwise_the_oracle_under_the_interpreter():
    """The fixture runs `interpreted` above and fails with what it says."""


def nearest(exact: Fraction) -> np.float32:
    """The float32 next to a number, the even one of two."""
    guess = np.float32(float(exact))
    near = {np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))}
    return min((one for one in near if np.isfinite(one)), key=lambda one: (abs(Fraction(float(one)) - exact), int(one.view(np.int32)) & 1))


def test_the_emulated_multiply_add_rounds_once(rng: torch.Generator) -> None:
    bits = torch.randint(0, 1 << 32, (3, 4000), generator=rng).to(torch.uint32).numpy()
    bits[:2, ::2] = (bits[:2, ::2] & 0x807FFFFF) | 0x3F800000  # numbers whose sums cancel, or tie
    bits[2, ::2] = (bits[2, ::2] & 0x80000007) | ((100 + bits[2, ::2] % 32) << 23)
    x, y, z = (row.view(np.float32) for row in bits)
    with np.errstate(all="ignore"):
        found, twice = emulation.exact_fma(x, y, z), x * y + z
    differ = 0
    for a, b, c, got, plain in zip(x, y, z, found, twice, strict=True):
        if np.isfinite([a, b, c]).all():
            exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
            if abs(exact) < 2**127 and exact:
                assert got == nearest(exact), (a, b, c)
                differ += bool(got != plain)
    assert differ > 100, "two roundings would pass, too"


@pytest.mark.parametrize("text", sorted(emulation.INSTRUCTIONS))
def test_every_emulated_instruction_is_one_that_kernels_name(text: str) -> None:
    folder = Path(import_module("slidesparse.ops").__path__[0])
    assert any(text in path.read_text() for path in folder.glob("kernels_*.py"))
