"""Choosing and running a GEMM: what is to be computed, which backends can, what was measured, and one layer's resident tensors."""

from .active import Active, active_plan, use_plan, user_plan_path
from .execution import Execution, refuse_capture
from .plan import MEMORY, Cell, Plan, key_of
from .problem import Problem, Weights
from .registry import Accepted, Backend, Choice, Rejected, Verdict, backend_names, choose, named, register, verdicts

__all__ = [
    "MEMORY",
    "Accepted",
    "Active",
    "Backend",
    "Cell",
    "Choice",
    "Execution",
    "Plan",
    "Problem",
    "Rejected",
    "Verdict",
    "Weights",
    "active_plan",
    "backend_names",
    "choose",
    "key_of",
    "named",
    "refuse_capture",
    "register",
    "use_plan",
    "user_plan_path",
    "verdicts",
]
