"""What every cluster of the kernel for compute capability 9.0 works on, in which order: whole tiles, or an equal share of all steps.

Tiles rarely fill the last wave of clusters. A split schedule gives whole tiles to all waves but the last full one. The steps of that one
and of the rest are divided evenly: a share begins and ends anywhere in a tile, at a multiple of two steps.
"""

from __future__ import annotations

from typing import NamedTuple

_LEAST = 4
"""Pairs of steps of a share: sums of fewer are not worth their way through memory."""
_NEAR = 2
"""A share that ends fewer pairs before or behind the end of a tile ends there."""


class Item(NamedTuple):
    """Steps ``first`` to ``first + steps`` of a tile, features · 2¹⁶ + tokens, both in clusters.

    What ends with the tile adds the sums of the ``parts`` clusters before its own. What ends before that leaves its own: -1.
    """

    tile: int
    first: int
    steps: int
    parts: int = 0


def tile_order(down: int, across: int, group: int) -> list[int]:
    """All tiles: all features come before the next ``group`` tiles of tokens, whose weights stay in the second-level cache."""
    return [
        row << 16 | column
        for first in range(0, across, group)
        for row in range(down)
        for column in range(first, min(first + group, across))
    ]


def whole(order: list[int], steps: int, clusters: int) -> list[list[Item]]:
    """A list of every cluster: one tile after the other."""
    used = min(clusters, len(order))
    return [[Item(tile, 0, steps) for tile in order[cluster::used]] for cluster in range(used)]


def split(order: list[int], steps: int, clusters: int) -> list[list[Item]]:
    """A list of every cluster: steps that leave sums, whole tiles, and last the steps that finish a tile of others."""
    pairs = steps // 2
    if len(order) % clusters == 0 or pairs < 2 * _LEAST:
        return whole(order, steps, clusters)
    apart = max(0, len(order) // clusters - 1) * clusters
    shared = order[apart:]
    used = max(1, min(clusters, len(shared) * pairs // _LEAST))
    ends = [_snapped(cluster * len(shared) * pairs // used, pairs) for cluster in range(used + 1)]
    found = []
    for cluster in range(used):
        begin, end = ends[cluster], ends[cluster + 1]
        left: list[Item] = []
        inside: list[Item] = []
        last: list[Item] = []
        for at in range(begin // pairs, -(-end // pairs)):
            first, behind = max(begin - at * pairs, 0), min(end - at * pairs, pairs)
            parts = sum(at * pairs < other <= begin for other in ends[: cluster + 1]) if behind == pairs else -1
            (left if behind < pairs else last if first else inside).append(Item(shared[at], 2 * first, 2 * (behind - first), parts))
        found.append([*left, *(Item(tile, 0, steps) for tile in order[:apart][cluster::used]), *inside, *last])
    return found


def _snapped(at: int, pairs: int) -> int:
    """The end of a tile instead of places close to it."""
    inside = at % pairs
    return at - inside if inside < _NEAR else at - inside + pairs if inside > pairs - _NEAR else at
