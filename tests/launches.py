"""Compile the package's launches for cards that are not there, and look at the machine code: ``python -m tests.launches [--sample N]``.

Triton's compiler and NVIDIA's assembler need no card. Registers that spill, memory of a thread's own, and an instruction that rounds
otherwise than the oracle are errors. All launches take long: ``make launches`` runs them, `tests/test_launches.py` a random sample.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from slidesparse.ops import shipped_launches
from slidesparse.ops.launches import CARDS, Block, ShippedLaunch

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Code(NamedTuple):
    """What a launch compiles to: Triton's PTX, bytes of a thread's own memory (spilled registers among them), and SASS."""

    ptx: str
    local: int
    sass: str


def source(launch: ShippedLaunch) -> tuple[object, dict[str, object]]:
    """What ``kernel[grid](…)`` hands to Triton's compiler for tensors that begin at multiples of 16, and options."""
    from triton.compiler import ASTSource

    kernel, constants, signature, attributes = launch.kernel, dict(launch.constants), {}, {}
    folded = {name: constants.pop(name) for name in kernel.arg_names if name in constants}
    for number, argument in enumerate((*launch.tensors, *launch.numbers)):
        name, parameter = kernel.arg_names[number], kernel.params[number]
        if argument is None or (type(argument) is int and argument == 1 and not parameter.do_not_specialize):
            folded[name] = argument
        elif isinstance(argument, Block):
            signature[name] = f"tensordesc<{TYPES[argument.dtype]}{list(argument.shape)}>"
        elif isinstance(argument, torch.dtype):
            signature[name] = f"*{TYPES[argument]}"
        else:
            signature[name] = "fp32" if isinstance(argument, float) else "i32"
        divides = isinstance(argument, torch.dtype) or (type(argument) is int and argument % 16 == 0 and not parameter.do_not_specialize)
        if divides and name not in folded:
            attributes[(number,)] = [["tt.divisibility", 16]]
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return ASTSource(kernel, types, folded, attributes), constants


def compiled(launch: ShippedLaunch, capability: tuple[int, int]) -> Code:
    """Compile it for a card of this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    asked, options = source(launch)
    made = triton.compile(asked, target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, how, file.name], capture_output=True, text=True, check=True).stdout for how in ("-res-usage", "-sass")
        )
    sizes = re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)
    if not sizes:
        raise RuntimeError(f"cuobjdump told no sizes: {usage}")
    return Code(made.asm["ptx"], sum(map(int, sizes)), sass)


ROWS = ("quantize_kernel", "quantize_gather_kernel", "rms_norm_quantize_kernel", "silu_mul_quantize_kernel")
SUMS = ("rescale_kernel", "tile_kernel", "sum_kernel")
FLOAT = r"\b(?:add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|ex2)\.[\w.]*(?:f32|f16|bf16|f32x2|f16x2|bf16x2)\b"
APPROXIMATE = {
    "rms_norm_quantize_kernel": {"div.full.f32", "rsqrt.approx.ftz.f32"},
    "silu_mul_quantize_kernel": {"ex2.approx.ftz.f32", "rcp.approx.ftz.f32"},
}
"""The root mean square and the sigmoid, which are documented not to be the oracle's bit by bit."""


def allowed_spills(launch: ShippedLaunch) -> int:
    """Bytes of a thread's own memory that a launch may have: of SwiGLU's few rows of more than 45,056 columns, which 16 warps hold.

    Of 8.0, 8.9, 9.0 and 10.0 each spills 8 to 72 with one version of Triton at least. Read twice in place of held, one row of 53,248 takes
    15.0 µs and not 5.9 (H200).
    """
    wide = launch.name == "silu_mul_quantize_kernel" and launch.constants["num_warps"] == 16 and launch.constants["CHUNKS"] >= 12
    return 80 if wide else 0


def faults(launch: ShippedLaunch, capability: tuple[int, int], code: Code) -> Iterator[str]:
    """What is wrong with the code of a launch."""
    name, constants, used = launch.name, launch.constants, set(re.findall(FLOAT, code.ptx))
    if code.local > allowed_spills(launch):
        yield f"{code.local} bytes of a thread's own memory: registers spill"
    inexact = {one for one in used if ".rn" not in one and not re.fullmatch(r"(add|sub|mul)\.f32(x2)?", one)}
    if wrong := inexact - APPROXIMATE.get(name, set()):
        yield f"approximate: {', '.join(sorted(wrong))}"
    if wrong := set(re.findall(r"\bcvt\.(?:r[zmp]|rna)\.\S*", code.ptx)):
        yield f"does not round to nearest even: {', '.join(sorted(wrong))}"
    if constants.get("enable_fp_fusion") is False and (wrong := {one for one in used if one in ("add.f32", "sub.f32", "mul.f32")}):
        yield f"may be contracted to fma: {', '.join(sorted(wrong))}"
    if name in ROWS:
        yield from _row_faults(launch, code, used)
    elif name in SUMS:
        yield from _sum_faults(launch, capability, code)
    elif used:
        yield f"moves bits, and computes {', '.join(sorted(used))}"
    if name == "restore_kernel" and "prmt.b32" not in code.ptx:
        yield "does not select bytes by prmt"
    waits = "griddepcontrol.wait" in code.ptx
    if waits != constants.get("SM90", False):
        yield "waits for the kernel before" if waits else "does not wait for the kernel before"
    if waits and re.search(r"\b(ld|st)\.global", code.ptx[: code.ptx.index("griddepcontrol.wait")]):
        yield "reads or writes before the kernel before has ended"
    if waits and "griddepcontrol.launch_dependents" not in code.ptx[code.ptx.index("griddepcontrol.wait") :]:
        yield "does not let the next kernel start, or before it has waited itself"


def _row_faults(launch: ShippedLaunch, code: Code, used: set[str]) -> Iterator[str]:
    """Scales by IEEE division, quotients by fused multiply-adds, one conversion to nearest even."""
    if "div.rn.f32" not in used:
        yield "no division rounded to nearest"
    if not any(one.startswith("fma.rn.f32") for one in used):
        yield "no fused multiply-add"
    if launch.constants["INT8"]:
        if not re.search(r"\badd\.\S*f32\S*\s.*0f4B400000|\b0f4B400000\b", code.ptx):
            yield "does not round by adding 1.5 · 2^23"
        if wrong := set(re.findall(r"\bcvt\.\w+\.[su]\d+\.f32", code.ptx)):
            yield f"converts to integers: {', '.join(sorted(wrong))}"
    elif "cvt.rn.satfinite.e4m3x2.f32" not in code.ptx:
        yield "no conversion to e4m3 rounded to nearest"
    x, narrow = launch.tensors[0], launch.tensors[0] != torch.float32
    if narrow and launch.constants["SM90"]:
        kind, wanted = "bf16x2" if x == torch.bfloat16 else "f16x2", ["max.u16x2"]
        wanted += [f"mul.rn.{kind}"] if launch.name in APPROXIMATE else []
        wanted += [f"add.rn.{kind}"] if launch.constants.get("SUMMED") else []
        yield from (f"no {one}" for one in wanted if one not in code.ptx)


def _sum_faults(launch: ShippedLaunch, capability: tuple[int, int], code: Code) -> Iterator[str]:
    """Integer sums, then three operations, each rounded: no multiplication and addition in one."""
    # Where nothing is multiplied, an fma is a sum: ptxas has no other for two of bfloat16 on 8.0.
    multiplies = launch.constants.get("X", True) or launch.constants.get("W", True)
    if multiplies and ("fma." in code.ptx or "FFMA" in code.sass):
        yield "multiplies and adds in one rounding"
    if launch.name == "tile_kernel":
        if not re.search(r"mma\S*\.s32\.s8\.s8|mma\S*kind::i8", code.ptx):
            yield "no product of int8 on tensor cores"
        if launch.constants["DESCRIPTOR"] != ("cp.async.bulk.tensor" in code.ptx):
            yield "reads by descriptors, or does not, against what was asked"


def told(launch: ShippedLaunch, capability: tuple[int, int]) -> str:
    """A launch in a line."""
    types = ", ".join(f"{one.dtype} {list(one.shape)}" if isinstance(one, Block) else str(one) for one in launch.tensors)
    words = f"sm_{capability[0]}{capability[1]} {launch.name}({types}; {launch.numbers}) {launch.constants}"
    return words.replace("torch.", "")


def checked(item: tuple[int, tuple[int, int]]) -> tuple[str, list[str]]:
    """One launch, by its number in the list for a card, in a line, and what is wrong with it."""
    number, capability = item
    launch = listed(capability)[number]
    return told(launch, capability), list(faults(launch, capability, compiled(launch, capability)))


@cache
def listed(capability: tuple[int, int]) -> list[ShippedLaunch]:
    """The launches for a card."""
    return shipped_launches(capability)


def sample(count: int, chance: random.Random) -> list[tuple[int, tuple[int, int]]]:
    """So many launches for every card, and each kernel at least once."""
    found = []
    for capability in CARDS:
        launches = listed(capability)
        order = chance.sample(range(len(launches)), len(launches))
        first = {launches[number].name: number for number in order}
        rest = [number for number in order if number not in first.values()][: max(0, count - len(first))]
        found += [(number, capability) for number in (*first.values(), *rest)]
    return found


def main() -> int:
    """Compile, print what is wrong, and return 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--sample", type=int, default=1 << 20, help="so many launches for every card")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    asked = parser.parse_args()
    items, wrong, start = sample(asked.sample, random.Random(asked.seed)), 0, time.perf_counter()
    import triton

    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, (line, reasons) in enumerate(pool.map(checked, items), 1):
            if number % 100 == 0:
                print(f"{number} of {len(items)}", file=sys.stderr)
            if reasons:
                wrong += 1
                print(f"{line}\n  {'; '.join(reasons)}", flush=True)
    seconds = time.perf_counter() - start
    print(f"Triton {triton.__version__}, seed {asked.seed}: {len(items)} launches compiled, {wrong} wrong, {seconds:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
