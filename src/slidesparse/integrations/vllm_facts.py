"""What is known of vLLM without importing vLLM: its dense kernel among those that plans time, and its default settings."""

from __future__ import annotations

import torch

from ..gemm import Problem
from .engine.policy import EngineFacts

KERNEL = "cutlass"
"""vLLM's W8A8 product among the dense kernels."""

STEP = 8192
"""Most tokens in a step of vLLM's server on a card of 70 GB and more, unless it is told otherwise."""

ENOUGH = 2048
"""Tokens in a step that keep the GPU busy in models of 3B and more."""


def facts(problem: Problem, *, most: int, swiglu: bool) -> EngineFacts:
    """What `engine.policy.decide` needs to know; vLLM's 16-bit products are torch's own, and its W8A8 kernels want multiples of 16."""
    takes = problem.scheme.dynamic and problem.dtype != torch.float32 and not problem.n % 16 and not problem.k % 16
    return EngineFacts("vllm", KERNEL if takes else None, most, swiglu)
