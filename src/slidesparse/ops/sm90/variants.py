"""The kernel's text and its variants: tile, cluster, and how much shared memory they take."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import NamedTuple

from .layout import DEPTH, ROWS, tile_bytes

SHARED_BYTES = 232448
"""Shared memory that a block may have on compute capability 9.0."""
THREADS = 384
CHUNK = 32
"""Tokens of a tile that are written at once, as in device.cu."""


class Variant(NamedTuple):
    """Tokens of a tile (its features are 128), and the cluster that shares what its blocks bring, in tiles: features × tokens.

    With ``split`` the steps of the last tiles are divided evenly among clusters, see `schedule`.
    """

    tile_tokens: int
    cluster_features: int
    cluster_tokens: int
    split: bool = False

    def __str__(self) -> str:
        return f"{self.tile_tokens} {self.cluster_features}x{self.cluster_tokens}{' split' if self.split else ''}"

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
        return self.cluster_features * self.cluster_tokens


VARIANTS = (
    *(Variant(256, *cluster) for cluster in ((2, 1), (4, 2), (1, 1))),
    *(Variant(128, *cluster) for cluster in ((2, 1), (1, 2), (1, 1))),
    *(Variant(64, *cluster) for cluster in ((1, 2), (1, 1))),
    Variant(32, 1, 1),
    *(Variant(*tile, split=True) for tile in ((256, 2, 1), (128, 2, 1), (128, 1, 2), (128, 1, 1), (64, 1, 1), (32, 1, 1))),
)
"""The likely fastest for many tokens first, then the same ones split."""


def fits(variant: Variant, values: str, bias: bool) -> bool:
    """Whether ptxas finds registers enough: it has one too few for split tiles of 256 tokens with the bias of int8 products."""
    return not (variant.split and variant.tile_tokens == 256 and values == "int8" and bias)


def part_bytes(variant: Variant) -> int:
    """Bytes of the sums that a block may leave to another, and of the flags that say so."""
    return ROWS * variant.tile_tokens * 4 + 16


class Types(NamedTuple):
    """What else a kernel is compiled for; types by their torch names, ``bias`` empty without one."""

    values: str
    sparse: bool
    out: str
    bias: str

    @property
    def size(self) -> int:
        """Bytes of a value."""
        return 1 if self.scaled else 2

    @property
    def scaled(self) -> bool:
        """Whether tokens and features have scales."""
        return self.values in ("int8", "float8_e4m3fn")

    @property
    def stage_bytes(self) -> int:
        """Of 128 rows of weights; activations come on top."""
        return tile_bytes(self.size) if self.sparse else ROWS * DEPTH


def _fixed_bytes(variant: Variant, types: Types) -> int:
    chunks = variant.tile_tokens // CHUNK
    buffers = chunks if chunks < 4 else 4 if types.sparse else 2
    return 1024 + 2 * buffers * CHUNK * 128 + 2 * variant.tile_tokens * 4 + 128


def stages(variant: Variant, types: Types) -> int:
    """As many steps ahead as fit, at most 8."""
    return min(8, (SHARED_BYTES - _fixed_bytes(variant, types)) // (types.stage_bytes + variant.tile_tokens * DEPTH))


def shared_bytes(variant: Variant, types: Types) -> int:
    """Shared memory of a block."""
    return _fixed_bytes(variant, types) + stages(variant, types) * (types.stage_bytes + variant.tile_tokens * DEPTH)


def constants(variant: Variant, types: Types, *, delay: bool = False) -> dict[str, int]:
    """The constants that gemm.cu asks for; with ``delay`` every role waits at random, which shows races."""
    return {
        "TYPE": tuple(_INSTRUCTIONS).index(types.values),
        "SPARSE": int(types.sparse),
        "TOKENS": variant.tile_tokens,
        "CLUSTER_FEATURES": variant.cluster_features,
        "CLUSTER_TOKENS": variant.cluster_tokens,
        "STAGES": stages(variant, types),
        "OUT": ("bfloat16", "float16").index(types.out),
        "BIAS": ("", "bfloat16", "float16", "float32").index(types.bias),
        "DELAY": int(delay),
        "SPLIT": int(variant.split),
    }


def source(variant: Variant, types: Types) -> str:
    """CUDA C++: the instruction that multiplies, written for this number of tokens, device.cu and gemm.cu."""
    return _multiply(types, variant.tile_tokens) + _text()


@cache
def _text() -> str:
    return "".join((resources.files(__package__) / name).read_text(encoding="utf-8") for name in ("device.cu", "gemm.cu"))


_INSTRUCTIONS = {
    "int8": ("s32.s8.s8", "p"),
    "float8_e4m3fn": ("f32.e4m3.e4m3", "p, 1, 1"),
    "bfloat16": ("f32.bf16.bf16", "p, 1, 1, 0, 0"),
    "float16": ("f32.f16.f16", "p, 1, 1, 0, 0"),
}
"""What wgmma calls types, and its last operands: whether it adds, signs, and that both matrices lie along k."""


def _multiply(types: Types, tokens: int) -> str:
    """``multiply``: sums[i] (+)= one wgmma of 64 features, ``tokens`` tokens and 32 bytes of weights' values."""
    count, whole, (names, last) = tokens // 2, types.values == "int8", _INSTRUCTIONS[types.values]
    sums = ", ".join(f'"{"+r" if whole else "+f"}"(d[{i}])' for i in range(count))
    depth = (64 if types.sparse else 32) // types.size
    words = f"{{{', '.join(f'%{i}' for i in range(count))}}}, %{count}, %{count + 1}"
    words += f", %{count + 2}, %{count + 4}" if types.sparse else ""
    return (
        f"template <int SELECTOR> __device__ __forceinline__ void multiply({'int' if whole else 'float'} (&d)[{count}], "
        "unsigned long long a, unsigned long long b, unsigned metadata, int add) {\n"
        f'  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 3}, 0; wgmma.mma_async{".sp" if types.sparse else ""}.sync.aligned.'
        f'm64n{tokens}k{depth}.{names} {words}, {last};}}"\n'
        f'               : {sums}\n               : "l"(a), "l"(b), "r"(metadata), "r"(add), "n"(SELECTOR));\n}}\n'
    )
