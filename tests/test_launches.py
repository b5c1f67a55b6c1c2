"""Shipped launches compile for four kinds of cards without one: nothing spills, and instructions round as the oracle does."""

from __future__ import annotations

import importlib.util
import random
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from multiprocessing import get_context

import pytest
import torch

import launches
from slidesparse.ops import expand, fused, shipped_launches
from slidesparse.ops.launch import Launch
from slidesparse.ops.launches import CARDS, LAYERS, SIX, ShippedLaunch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CI = 1
"""Launches for every card, but one of each kernel at least; `make launches` compiles all."""


def test_launches_compile_to_what_they_must(rng: torch.Generator) -> None:
    items = launches.sample(CI, random.Random(rng.initial_seed()))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(launches.checked, items))
    wanted = {f"sm_{a}{b} {name}" for a, b in CARDS for name in KERNELS} | {"sm_90 sm90_tile_kernel"}
    assert {line.split("(")[0] for line, _ in found} == wanted
    assert not [(line, reasons) for line, reasons in found if reasons]


KERNELS = (*launches.ROWS, *launches.SUMS, "lift_kernel", "restore_kernel", "slide_kernel")


@cache
def code_of(name: str, capability: tuple[int, int], **wanted: object) -> tuple[ShippedLaunch, launches.Code]:
    """The first launch of a kernel with these constants, and its code."""
    fitting = (one for one in shipped_launches(capability) if one.name == name and wanted.items() <= one.constants.items())
    launch = next(fitting)
    return launch, launches.compiled(launch, capability)


BREAKS = [
    ("quantize_kernel", {"INT8": True}, lambda code: code._replace(local=8), "registers spill"),
    ("quantize_kernel", {"INT8": True}, ("div.rn.f32", "div.full.f32"), "approximate: div.full.f32; no division"),
    ("quantize_kernel", {"INT8": True}, ("fma.rn.f32", "mul.f32"), "no fused multiply-add"),
    ("quantize_kernel", {"INT8": True}, ("0f4B400000", "0f4B000000"), "does not round by adding"),
    ("quantize_kernel", {"INT8": True}, ("add.f32 ", "cvt.rni.s32.f32 "), "converts to integers: cvt.rni.s32.f32"),
    ("quantize_kernel", {"INT8": True}, ("max.u16x2", "min.u16x2"), "no max.u16x2"),
    ("quantize_kernel", {"INT8": True}, ("griddepcontrol.wait", ""), "does not wait"),
    ("quantize_kernel", {"INT8": True}, ("griddepcontrol.wait", "ld.global %r1; griddepcontrol.wait"), "before the kernel before"),
    ("quantize_kernel", {"INT8": True}, ("griddepcontrol.launch_dependents", ""), "does not let the next kernel start"),
    ("quantize_kernel", {"INT8": False}, ("cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.satfinite.e5m2x2.f32"), "no conversion to e4m3"),
    ("rms_norm_quantize_kernel", {"SUMMED": True}, ("add.rn.bf16x2", "add.bf16x2"), "approximate: add.bf16x2; no add.rn.bf16x2"),
    ("rms_norm_quantize_kernel", {"SUMMED": True}, ("mul.rn.f32", "mul.f32"), "may be contracted to fma: mul.f32"),
    ("silu_mul_quantize_kernel", {"INT8": True}, ("mul.rn.bf16x2", "add.rn.bf16x2"), "no mul.rn.bf16x2"),
    ("silu_mul_quantize_kernel", {"INT8": True}, ("div.rn.f32", "rsqrt.approx.ftz.f32"), "approximate: rsqrt.approx.ftz.f32"),
    ("rescale_kernel", {"X": True, "W": True, "BIAS": True}, ("add.rn.f32", "fma.rn.f32"), "multiplies and adds in one rounding"),
    ("rescale_kernel", {"X": True}, lambda code: code._replace(sass=code.sass + "FFMA R0"), "multiplies and adds in one rounding"),
    ("rescale_kernel", {"X": True}, ("cvt.rn.bf16", "cvt.rz.bf16"), "does not round to nearest even: cvt.rz.bf16"),
    ("tile_kernel", {"DESCRIPTOR": True}, ("mma", "dp4a"), "no product of int8 on tensor cores"),
    ("tile_kernel", {"DESCRIPTOR": True}, ("cp.async.bulk.tensor", "ld.global"), "reads by descriptors, or does not"),
    ("restore_kernel", {"SIZE": 1}, ("prmt.b32", "shr.b32"), "does not select bytes"),
    ("lift_kernel", {}, lambda code: code._replace(ptx=code.ptx + "add.rn.f32"), "moves bits, and computes add.rn.f32"),
]


@pytest.mark.parametrize(("name", "wanted", "change", "message"), BREAKS, ids=[f"{one[0]}-{one[3]}" for one in BREAKS])
def test_code_that_does_something_else_is_a_fault(name: str, wanted: dict, change, message: str) -> None:
    launch, code = code_of(name, (9, 0), **wanted)
    assert not list(launches.faults(launch, (9, 0), code))
    broken = change(code) if callable(change) else code._replace(ptx=code.ptx.replace(*change))
    assert broken != code and message in "; ".join(launches.faults(launch, (9, 0), broken))


def test_what_ops_launch_is_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, found = {one.kind for one in shipped_launches((8, 0))}, []

    def note(launch: Launch, *tensors: torch.Tensor | None) -> None:
        found.append(ShippedLaunch.of(launch, tuple(None if tensor is None else tensor.dtype for tensor in tensors)))

    monkeypatch.setattr(Launch, "__call__", note)
    quantize, rescale, w8a8 = (import_module(f"slidesparse.ops.{name}") for name in ("quantize", "rescale", "w8a8"))
    (n, k), slid, m = LAYERS[0], SIX.slid_k(LAYERS[0][1]), 4096
    x, one = torch.empty(m, k, dtype=torch.bfloat16), torch.ones(m, 1)
    quantize.launch_quantize(x, torch.int8, k)
    quantize.launch_quantize_lift(x, SIX, torch.int8, 0, slid, 32)
    quantize.launch_quantize_lift(x, SIX, torch.int8, 5, SIX.slid_k(k, 5) + 3)
    quantize.launch_lift(x, SIX, 0, slid + 32)
    for residual in (None, x):
        fused.launch_norm(x, x[0], residual, 1e-6, torch.int8, "6:8", slid)
    fused.launch_silu(torch.empty(m, 2 * k, dtype=torch.bfloat16), torch.int8, "6:8", slid)
    values, keep = torch.empty(k, SIX.packed_k(k), dtype=torch.int8), torch.empty(k, SIX.keep_bytes(k), dtype=torch.uint8)
    expand.launch_restore(values, keep, SIX, k)
    expand.launch_slide(values, keep, SIX, k, slid)
    bias = torch.ones(n, dtype=torch.bfloat16)
    rescale.launch_rescale(torch.empty(m, k, dtype=torch.int32), one, one[:k], bias[:k], torch.bfloat16, m, k)
    tile = w8a8.tile_for(m, n, k, *CARDS[(8, 0)])
    weight = torch.empty(n, k, dtype=torch.int8)
    w8a8.launch_w8a8(torch.empty(m, k, dtype=torch.int8), weight, one, torch.ones(n, 1), bias, torch.bfloat16, tile, descriptors=False)
    assert {one.name for one in found} == set(KERNELS) - {"sum_kernel"}
    assert not [launches.told(one, (8, 0)) for one in found if one.kind not in listed]


def test_cards_without_e4m3_or_descriptors_are_not_asked_for_them() -> None:
    types = {capability: {kind for one in shipped_launches(capability) for kind in one.tensors} for capability in CARDS}
    assert [capability for capability in CARDS if torch.float8_e4m3fn in types[capability]] == [(8, 9), (9, 0), (10, 0)]
    assert [capability for capability in CARDS if any(isinstance(kind, tuple) for kind in types[capability])] == [(9, 0), (10, 0)]
