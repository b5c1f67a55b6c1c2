"""The kernel's text and its variants: tile, cluster, and how much shared memory they take."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import NamedTuple

from .layout import COLUMNS, ROWS, TILE_BYTES

SHARED_BYTES = 232448
"""Shared memory that a block may have on compute capability 9.0."""
THREADS = 384
CHUNK = 32
"""Tokens of a tile that are written at once, as in gemm.cu."""


class Variant(NamedTuple):
    """Tokens of a tile (its features are 128), and the cluster that shares what its blocks bring, in tiles: features × tokens."""

    tokens: int
    features: int
    along: int

    def __str__(self) -> str:
        return f"{self.tokens} {self.features}x{self.along}"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """From the text form.

        Raises:
            ValueError: not one of `VARIANTS`.
        """
        found = next((variant for variant in VARIANTS if str(variant) == text), None)
        if found is None:
            raise ValueError(f"unknown variant {text!r}: choose one of {', '.join(map(str, VARIANTS))}")
        return found

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.features * self.along


VARIANTS = tuple(
    Variant(tokens, features, along)
    for tokens, features, along in ((256, 2, 1), (256, 4, 2), (256, 1, 1), (128, 2, 1), (128, 1, 2), (128, 1, 1), (64, 1, 2), (64, 1, 1))
)
"""The likely fastest for many tokens first."""


class Types(NamedTuple):
    """What else a kernel is compiled for; types by their torch names, ``bias`` empty without one."""

    values: str
    sparse: bool
    out: str
    bias: str

    @property
    def stage_bytes(self) -> int:
        """Of 128 rows of weights; activations come on top."""
        return TILE_BYTES if self.sparse else ROWS * COLUMNS


def _fixed_bytes(variant: Variant, types: Types) -> int:
    buffers = 4 if types.sparse else 2
    return 1024 + 2 * buffers * CHUNK * 128 + 2 * variant.tokens * 4 + 128


def stages(variant: Variant, types: Types) -> int:
    """As many steps ahead as fit, at most 8."""
    return min(8, (SHARED_BYTES - _fixed_bytes(variant, types)) // (types.stage_bytes + variant.tokens * COLUMNS))


def shared_bytes(variant: Variant, types: Types) -> int:
    """Shared memory of a block."""
    return _fixed_bytes(variant, types) + stages(variant, types) * (types.stage_bytes + variant.tokens * COLUMNS)


def predicted_clocks(variant: Variant, n: int, k: int, m: int, *, sparse: bool, multiprocessors: int = 132) -> float:
    """Clocks of ``[M, K']`` by ``[N, K']``: waves of clusters, in each the stages, bound by tensor cores or by copies, and a tile's ends.

    The constants follow products measured on an H200 (benchmarks/results/archive/h200_sm90_variants.csv). They put variants in order and
    predict no time: at one clock, 1.9 GHz, they are 13 % off (root mean square).
    """
    tiles = -(-n // (ROWS * variant.features)) * -(-m // (variant.tokens * variant.along))
    # Of clusters of eight, 15 fit the 132 multiprocessors of an H200.
    clusters = multiprocessors // variant.cluster if variant.cluster < 4 else multiprocessors * 10 // 11 // variant.cluster
    multiply = variant.tokens * (2.4 if sparse else 4.2) + (150 if sparse else 60)
    weights = TILE_BYTES if sparse else ROWS * COLUMNS
    bring = (weights / variant.along + variant.tokens * COLUMNS / variant.features) / 50
    return -(-tiles // clusters) * (-(-k // COLUMNS) * max(multiply, bring) + 1000 + 12 * variant.tokens)


def constants(variant: Variant, types: Types, *, delay: bool = False) -> dict[str, int]:
    """The constants that gemm.cu asks for; with ``delay`` every role waits at random, which shows races."""
    return {
        "TYPE": ("int8", "float8_e4m3fn").index(types.values),
        "SPARSE": int(types.sparse),
        "TOKENS": variant.tokens,
        "CLUSTER_FEATURES": variant.features,
        "CLUSTER_TOKENS": variant.along,
        "STAGES": stages(variant, types),
        "OUT": ("bfloat16", "float16").index(types.out),
        "BIAS": ("", "bfloat16", "float16", "float32").index(types.bias),
        "DELAY": int(delay),
    }


def source(variant: Variant, types: Types) -> str:
    """CUDA C++: the instruction that multiplies, written for this number of tokens, and gemm.cu."""
    return _multiply(types.values, variant.tokens, types.sparse) + _text()


@cache
def _text() -> str:
    return (resources.files(__package__) / "gemm.cu").read_text(encoding="utf-8")


def _multiply(values: str, tokens: int, sparse: bool) -> str:
    """``multiply``: sums[i] (+)= one wgmma of 64 features, ``tokens`` tokens and 32 bytes of weights' values."""
    count, whole = tokens // 2, values == "int8"
    types = "s32.s8.s8" if whole else "f32.e4m3.e4m3"
    sums = ", ".join(f'"{"+r" if whole else "+f"}"(d[{i}])' for i in range(count))
    sizes = f"wgmma.mma_async{'.sp' if sparse else ''}.sync.aligned.m64n{tokens}k{64 if sparse else 32}.{types}"
    words = f"{{{', '.join(f'%{i}' for i in range(count))}}}, %{count}, %{count + 1}"
    words += f", %{count + 2}, 0" if sparse else ""
    words += ", p" if whole else ", p, 1, 1"
    return (
        f"__device__ __forceinline__ void multiply({'int' if whole else 'float'} (&d)[{count}], unsigned long long a, "
        "unsigned long long b, unsigned metadata, int add) {\n"
        f'  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 3}, 0; {sizes} {words};}}"\n'
        f'               : {sums}\n               : "l"(a), "l"(b), "r"(metadata), "r"(add));\n}}\n'
    )
