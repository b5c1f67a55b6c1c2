"""The shapes that benchmarks run: squares, and the layers of well-known models as serving engines hold them, merged."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..pattern import Pattern

Shape = tuple[int, int]
"""N, K."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder model with gated feed-forward layers, as its config.json has them."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    model_type: str

    @property
    def linears(self) -> dict[str, Shape]:
        """Each of the four merged layers of a block by its usual name."""
        return {
            "qkv_proj": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "o_proj": (self.hidden, self.heads * self.head_dim),
            "gate_up_proj": (2 * self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }


MODELS = {
    "Llama-3.2-1B": ModelShape(2048, 8192, 16, 32, 8, 64, 128256, True, "llama"),
    "Llama-3.2-3B": ModelShape(3072, 8192, 28, 24, 8, 128, 128256, True, "llama"),
    "Qwen2.5-Coder-1.5B": ModelShape(1536, 8960, 28, 12, 2, 128, 151936, True, "qwen2"),
    "Qwen2.5-7B": ModelShape(3584, 18944, 28, 28, 4, 128, 152064, False, "qwen2"),
    "Qwen2.5-14B": ModelShape(5120, 13824, 48, 40, 8, 128, 152064, False, "qwen2"),
    "Qwen3-8B": ModelShape(4096, 12288, 36, 32, 8, 128, 151936, False, "qwen3"),
    "BitNet-2B": ModelShape(2560, 6912, 30, 20, 5, 128, 128256, True, "bitnet"),
}
SQUARES = (2048, 4096, 8192)


def slid_bytes(n: int, k: int, pattern: Pattern, item: int) -> int:
    """Half of the slid weights of ``item`` bytes each, and two bits for each of these."""
    return n * pattern.slid_k(k) * (4 * item + 1) // 8


def shape_of(text: str) -> Shape | None:
    """The shape that ``4096x14336`` names, also with × or a comma; None where a text is none, or one of its numbers is 0."""
    match = re.fullmatch(r"(\d+)[x×,](\d+)", text.strip())
    n, k = map(int, match.groups()) if match else (0, 0)
    return (n, k) if n and k else None


def shapes_of(name: str) -> list[Shape]:
    """The shapes behind a name: a model of the list, or ``square``.

    Raises:
        ValueError: no such name.
    """
    if name == "square":
        return [(side, side) for side in SQUARES]
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}, or square")
    return list(MODELS[name].linears.values())


def named(n: int, k: int) -> str:
    """Which layers of which models have this shape; empty for none."""
    found = [f"{model} {layer}" for model, shape in MODELS.items() for layer, size in shape.linears.items() if size == (n, k)]
    return ", ".join(found)
