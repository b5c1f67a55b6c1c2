"""The oracle: prune, pack, restore, slide, lift, quantise and the linear layer, straight from their definitions.

Plain PyTorch on any device, written to be read and to be trusted, not to be fast: the windows are walked greedily (SlideSparse,
arXiv 2603.05232), never by the closed form that the fast paths use. `offset` is the number of units by which a row's first
group began before the row does (a shard whose edge cuts a group).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import PatternError
from .format import Packed, Scheme
from .pattern import Pattern


def grouped(x: Tensor, pattern: Pattern, offset: int = 0, outside: float = 0) -> Tensor:
    """Cut rows into groups: ``[R, K]`` → ``[R, groups, group, unit]``, positions outside the row set to ``outside``."""
    rows, k = x.shape
    width = pattern.groups(k, offset) * pattern.group * pattern.unit
    padded = torch.full((rows, width), outside, dtype=x.dtype, device=x.device)
    padded[:, offset * pattern.unit : offset * pattern.unit + k] = x
    return padded.unflatten(1, (-1, pattern.group, pattern.unit))


def ungrouped(groups: Tensor, pattern: Pattern, k: int, offset: int = 0) -> Tensor:
    """Undo `grouped`: ``[R, groups, group, unit]`` → ``[R, k]``."""
    start = offset * pattern.unit
    return groups.flatten(1)[:, start : start + k]


def prune_mask(weight: Tensor, pattern: Pattern, offset: int = 0) -> Tensor:
    """True where magnitude pruning keeps a weight: per group the smallest magnitudes go, ties to the lowest index.

    ``weight [N, K]`` → bool ``[N, K]``. A pair's magnitude is the float32 sum of its two. Positions outside the row go first.
    """
    magnitude = grouped(weight.float().abs(), pattern, offset, outside=-1.0).sum(-1)
    order = magnitude.sort(dim=-1, stable=True).indices
    keep = torch.ones_like(magnitude, dtype=torch.bool)
    keep.scatter_(-1, order[..., : pattern.dropped], False)
    return ungrouped(keep.unsqueeze(-1).expand(-1, -1, -1, pattern.unit), pattern, weight.shape[1], offset)


def prune(weight: Tensor, pattern: Pattern, offset: int = 0) -> Tensor:
    """Magnitude-pruned copy of ``weight [N, K]``; what goes becomes +0.0."""
    return torch.where(prune_mask(weight, pattern, offset), weight.float(), torch.zeros((), device=weight.device)).to(weight.dtype)


def keep_mask(weight: Tensor, pattern: Pattern, offset: int = 0) -> Tensor:
    """Kept units of the canonically filled groups: ``weight [N, K]`` → bool ``[N, groups, group]``, ``kept`` true in each.

    A group with more zeros than the pattern drops keeps its lowest zero positions; positions outside the row are zeros too.

    Raises:
        PatternError: a group has more non-zero units than the pattern keeps.
    """
    nonzero = (grouped(weight.float(), pattern, offset) != 0).any(-1)
    excess = nonzero.sum(-1) > pattern.kept
    if excess.any():
        row, group = (int(i) for i in excess.nonzero()[0])
        values = tuple(grouped(weight.float(), pattern, offset)[row, group].flatten().tolist())
        raise PatternError(
            f"row {row}, group {group}: {int(nonzero[row, group].sum())} non-zero of {pattern.group}, pattern {pattern} "
            f"keeps {pattern.kept}: {values}",
            row=row,
            group=group,
            values=values,
        )
    wanted = pattern.kept - nonzero.sum(-1, keepdim=True)
    zero = ~nonzero
    return nonzero | (zero & (zero.cumsum(-1) <= wanted))


def pack(weight: Tensor, pattern: Pattern) -> Packed:
    """Store ``weight [N, K]`` as kept values in K order plus keep-bits, least significant bit first; −0.0 becomes +0.0.

    Raises:
        PatternError: see `keep_mask`.
    """
    n, k = weight.shape
    keep = keep_mask(weight, pattern)
    values = grouped(_bits_of(weight), pattern)[keep].view(weight.dtype)
    bits = keep.flatten(1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    weights_of_bits = torch.tensor([1 << i for i in range(8)], device=weight.device)
    return Packed(values.reshape(n, pattern.packed_k(k)), (bits * weights_of_bits).sum(-1).to(torch.uint8), pattern, k)


def unpack_keep(packed: Packed) -> Tensor:
    """Keep-bits as bool ``[N, groups, group]``."""
    shifts = torch.arange(8, device=packed.keep.device)
    bits = (packed.keep.unsqueeze(-1).int() >> shifts & 1).bool().flatten(1)
    pattern = packed.pattern
    return bits[:, : pattern.groups(packed.k) * pattern.group].unflatten(1, (-1, pattern.group))


def restore(packed: Packed) -> Tensor:
    """Packed → dense ``[N, K]``, bitwise the masked weights."""
    keep = unpack_keep(packed)
    pattern, bits = packed.pattern, _bits(packed.values.dtype)
    groups = torch.zeros((*keep.shape, pattern.unit), dtype=bits, device=packed.values.device)
    groups[keep] = packed.values.view(bits).reshape(-1, pattern.unit)
    return ungrouped(groups, pattern, packed.k).contiguous().view(packed.values.dtype)


def slide(weight: Tensor, pattern: Pattern, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Slide ``weight [N, K]`` → ``[N, K']`` and the bool mask of occupied positions, greedily by the window definition.

    Windows of l units at stride n, left to right; each takes the first n kept units not placed before. −0.0 becomes +0.0.

    Raises:
        PatternError: see `keep_mask`.
    """
    keep = keep_mask(weight, pattern, offset)
    groups = grouped(_bits_of(weight), pattern, offset)
    rows, count = keep.shape[:2]
    slid = torch.zeros((rows, count, pattern.windows, pattern.l, pattern.unit), dtype=groups.dtype, device=weight.device)
    occupied = torch.zeros(slid.shape[:-1], dtype=torch.bool, device=weight.device)
    waiting = keep.clone()
    for window in range(pattern.windows):
        taken = torch.zeros((rows, count), dtype=torch.int64, device=weight.device)
        for lane in range(pattern.l):
            position = window * pattern.n + lane
            take = waiting[:, :, position] & (taken < pattern.n)
            slid[:, :, window, lane][take] = groups[:, :, position][take]
            occupied[:, :, window, lane] = take
            waiting[:, :, position] &= ~take
            taken += take
    if waiting.any():
        raise PatternError(f"pattern {pattern}: the windows left kept weights unplaced")
    return slid.flatten(1).view(weight.dtype), occupied.unsqueeze(-1).expand_as(slid).flatten(1)


def lift(x: Tensor, pattern: Pattern, offset: int = 0) -> Tensor:
    """Lift activations ``[M, K]`` → ``[M, K']``: position o reads `Pattern.lift_index` (o), 0 outside the row."""
    k = x.shape[1]
    wide = pattern.group * pattern.unit
    first = torch.tensor([pattern.lift_index(o, offset) for o in range(pattern.slid_group * pattern.unit)], device=x.device)
    index = (torch.arange(pattern.groups(k, offset), device=x.device).unsqueeze(-1) * wide + first).flatten()  # every group reads alike
    inside = (index >= 0) & (index < k)
    lifted = x.view(_bits(x.dtype))[:, index.clamp(0, max(k - 1, 0))] if k else x.view(_bits(x.dtype))
    return lifted.masked_fill(~inside, 0).view(x.dtype)


def quantize(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic quantisation of each row: ``x [R, K]`` → q ``[R, K]`` of the scheme's dtype, scale float32 ``[R, 1]``.

    s = max|x| / Q by IEEE division, 1 where that is zero; q = clamp(round-to-nearest-even(x / s), ±Q). A row that holds NaN or Inf
    gets s = NaN and q = 0, so that its output, and no other row's, is NaN.
    """
    bound = scheme.largest
    x32 = x.to(torch.float32)
    largest = x32.abs().amax(-1, keepdim=True) if x.shape[1] else x32.new_zeros(x.shape[0], 1)
    # A tensor, not a number, as divisor: CUDA multiplies by the reciprocal of a number, which is not IEEE division.
    scale = largest / torch.full_like(largest, bound)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scale = torch.where(torch.isfinite(largest), scale, torch.full_like(scale, torch.nan))
    q = x32 / scale
    if scheme.dtype == torch.int8:
        q = q.round()
    q = q.clamp(-bound, bound)
    poisoned = scale.isnan().squeeze(-1)
    if poisoned.any():
        q[poisoned] = 0.0
    return q.to(scheme.dtype), scale


def linear(
    q: Tensor, x_scale: Tensor | None, weight: Tensor, w_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """y = (Σ q_w·q_x) · s_w · s_x + bias: ``q [M, K]``, ``weight [N, K]`` → ``[M, N]``, one rounding to ``out_dtype``.

    The sum is exact for integers (float64 holds it) and rounded once to float32; scales and bias act in float32.
    """
    y = (q.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.float32)
    if q.dtype == torch.int8:
        y = y + 0.0  # an integer has no negative zero
    row, column = (None if scale is None else scale.to(torch.float32) for scale in (x_scale, w_scale))
    return scaled(y, None if row is None else row.view(-1, 1), None if column is None else column.view(1, -1), bias, out_dtype)


def scaled(acc: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scales ``[M, 1]`` and ``[N]`` or ``[1, N]``, then a bias ``[N]``, in float32, rounded once to ``dtype``: ``acc [M, N]`` → ``[M, N]``.

    Without scales and bias, and in acc's own type, the result may be acc itself.
    """
    y = acc.to(torch.float32)
    if w_scale is not None:
        y = y * w_scale
    if x_scale is not None:
        y = y * x_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(dtype)


def _bits_of(weight: Tensor) -> Tensor:
    """The bits of every weight as an integer, those of +0.0 where it is −0.0."""
    return weight.view(_bits(weight.dtype)).masked_fill(weight.float() == 0, 0)


def _bits(dtype: torch.dtype) -> torch.dtype:
    """The integer type of the same width: torch indexes and masks every integer type, but not every float8."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
