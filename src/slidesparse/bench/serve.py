"""bench serve: a model's dense checkpoint and its packed one in an engine, point by point, in turns on one GPU."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Recipe, convert
from ..checkpoint.staging import SUFFIX
from ..errors import UnsupportedError, first_line
from ..pattern import Pattern
from .engines import Engine, TransformersEngine, VllmEngine, joules
from .kernel import Progress
from .models import MODELS
from .rows import FAILED, OK, Row, Rows, device
from .vllm_engine import OUTPUTS, PROMPT, check

TURNS = 4
"""Each engine goes first as often."""
PLAIN = "as the plan has it"
SERVED = tuple(name for name, shape in MODELS.items() if shape.model_type != "bitnet")
"""Models of the list that transformers makes with random weights and gated feed-forward layers as they are."""
Point = tuple[str, int]


@dataclass(frozen=True)
class Asked:
    """What is to be compared.

    Attributes:
        engine: ``vllm`` or ``transformers``.
        model: a name of `SERVED`, for random weights of its shape, or a folder with dense weights.
        work: where checkpoints and logs lie, in a folder for each model; what is there is used.
        packed: packed engines by name: vLLM's ``additional_config.slidesparse``; in transformers ``{"memory": "lean"}``.
        graphs: numbers of tokens to capture CUDA graphs for, in vLLM; its own if there are none.
        eager: without compilation and CUDA graphs.

    Raises:
        ValueError: numbers of tokens or requests that vLLM's engines are not made for.
    """

    engine: str
    model: str
    work: Path
    schemes: Sequence[str]
    patterns: Sequence[str]
    prefill: Sequence[int]
    decode: Sequence[int]
    packed: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {PLAIN: {}})
    graphs: Sequence[int] = ()
    eager: bool = False

    def __post_init__(self) -> None:
        if self.engine == "vllm":
            check(self.prefill, self.decode)

    @property
    def name(self) -> str:
        """What the rows call the model."""
        return self.model if self.random else Path(self.model).resolve().name

    @property
    def random(self) -> bool:
        """Whether the weights are random ones of a shape."""
        return self.model in SERVED and not Path(self.model).is_dir()

    @property
    def folder(self) -> Path:
        """Of this model alone: folders of one name in two places are two models."""
        if self.random:
            return self.work / self.name
        place = hashlib.sha256(str(Path(self.model).resolve()).encode()).hexdigest()
        return self.work / f"{self.name}-{place[:8]}"

    @property
    def points(self) -> list[Point]:
        """Phases with their numbers of tokens."""
        return [*(("prefill", m) for m in self.prefill), *(("decode", m) for m in self.decode)]

    @property
    def routes(self) -> list[str]:
        """What the engines' rows are called, the dense one first: settings of vLLM that both share are in both names."""
        if self.engine != "vllm":
            return ["transformers, bf16", *(f"packed: {name}" for name in self.packed)]
        shared = ", eager" if self.eager else f", CUDA graphs to {max(self.graphs)}" if self.graphs else ""
        return [f"vLLM{shared}", *(f"packed: {name}{shared}" for name in self.packed)]


def run(asked: Asked, table: Rows, here: Row, progress: Progress | None = None) -> list[Row]:
    """Measure the points that the table lacks, and return the new rows; a scheme whose engine fails has a row that says why."""
    source, before = _source(asked), len(table.rows)
    lacking: dict[Row, list[Point]] = {}
    for scheme, pattern in product(asked.schemes, asked.patterns):
        base = replace(here, bench="serve", model=asked.name, scheme=scheme, pattern=pattern, timer="wall")
        points = [point for point in asked.points if not _there(table, replace(base, what=point[0], m=point[1]), asked.routes)]
        if points:
            lacking[base] = points
    passed, total = 0, sum(map(len, lacking.values()))
    for base, points in lacking.items():
        tell = partial(_tell, progress, base, passed, total)
        tell(0, "checkpoints, then engines")
        with ExitStack() as closing:
            try:
                engines = _engines(asked, source, base.scheme, base.pattern, closing)
                _compared(asked, engines, base, points, table, tell)
            except (UnsupportedError, RuntimeError) as error:
                table.add(replace(base, what=points[0][0], m=points[0][1], status=FAILED, why=first_line(error)))
        passed += len(points)
    if progress:
        progress(total, total, "")
    return table.rows[before:]


def _tell(progress: Progress | None, base: Row, passed: int, total: int, done: int, what: str) -> None:
    """Progress by points of all schemes and patterns; ``passed`` were of those before this row's."""
    if progress:
        progress(passed + done, total, f"{base.model} {base.scheme} {base.pattern}: {what}")


def _there(table: Rows, row: Row, routes: Sequence[str]) -> bool:
    """Whether every engine has its row of this point."""
    return {each.route for each in table.rows if each.cell == row.cell and each.status == OK} >= set(routes)


def _source(asked: Asked) -> Path:
    """The dense model: a folder, or random weights of a shape, written unless they are there; a broken run leaves none."""
    if not asked.random:
        return Path(asked.model)
    folder = asked.folder / "source"
    if not folder.exists():
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = MODELS[asked.model]
        config = AutoConfig.for_model(
            shape.model_type, max_position_embeddings=32768, hidden_size=shape.hidden, intermediate_size=shape.inner,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
            vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
        )  # fmt: skip
        with torch.device(device()):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        half = folder.with_name(f"{folder.name}{SUFFIX}")
        shutil.rmtree(half, ignore_errors=True)
        model.save_pretrained(half, max_shard_size="4GB")
        half.rename(folder)
    return folder


def checkpoint(source: Path, folder: Path, scheme: str, pattern: str, form: str) -> Path:
    """The model at ``source``, magnitude-pruned, packed or as its dense twin; written unless it is there."""
    made = folder / f"{scheme}-{pattern.replace(':', '-')}-{form}"
    if not made.exists():
        convert(source, made, Recipe(Pattern.parse(pattern), "magnitude", scheme, form=form))
    return made


def _engines(asked: Asked, source: Path, scheme: str, pattern: str, closing: ExitStack) -> list[Engine]:
    """The dense engine and the packed ones, side by side."""
    packed = checkpoint(source, asked.folder, scheme, pattern, "packed")
    made: list[Engine] = []
    if asked.engine == "transformers":
        from ..integrations.transformers import load

        loads: list[Callable[[], Any]] = [partial(_dense, source)]
        loads += [partial(_packed, load, packed, options) for options in asked.packed.values()]
        for each in loads:
            made.append(TransformersEngine(each, linear_bytes))
            closing.callback(made[-1].close)
        return made
    dense = checkpoint(source, asked.folder, scheme, pattern, "dense")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    shared = {"scheme": scheme, "eager": asked.eager, "graphs": list(asked.graphs), "kv_bytes": kv_bytes(source, asked)}
    kinds: list[tuple[Path, str, Mapping[str, Any]]] = [(dense, "dense", {}), *((packed, "packed", each) for each in asked.packed.values())]
    for number, (place, form, settings) in enumerate(kinds):
        made.append(VllmEngine(shared | {"checkpoint": str(place), "form": form, "settings": dict(settings)}, Path(f"{place}-{number}")))
        closing.callback(made[-1].close)
    return made


def _dense(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device()).eval()


def _packed(load: Callable[..., Any], place: Path, options: Mapping[str, Any]) -> Any:
    return load(place, tokenizer=False, **options)[0]


def linear_bytes(model: Any) -> int:
    """Bytes of a model's linear layers but its head, copies of packed ones included."""
    from torch import nn

    from ..nn import SlideSparseLinear

    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | SlideSparseLinear) and module is not head]
    held = {id(each): each for layer in layers for each in (*layer.parameters(), *layer.buffers())}
    inside = sum(each.numel() * each.element_size() for each in held.values() if each.device == model.device)
    return inside + sum(module.resident_bytes for module in model.modules() if isinstance(module, SlideSparseLinear))


def kv_bytes(source: Path, asked: Asked) -> int:
    """What the keys and values of the largest batch take: asked for, since what is free changes while another engine starts."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    if missing := [name for name in ("hidden_size", "num_attention_heads", "num_hidden_layers") if name not in config]:
        raise UnsupportedError(f"{source}: config.json has no {missing[0]}, by which the room for keys and values is told")
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tokens = max([*asked.prefill, *((PROMPT + OUTPUTS + 16) * requests for requests in asked.decode)], default=0)
    return int(2 * 2 * config["num_hidden_layers"] * heads * width * tokens + (1 << 30))


def _compared(
    asked: Asked, engines: Sequence[Engine], base: Row, points: Sequence[Point], table: Rows, tell: Callable[[int, str], None]
) -> None:
    """Rows of all points, written point by point."""
    memory = []
    for engine, route in zip(engines, asked.routes, strict=True):
        tell(0, f"{route} starts")
        memory.append(engine.gigabytes())
    logprobs = [engine.logprobs() for engine in engines]
    apart = [statistics.fmean(abs(a - b) for a, b in zip(logprobs[0], each, strict=True)) if each else None for each in logprobs]
    for done, (phase, m) in enumerate(points):
        tell(done, f"{phase} {m}")
        times: list[list[float]] = [[] for _ in engines]
        energy: list[list[float | None]] = [[] for _ in engines]
        for turn in range(TURNS):
            order = range(len(engines)) if turn % 2 == 0 else reversed(range(len(engines)))
            for number in order:
                before = joules()
                times[number] += engines[number].turn(phase, m)
                after = joules()
                energy[number].append(None if before is None or after is None else after - before)
        us = [statistics.median(each) * 1e6 for each in times]
        for number, route in enumerate(asked.routes):
            row = replace(base, what=phase, m=m, route=route, rival=asked.routes[0], us=us[number], ratio=us[0] / us[number], status=OK)
            row = replace(row, gigabytes=memory[number], error=apart[number], kernels_us=engines[number].kernels(phase, m))
            table.add(replace(row, joules=per_token(energy[number], asked.engine, phase, m)))


def per_token(energy: Sequence[float | None], engine: str, phase: str, m: int) -> float | None:
    """Joules of a turn over the tokens that it made or read, those of rounds that warm up and of prompts included in the energy."""
    known = [each for each in energy if each is not None and each > 0]
    if len(known) < len(energy) or not known or engine != "vllm":
        return None
    # `vllm bench latency` runs one round to warm up, then three of a prefill, or two with all outputs and two with one.
    tokens = 4 * m if phase == "prefill" else 3 * m * (OUTPUTS + 1)
    return statistics.median(known) / tokens
