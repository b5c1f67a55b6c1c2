"""How long a whole linear takes by the kernel for compute capability 9.0: an analytic model, fitted to measured calls.

A call quantises and multiplies. Three things bound the product: the clocks of its tiles, the energy of its multiplications at the
card's power limit, and its bytes in device memory. The slowest counts, and one close to the slowest adds a little.
"""

from __future__ import annotations

from typing import NamedTuple

from .layout import DEPTH, ROWS, tile_bytes
from .variants import Variant, part_bytes

_NORM = 8
"""Of the sum of the bounds."""


class Rates(NamedTuple):
    """A card's constants.

    Of pairs the first is for dense weights and the second for sparse ones, but for ``launch`` and ``shared``. ``step`` and ``end`` are
    clocks of one step of K and of the ends of a tile, a number for each token of the tile and one more. ``power`` is microseconds for 10⁹
    multiplications at the power limit. ``memory`` and ``quantise`` are bytes a microsecond of device memory, by the product and by the
    pass in front. ``launch`` is microseconds that each of the two takes at least. ``shared`` is what a tile costs whose steps are divided:
    clocks, and bytes a clock of the sums that clusters leave to each other.
    """

    multiprocessors: int
    clusters_of_eight: int
    gigahertz: float
    step: tuple[tuple[float, float], tuple[float, float]]
    end: tuple[float, float]
    power: dict[str, tuple[float, float]]
    memory: float
    quantise: float
    launch: tuple[float, float]
    shared: tuple[float, float]


H200 = Rates(
    multiprocessors=132,
    clusters_of_eight=15,
    gigahertz=1.755,
    step=((3.5, 146), (1.94, 198)),
    end=(17.5, 420),
    power={"int8": (1.39, 1.93), "float8_e4m3fn": (1.52, 2.07), "bfloat16": (2.97, 3.87), "float16": (2.97, 3.87)},
    memory=3.34e6,
    quantise=3.74e6,
    launch=(2.0, 1.75),
    shared=(5650, 28.1),
)
"""Fitted to calls of Qwen2.5-7B's layers, ``launch`` and ``shared`` to the 3,240 in the shipped plan, the others to 5,136, most in the
plan and archive/h200_sm90*.csv; 132 multiprocessors, 700 W."""

RATES = {"NVIDIA H200": H200}
"""By the card's name."""


def predicted_us(variant: Variant, n: int, k: int, width: int, m: int, *, values: str, sparse: bool, rates: Rates = H200) -> float:
    """Microseconds of a whole linear ``[M, K]`` → ``[M, N]`` whose product has ``width`` columns: K, or K' of slid weights.

    Args:
        values: torch's name of the type that is multiplied. 16-bit activations are lifted where ``width`` is more than K.
    """
    size, index = 1 if values in ("int8", "float8_e4m3fn") else 2, int(sparse)
    tiles = -(-n // (ROWS * variant.cluster_features)) * -(-m // (variant.tile_tokens * variant.cluster_tokens))
    clusters = rates.clusters_of_eight * 8 // variant.cluster if variant.cluster >= 4 else rates.multiprocessors // variant.cluster
    steps, waves = -(-width * size // DEPTH), -(-tiles // clusters)
    (per_token, fixed), (end_per_token, end) = rates.step[index], rates.end
    rounds, moved = float(waves), 0.0
    if variant.split and tiles % clusters:
        # Steps are divided evenly. A cluster leaves sums, and finishes a tile of as many others as it takes to share one.
        left = (1 + max(1, -(-clusters // tiles))) * part_bytes(variant)
        rounds, moved = tiles / clusters, rates.shared[0] + left / rates.shared[1]
    clocks = rounds * steps * (per_token * variant.tile_tokens + fixed) + waves * (end_per_token * variant.tile_tokens + end) + moved
    multiplications = m * n * width / (2 if sparse else 1)
    weights = n * width * size * (tile_bytes(size) / (ROWS * DEPTH) if sparse else 1)
    bounds = (
        clocks / (rates.gigahertz * 1e3),
        multiplications * rates.power[values][index] * 1e-9,
        (weights + m * width * size + 2 * m * n) / rates.memory,
    )
    product = sum(bound**_NORM for bound in bounds) ** (1 / _NORM)
    passes = size == 1 or width != k
    return product + rates.launch[0] + (rates.launch[1] + (2 * m * k + m * width * size) / rates.quantise if passes else 0)
