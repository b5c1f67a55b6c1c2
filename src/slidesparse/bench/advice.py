"""Advice: what each pattern and scheme would gain on a card for these layers, what that costs, and one sentence of recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..format import SCHEMES, packed_tensors
from ..gemm.choose import DENSE, GUARD
from ..gemm.kernels import kernels
from ..gemm.plan import Plan
from ..pattern import Pattern
from .accuracy import Loss, losses
from .estimate import MEASURED, MODEL, UNPRUNED, Estimate, Estimates, phase
from .models import Shape, slid_bytes
from .recommend import recommended

TOKENS = (1, 16, 64, 1024, 4096)
SCHEME_NAMES = ("int8", "fp8", "bf16")
TUNED = ("6:8", "2:4")
"""Patterns that are measured where there is a GPU."""
PATTERNS = ("2:4", "4:6", "6:8", "8:10", "10:12", "12:14", "14:16")


@dataclass(frozen=True)
class Speed:
    """The layers at one number of tokens: microseconds of all, and how many times as fast as the best dense ones of 8 and of 16 bits."""

    m: int
    us: float
    against_8_bits: float | None
    against_16_bits: float | None
    source: str
    at: int

    @property
    def tokens_per_second(self) -> float:
        """Of the linear layers alone."""
        return self.m / self.us * 1e6


@dataclass(frozen=True)
class Option:
    """A pattern and a scheme on sparse tensor cores, or dense weights of a scheme."""

    pattern: str
    scheme: str
    stored_bytes: int
    resident_bytes: int
    of_dense_16_bits: float
    speeds: list[Speed]
    pays_from: int | None
    study: list[Loss] = field(default_factory=list)

    @property
    def rival_bits(self) -> int:
        """Weights of 8 bits are held against dense ones of 8 bits, others against those of 16."""
        return 8 if SCHEMES[self.scheme].dynamic else 16

    def gains(self) -> dict[int, float]:
        """Times as fast as the best dense weights of as many bits, by number of tokens."""
        found = {each.m: each.against_8_bits if self.rival_bits == 8 else each.against_16_bits for each in self.speeds}
        return {m: gain for m, gain in found.items() if gain is not None}

    def ranges(self, bits: int) -> dict[str, tuple[float, float]]:
        """Least and most times as fast as the best dense weights of so many bits, in decode and in prefill, as far as is known."""
        found: dict[str, list[float]] = {}
        for speed in self.speeds:
            gain = speed.against_8_bits if bits == 8 else speed.against_16_bits
            if gain is not None:
                found.setdefault(phase(speed.m), []).append(gain)
        return {name: (min(gains), max(gains)) for name, gains in found.items()}


@dataclass(frozen=True)
class Advice:
    """What is printed: the layers, where times come from, dense weights, the options, the recommendation, and what to keep in mind."""

    target: str
    card: str
    origin: str
    layers: dict[str, int]
    dense: list[Option]
    options: list[Option]
    recommendation: str
    notes: list[str]


def advise(
    target: str, shapes: Mapping[Shape, int], plan: Plan, origin: str, *, tokens: Sequence[int] = TOKENS, notes: Sequence[str] = ()
) -> Advice:
    """Advice for layers of these shapes, so many of each, from the times of a plan; ``notes`` are what the target has besides."""
    times = Estimates(plan)
    totals = {scheme: _totals(times, shapes, scheme, UNPRUNED, tokens) for scheme in SCHEME_NAMES}
    best = {8: _best([totals["int8"], totals["fp8"]]), 16: _best([totals["bf16"]])}
    dense = [_option(UNPRUNED, scheme, shapes, totals[scheme], best) for scheme in SCHEME_NAMES]
    options = [
        _option(pattern, scheme, shapes, _totals(times, shapes, scheme, pattern, tokens), best)
        for pattern in PATTERNS
        for scheme in SCHEME_NAMES
    ]
    dense, options = ([each for each in found if each.speeds] for found in (dense, options))
    layers = {f"{n} × {k}": count for (n, k), count in shapes.items()}
    told = [*notes, *_notes(plan, [*dense, *options])]
    return Advice(target, plan.machine.gpu, origin, layers, dense, options, recommended(dense, options), told)


def _totals(times: Estimates, shapes: Mapping[Shape, int], scheme: str, pattern: str, tokens: Sequence[int]) -> dict[int, Estimate]:
    """Sums over the layers; numbers of tokens at which one of them is not known are left out."""
    found = {}
    for m in tokens:
        parts = [(times.of(n, k, scheme, pattern, m), count) for (n, k), count in shapes.items()]
        known = [(part, count) for part, count in parts if part is not None]
        if len(known) == len(parts):
            source = MEASURED if all(part.source == MEASURED for part, _ in known) else MODEL
            found[m] = Estimate(sum(part.us * count for part, count in known), source, max(part.at for part, _ in known))
    return found


def _best(kinds: Sequence[Mapping[int, Estimate]]) -> dict[int, float]:
    tokens = sorted({m for kind in kinds for m in kind})
    return {m: min(kind[m].us for kind in kinds if m in kind) for m in tokens}


def _option(
    pattern: str, scheme: str, shapes: Mapping[Shape, int], totals: Mapping[int, Estimate], best: Mapping[int, Mapping[int, float]]
) -> Option:
    speeds = []
    for m, total in sorted(totals.items()):
        eight, of_16 = (best[bits][m] / total.us if m in best[bits] else None for bits in (8, 16))
        speeds.append(Speed(m, total.us, eight, of_16, total.source, total.at))
    stored, resident = (sum(count * size(n, k, scheme, pattern) for (n, k), count in shapes.items()) for size in (_stored, _resident))
    sixteen = sum(2 * n * k * count for (n, k), count in shapes.items())
    option = Option(pattern, scheme, stored, resident, stored / sixteen, speeds, None, [] if pattern == UNPRUNED else losses(pattern))
    return option if pattern == UNPRUNED else replace(option, pays_from=pays_from(option.gains()))


def _stored(n: int, k: int, scheme: str, pattern: str) -> int:
    """Bytes on disk, and in memory where the packed form alone is kept; scales, which every form needs, are not counted."""
    if pattern == UNPRUNED:
        return n * k * SCHEMES[scheme].dtype.itemsize
    return sum(spec.nbytes for spec in packed_tensors(SCHEMES[scheme], Pattern.parse(pattern), n, k)[:2])


def _resident(n: int, k: int, scheme: str, pattern: str) -> int:
    """Bytes in memory, as slid weights where they are not dense."""
    item = SCHEMES[scheme].dtype.itemsize
    return n * k * item if pattern == UNPRUNED else slid_bytes(n, k, Pattern.parse(pattern), item)


def pays_from(gains: Mapping[int, float]) -> int | None:
    """The number of tokens from which on, as far as is known, every gain is beyond the guard; None if there is none."""
    found = None
    for m in sorted(gains, reverse=True):
        if gains[m] <= GUARD:
            break
        found = m
    return found


def _not_timed(plan: Plan) -> list[str]:
    """Kernels for sparse tensor cores that no cell of the plan has met: they came after it."""
    met = {name for table in plan.cells.values() for cell in table.values() for name in cell.met}
    return [name for name, kernel in kernels().items() if kernel.worth_timing and not set(kernel.layouts) <= set(DENSE) and name not in met]


def _notes(plan: Plan, options: Sequence[Option]) -> list[str]:
    notes = [
        "Speeds are of the linear layers alone, against the best dense weights of as many bits, int8 or fp8 where they are 8.",
        "In vLLM a packed model can gain more: SiLU, norms and quantisation run fused.",
    ]
    speeds = [speed for option in options for speed in option.speeds]
    if any(speed.source == MODEL for speed in speeds):
        notes.append("~ is a model of bytes and rates, fitted to measured layers: held against others, mostly within 10 %, up to 50 % off.")
    moved = sorted({(speed.m, speed.at) for speed in speeds if speed.at != speed.m and speed.source == MEASURED})
    notes += [f"Where {m} {'token was' if m == 1 else 'tokens were'} not measured, {at} stand for it." for m, at in moved]
    if later := _not_timed(plan):
        notes.append(f"These times are older than kernel {' and '.join(later)}, which may be faster: run the command on the card itself.")
    notes.append("Where sparse is slower than dense, dense runs: only bytes on disk and accuracy change then.")
    return notes
