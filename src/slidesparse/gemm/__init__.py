"""Choosing and running a GEMM: what is to be computed, which backends can, and one layer's resident tensors."""

from .execution import MEMORY, Execution
from .problem import Problem, Weights
from .registry import Accepted, Backend, Choice, Rejected, Verdict, backend_names, choose, register, verdicts

__all__ = [
    "MEMORY",
    "Accepted",
    "Backend",
    "Choice",
    "Execution",
    "Problem",
    "Rejected",
    "Verdict",
    "Weights",
    "backend_names",
    "choose",
    "register",
    "verdicts",
]
