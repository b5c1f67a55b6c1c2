"""From a layer's weights to a kernel: what is to be computed, the layouts and kernels there are, what was measured, and what runs."""

from .kernels import Kernel, register
from .layouts import Layout
from .plan import Cell, Plan, key_of
from .plans import active_plan, use_plan, user_plan_path
from .problem import Problem, Weights
from .route import Route
from .runner import MEMORY, Runner, refuse_capture

__all__ = [
    "MEMORY", "Cell", "Kernel", "Layout", "Plan", "Problem", "Route", "Runner", "Weights", "active_plan", "key_of", "refuse_capture",
    "register", "use_plan", "user_plan_path",
]  # fmt: skip
