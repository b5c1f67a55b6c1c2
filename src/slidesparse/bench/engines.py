"""Engines that `serve` compares: vLLM in processes of their own, which take turns on one GPU, and transformers in this one."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import env
from ..errors import UnsupportedError

_PAST = 64
_ROOM = 32
"""Tokens behind those: every call of a decoding step takes one, and a turn makes 14 calls at most."""
_SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine stays in the process that makes it, which answers through a pipe."""


class Engine(Protocol):
    """A model that runs steps."""

    def gigabytes(self) -> float:
        """Wait until it is there; what its weights take."""

    def turn(self, phase: str, tokens: int) -> list[float]:
        """Seconds of steps."""

    def kernels(self, phase: str, tokens: int) -> float | None:
        """Microseconds that the kernels of a step take; None where nobody looks."""

    def logprobs(self) -> list[float]:
        """Of random tokens, to compare engines; empty where nobody looks."""

    def close(self) -> None:
        """Let it end."""


class VllmEngine:
    """vLLM in a process of its own; its log lies beside the checkpoint."""

    def __init__(self, asked: Mapping[str, Any], stem: Path) -> None:
        self._log = Path(f"{stem}.log")
        self._pipe, theirs = Pipe()
        words = [sys.executable, "-m", "slidesparse.bench.vllm_engine"]
        with self._log.open("w", encoding="utf-8") as file, theirs:
            words.append(json.dumps({**asked, "pipe": theirs.fileno(), "stem": str(stem)}))
            # Where we are killed it ends: it waits at the pipe.
            settings = env.for_child(_SETTINGS)
            self._process = subprocess.Popen(words, env=settings, stdout=file, stderr=file, pass_fds=[theirs.fileno()])

    def gigabytes(self) -> float:
        """See `Engine`."""
        return float(self._answer())

    def turn(self, phase: str, tokens: int) -> list[float]:
        """See `Engine`."""
        return list(self._asked("turn", phase, tokens))

    def kernels(self, phase: str, tokens: int) -> float | None:
        """See `Engine`."""
        return 1e3 * float(sum(self._asked("kernels", phase, tokens).values()))

    def logprobs(self) -> list[float]:
        """See `Engine`."""
        return list(self._asked("logprobs"))

    def close(self) -> None:
        """See `Engine`."""
        self._pipe.close()
        self._process.wait()

    def _asked(self, *question: object) -> Any:
        with suppress(BrokenPipeError):  # the answer says why
            self._pipe.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.wait()
            last = [line for line in self._log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
            raise UnsupportedError(f"the engine ended: {''.join(last)[:200]} (all of it: {self._log})") from None


class TransformersEngine:
    """A model in this process: prefill is an eager forward pass, decoding one step on a static cache, a CUDA graph where there is a GPU."""

    def __init__(self, load: Callable[[], Any], size: Callable[[Any], int]) -> None:
        self._model = load()
        self._size = size
        self._cuda = torch.cuda.is_available()

    def gigabytes(self) -> float:
        """See `Engine`: of the decoder's layers, copies of packed ones included."""
        self.turn("prefill", 8)  # copies are made at the first call
        return self._size(self._model) / 1e9

    @torch.inference_mode()
    def turn(self, phase: str, tokens: int) -> list[float]:
        """See `Engine`."""
        model, vocabulary = self._model, self._model.config.vocab_size
        if phase == "prefill":
            ids = torch.randint(vocabulary, (1, tokens), device=model.device)
            return self._clocked(lambda: model(ids, use_cache=False, logits_to_keep=1), 3)
        run = self._decoding(tokens)
        return self._clocked(self._captured(run) if self._cuda else run, 10 if self._cuda else 3)

    def kernels(self, phase: str, tokens: int) -> float | None:
        """See `Engine`: a decoding step's graph is little else."""
        return None

    def logprobs(self) -> list[float]:
        """See `Engine`: dense weights here are not masked, so nothing is compared."""
        return []

    def close(self) -> None:
        """See `Engine`."""
        del self._model
        if self._cuda:
            with suppress(RuntimeError):  # what broke the card has a row already
                torch.cuda.empty_cache()

    def _decoding(self, batch: int) -> Callable[[], object]:
        from transformers import StaticCache

        model, device = self._model, self._model.device
        cache = StaticCache(config=model.config, max_cache_len=_PAST + _ROOM)
        start = torch.randint(model.config.vocab_size, (batch, _PAST), device=device)
        model(start, past_key_values=cache, logits_to_keep=1)
        ids, place = start[:, :1].clone(), torch.tensor([[_PAST]], device=device)
        seen = (torch.arange(_PAST + _ROOM, device=device) <= _PAST).view(1, 1, 1, -1).expand(batch, 1, 1, -1)
        mask = seen if model.config.model_type == "llama" else {"full_attention": seen}
        return lambda: model(ids, past_key_values=cache, position_ids=place, attention_mask=mask, cache_position=place[0])

    def _captured(self, run: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _clocked(self, run: Callable[[], object], rounds: int) -> list[float]:
        run()
        seconds = []
        for _ in range(rounds):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            seconds.append(time.perf_counter() - start)
        return [statistics.median(seconds)]

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def joules() -> float | None:
    """What the current CUDA device has used since its driver was loaded; None where nothing tells."""
    if not torch.cuda.is_available():
        return None
    try:
        from cuda.bindings import nvml
    except ImportError:
        return None
    try:
        nvml.init_v2()
        # By its name on the bus: the order of devices may be another here.
        told: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        bus = f"{told.pci_domain_id:08x}:{told.pci_bus_id:02x}:{told.pci_device_id:02x}.0"
        return float(nvml.device_get_total_energy_consumption(nvml.device_get_handle_by_pci_bus_id_v2(bus))) / 1e3
    except (nvml.NvmlError, RuntimeError, OSError, AttributeError, TypeError):
        return None
