"""What this machine can run, and why not: versions, the GPU, and the optional packages behind each feature."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from . import __version__
from .compat.versions import untested
from .errors import UnsupportedError
from .format import scheme_named
from .gemm import Problem, active_plan
from .gemm.kernels import kernels
from .jit import toolchain
from .ops import capability, triton_fault
from .pattern import Pattern

_OPTIONAL = (
    ("triton", "run our kernels on a GPU", "pip install triton"),
    ("nvmath-python", "run 2:4 sparse GEMMs on a GPU", "pip install 'slidesparse[cuda]'"),
    ("transformers", "load, generate and eval", "pip install 'slidesparse[hf]'"),
    ("vllm", "serve models", "pip install 'slidesparse[vllm]'"),
    ("gguf", "import GGUF files", "pip install 'slidesparse[gguf]'"),
    ("compressed-tensors", "run dense W8A8 twins in transformers", "pip install compressed-tensors"),
    ("lm-eval", "score tasks", "pip install 'slidesparse[eval]'"),
    ("peft", "train adapters", "pip install peft"),
    ("matplotlib", "draw pictures", "pip install 'slidesparse[plot]'"),
)


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, what was found, and what that means for the user."""

    what: str
    ok: bool
    found: str
    means: str


def diagnose() -> list[Finding]:
    """Look at Python, torch, the GPU and the optional packages; initialises CUDA only where torch reports a device."""
    findings = [
        Finding("slidesparse", True, __version__, "convert, inspect and verify run here"),
        Finding("python", True, f"{platform.python_version()} on {platform.machine()}", ""),
        _library("torch", torch.__version__, f"{torch.get_num_threads()} CPU threads"),
        _gpu(),
    ]
    return [*findings, *_packages(), _compiler(), *_kernels(), *_plans()]


def _packages() -> list[Finding]:
    """The optional packages, and whether Triton does what it is there for."""
    findings = []
    for package, purpose, remedy in _OPTIONAL:
        try:
            found, fault = metadata.version(package), triton_fault() if package == "triton" else None
        except metadata.PackageNotFoundError:
            findings.append(Finding(package, False, "not installed", f"needed to {purpose}: {remedy}"))
            continue
        findings.append(
            _library(package, found, purpose)
            if fault is None
            else Finding(package, False, found, f"{fault}: kernels of torch run instead of ours")
        )
    return findings


def _library(name: str, version: str, means: str) -> Finding:
    """A library that is there; a version newer than every tested one is told as such."""
    new = untested(name, version)
    return Finding(name, new is None, version, new or means)


def _compiler() -> Finding:
    """What compiles CUDA C++ at first use; needs no GPU."""
    purpose = "compile CUDA kernels at first use"
    try:
        return Finding("nvrtc", True, toolchain().version, purpose)
    except UnsupportedError as error:
        return Finding("nvrtc", False, "cannot be used", f"needed to {purpose}: {error}")


def _kernels() -> list[Finding]:
    """Which ways to multiply run a middling layer here, in which schemes."""
    cuda = torch.cuda.is_available()
    types = {"int8": torch.bfloat16, "fp8": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
    problems = {name: Problem(4096, 4096, Pattern(6, 8), scheme_named(name), capability(), dtype) for name, dtype in types.items()}
    findings = []
    for name, kernel in kernels().items():
        reasons = {scheme: kernel.refuses(problem) for scheme, problem in problems.items()}
        able = [scheme for scheme, reason in reasons.items() if reason is None]
        if able:
            findings.append(Finding(f"kernel {name}", True, f"runs on {'cuda' if cuda else 'cpu'}", f"multiplies {', '.join(able)}"))
        elif not cuda:
            findings.append(Finding(f"kernel {name}", False, "needs a GPU", "one of several ways to multiply; without a GPU others run"))
        else:
            told = [reason for reason in reasons.values() if reason]
            findings.append(Finding(f"kernel {name}", False, "not on this machine", max(told, key=told.count)))
    return findings


def _plans() -> list[Finding]:
    """What the choice between kernels rests on."""
    if not torch.cuda.is_available():
        return []
    active = active_plan()
    means = "decides who runs" if active.plan else "dense runs; measure with `slidesparse tune`"
    return [Finding("plan", active.plan is not None, "; ".join(active.sources), means)]


def _gpu() -> Finding:
    if torch.version.cuda is None:
        return Finding("gpu", False, "torch is a CPU build", "layers run on the CPU: exact, slow")
    if not torch.cuda.is_available():
        return Finding(
            "gpu", False, f"torch has CUDA {torch.version.cuda}, but no usable GPU or driver", "layers run on the CPU: exact, slow"
        )
    major, minor = torch.cuda.get_device_capability()
    found = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    if (major, minor) < (8, 0):
        return Finding("gpu", True, found, "no 2:4 sparse tensor cores: layers run as restored dense weights")
    return Finding("gpu", True, found, "layers run as plan and kernels allow" + ("" if (major, minor) == (9, 0) else "; unverified card"))
