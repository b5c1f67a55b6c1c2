"""One layer's weights made ready to run: resident tensors derived once, a backend chosen for every call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .problem import Problem, Weights
from .registry import Backend, choose

MEMORY = ("fast", "lean")
"""``fast`` keeps a resident copy in the layout that runs best; ``lean`` keeps the packed weights only and expands them in every call."""


class Execution:
    """Runs ``x [M, K]`` → ``y [M, N]`` on one layer's stored weights, which must have been checked before.

    Args:
        memory: one of `MEMORY`.
        backend: a backend that must run; None lets the registry choose.

    Raises:
        ValueError: unknown memory policy.
    """

    def __init__(self, weights: Weights, *, memory: str = "fast", backend: str | None = None) -> None:
        if memory not in MEMORY:
            raise ValueError(f"unknown memory policy {memory!r}: choose one of {', '.join(MEMORY)}")
        self.weights, self.memory, self.backend = weights, memory, backend
        # One copy per layout; the problem it was made for tells whether it still fits (activations may change type).
        self._resident: dict[str, tuple[Problem, Mapping[str, Tensor]]] = {}

    def problem(self, x: Tensor, bias: Tensor | None) -> Problem:
        """The problem that activations ``[M, K]`` and a bias ``[N]`` pose."""
        packed = self.weights.packed
        bias_dtype = None if bias is None else bias.dtype
        return Problem(packed.n, self.weights.k, packed.pattern, self.weights.scheme, x.device.type, x.dtype, bias_dtype)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident copies, the stored tensors not counted."""
        stored = {id(tensor) for tensor in self.weights.tensors().values()}
        tensors = [tensor for _, resident in self._resident.values() for tensor in resident.values() if id(tensor) not in stored]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [M, K]`` bfloat16, float16 or float32, ``bias [N]`` → ``[M, N]`` of x's dtype.

        Raises:
            UnsupportedError: the backend asked for cannot run this.
        """
        problem = self.problem(x, bias)
        backend = choose(problem, x.shape[0], memory=self.memory, backend=self.backend).backend
        # Autocast would narrow the fp32 sums that exactness rests on.
        with torch.autocast(problem.device, enabled=False):
            return backend.run(problem, x, self._prepared(backend, problem), self.weights.channel_scale, bias)

    def _prepared(self, backend: Backend, problem: Problem) -> Mapping[str, Tensor]:
        made = self._resident.get(backend.layout)
        if made is not None and made[0] == problem:
            return made[1]
        # Outside inference mode: the copy outlives the call that happens to make it.
        with torch.inference_mode(False), torch.no_grad():
            resident = backend.prepare(problem, self.weights)
        self._resident[backend.layout] = (problem, resident)
        return resident
