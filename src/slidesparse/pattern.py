"""Arithmetic of ``kept:group`` patterns: windows, slid widths and the lift index (standard library only)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

_TEXT = re.compile(r"(\d+):(\d+)(?:x(\d+))?(?:@(\d+):(\d+))?")
_MAX_GROUP = 64


@dataclass(frozen=True)
class Pattern:
    """At most ``kept`` non-zero units in every ``group`` consecutive units of a weight row.

    The hardware keeps ``n`` of every ``l`` units; windows of ``l`` units at stride ``n`` cover a group, so
    ``group - kept`` must equal ``l - n`` and ``n`` must divide ``group - l`` (SlideSparse, arXiv 2603.05232, generalised).
    A unit is ``unit`` consecutive weights along K: 1, or 2 where the hardware prunes pairs (Blackwell FP4).

    Written ``6:8``, with the optional suffixes ``x2`` (unit) and ``@4:8`` (hardware n:l): ``6:8x2``, ``12:16@4:8``.

    Raises:
        ValueError: the pattern cannot be covered exactly by hardware windows; the message says why.
    """

    kept: int
    group: int
    n: int = 2
    l: int = 4  # noqa: E741 - the paper's letter
    unit: int = 1
    text: str = field(init=False, repr=False, compare=False)
    """As `parse` reads it."""

    def __post_init__(self) -> None:
        for name in ("kept", "group", "n", "l", "unit"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"pattern {name} must be a positive integer, got {value!r}")
        if self.n >= self.l:
            raise ValueError(f"hardware {self.n}:{self.l} drops nothing: n must be smaller than l")
        if self.group > _MAX_GROUP:
            raise ValueError(f"pattern {self.kept}:{self.group}: groups wider than {_MAX_GROUP} are not supported")
        if self.unit not in (1, 2):
            raise ValueError(f"pattern unit must be 1 (elements) or 2 (pairs), got {self.unit}")
        head, zeros = f"pattern {self.kept}:{self.group} on {self.n}:{self.l} hardware", self.l - self.n
        if self.kept >= self.group:
            raise ValueError(f"{head}: kept must be smaller than group")
        if self.group < self.l:
            raise ValueError(f"{head}: the group is narrower than one window of {self.l}")
        if self.group - self.kept != zeros:
            raise ValueError(
                f"{head}: windows cover a group exactly only when it drops {zeros} of its positions, this one drops "
                f"{self.group - self.kept}{_advice(self.kept, self.group, self.n, self.l)}"
            )
        if (self.group - self.l) % self.n:
            raise ValueError(f"{head}: group must be {self.l} plus a multiple of the stride {self.n}, got {self.group}"
                             f"{_advice(self.kept, self.group, self.n, self.l)}")  # fmt: skip
        unit = f"x{self.unit}" if self.unit != 1 else ""
        hardware = f"@{self.n}:{self.l}" if (self.n, self.l) != (2, 4) else ""
        # Written once: torch.compile may turn numbers into symbols, which it cannot write.
        object.__setattr__(self, "text", f"{self.kept}:{self.group}{unit}{hardware}")

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read ``kept:group[xUNIT][@n:l]``; a `Pattern` is returned as it is.

        Raises:
            ValueError: not of that form, or not a pattern the hardware's windows can cover.
        """
        if isinstance(text, Pattern):
            return text
        match = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"cannot read pattern {text!r}: write kept:group, for example 6:8 (at most 6 of 8 weights kept)")
        kept, group, unit, n, l = match.groups()  # noqa: E741
        return cls(int(kept), int(group), int(n or 2), int(l or 4), int(unit or 1))

    def __str__(self) -> str:
        return self.text

    @property
    def windows(self) -> int:
        """Windows per group, H - 1 on 2:4 hardware."""
        return (self.group - self.l) // self.n + 1

    @property
    def slid_group(self) -> int:
        """Units a group takes after sliding (OG)."""
        return self.windows * self.l

    @property
    def dropped(self) -> int:
        """Positions per group that hold no stored value."""
        return self.group - self.kept

    @property
    def density(self) -> float:
        """Fraction of weights kept."""
        return self.kept / self.group

    @property
    def gamma(self) -> float:
        """K'/K of full groups."""
        return self.slid_group / self.group

    @property
    def bound(self) -> float:
        """The speed-up no exact computation can exceed when the hardware doubles its rate: 1/density."""
        return 1.0 / self.density

    @cached_property
    def lift_offsets(self) -> tuple[int, ...]:
        """For each unit of a slid group, the unit of the source group it reads."""
        return tuple(self.n * window + lane for window in range(self.windows) for lane in range(self.l))

    def units(self, k: int) -> int:
        """Units in a row of ``k`` weights.

        Raises:
            ValueError: ``k`` is negative or not a whole number of units.
        """
        if k < 0 or k % self.unit:
            raise ValueError(f"K = {k} is not a whole number of units of {self.unit} (pattern {self})")
        return k // self.unit

    def groups(self, k: int, offset: int = 0) -> int:
        """Groups a row of ``k`` weights touches when it starts ``offset`` units into its first group.

        Raises:
            ValueError: ``offset`` outside ``0 … group - 1``.
        """
        if not 0 <= offset < self.group:
            raise ValueError(f"offset {offset} lies outside a group of {self.group} (pattern {self})")
        units = self.units(k)
        return -(-(offset + units) // self.group) if units else 0

    def slid_k(self, k: int, offset: int = 0) -> int:
        """K' in weights: the width of the slid row."""
        return self.groups(k, offset) * self.slid_group * self.unit

    def packed_k(self, k: int) -> int:
        """Stored values per row, in weights."""
        return self.groups(k) * self.kept * self.unit

    def keep_bytes(self, k: int) -> int:
        """Bytes of keep-bits per row: one bit per unit of the padded row."""
        return -(-self.groups(k) * self.group // 8)

    def lift_index(self, o: int, offset: int = 0) -> int:
        """Source weight read by position ``o`` of the lifted row; may lie outside ``[0, K)``, where it reads 0."""
        unit, inner = divmod(o, self.unit)
        group, slot = divmod(unit, self.slid_group)
        return (group * self.group + self.lift_offsets[slot] - offset) * self.unit + inner


parsed = lru_cache(Pattern.parse)
"""`Pattern.parse` for what is asked in every call."""


def _advice(kept: int, group: int, n: int, l: int) -> str:  # noqa: E741
    """The patterns that keep about as much, and if there is one the tightest that all weights with ``kept`` of every ``group`` obey."""
    zeros, asked = l - n, kept / group
    near = sorted(sorted(range(l, _MAX_GROUP + 1, n), key=lambda size: abs(1 - zeros / size - asked))[:3])
    names = ", ".join(f"{size - zeros}:{size}" for size in near)
    return f"; supported ones that keep about as much: {names}{_holds(kept, group, n, l)}"


def _holds(kept: int, group: int, n: int, l: int) -> str:  # noqa: E741
    zeros = l - n
    multiples = [group * times for times in range(1, _MAX_GROUP // group + 1)]
    divisors = [part for part in range(l, group) if group % part == 0]
    # The most weights that a group of that size can have: a whole group may lie in a part of it.
    most = {size: min(kept, size) for size in divisors} | {size: kept * size // group for size in multiples}
    valid = [size for size, count in most.items() if count <= size - zeros and size >= l and (size - l) % n == 0]
    return f" (weights that are {kept}:{group} obey {min(valid) - zeros}:{min(valid)})" if valid else ""


KNOWN = tuple(Pattern(group - 2, group) for group in range(4, 20, 2))
"""2:4, 4:6, … 16:18: the patterns detection looks for, tightest first."""


def tightest_first(patterns: Iterable[Pattern]) -> tuple[Pattern, ...]:
    """Patterns by the share of weights they keep: the order in which weights are held against several."""
    return tuple(sorted(patterns, key=lambda pattern: (pattern.density, pattern.group, str(pattern))))
