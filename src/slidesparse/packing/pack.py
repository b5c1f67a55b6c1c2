"""pack, restore and slide by the closed form: kept unit number j of a group goes to window ⌊j/n⌋.

Bitwise equal to `slidesparse.reference`, vectorised over whole row blocks, on any device.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..format import Packed
from ..pattern import Pattern
from .codes import by_group, by_position, integer_view, pad_to_groups, unit_codes
from .obeys import violation

# Multiplying eight 0/1 bytes by this gathers their lowest bits into the top byte, first byte lowest.
_GATHER = 0x0102040810204080


def pack(weight: Tensor, pattern: Pattern | str, offset: int = 0, *, first_row: int = 0) -> Packed:
    """Store ``weight [N, K]`` (any dtype of a scheme, or float32) as kept values in K order plus keep-bits.

    With an ``offset`` the row starts that many units into its first group, and the result covers the padded row.

    Raises:
        PatternError: see `obeys.find_violation`, which ``first_row`` is for.
        ValueError: an unknown pattern.
    """
    pattern, (n, k) = Pattern.parse(pattern), weight.shape
    codes = pad_to_groups(unit_codes(weight, pattern), pattern, offset)
    keep = _filled_keep(codes, pattern)
    if keep is None:
        raise violation(weight, codes, pattern, offset, first_row=first_row)
    values = _select(codes, keep).view(weight.dtype)
    width = k if offset == 0 else codes.shape[1] * pattern.unit
    return Packed(values.view(n, pattern.packed_k(width)), _pack_bits(keep), pattern, width)


def restore(packed: Packed) -> Tensor:
    """Packed → dense ``[N, K]``, bitwise the masked weights (with +0.0 for every zero)."""
    pattern = packed.pattern
    keep = unpack_keep(packed)
    codes = integer_view(packed.values, pattern.unit)
    dense = codes.new_zeros(keep.shape)
    dense.masked_scatter_(keep, codes)
    return dense[:, : pattern.units(packed.k)].contiguous().view(packed.values.dtype)


def unpack_keep(packed: Packed) -> Tensor:
    """Keep-bits as bool ``[N, groups·group]``, one per unit of the padded row."""
    flags = _byte_flags(packed.keep) if packed.keep.device.type == "cpu" else _bit_flags(packed.keep)
    return flags[:, : packed.pattern.groups(packed.k) * packed.pattern.group]


def slid_mask(packed: Packed) -> Tensor:
    """Occupied positions of the slid row: bool ``[N, groups·slid_group]`` (units), n true in every window."""
    pattern = packed.pattern
    keep = unpack_keep(packed).unflatten(1, (-1, pattern.group))
    window = (keep.to(torch.int8).cumsum(-1, dtype=torch.int8) - 1) // pattern.n
    mask = [
        keep[..., w * pattern.n : w * pattern.n + pattern.l] & (window[..., w * pattern.n : w * pattern.n + pattern.l] == w)
        for w in range(pattern.windows)
    ]
    return torch.cat(mask, dim=-1).flatten(1) if mask else keep.flatten(1)


def slide(packed: Packed) -> Tensor:
    """The slid matrix ``[N, K']``: the packed values, in the order they are stored, spread over their windows' lanes."""
    mask = slid_mask(packed)
    codes = integer_view(packed.values, packed.pattern.unit)
    slid = codes.new_zeros(mask.shape)
    slid.masked_scatter_(mask, codes)
    return slid.view(packed.values.dtype)


def _select(codes: Tensor, keep: Tensor) -> Tensor:
    """The kept codes in K order, flat; numpy's compress is five times faster than torch's masked select on a CPU."""
    if codes.device.type != "cpu" or codes.numel() == 0:  # numpy gives an empty array stride 0
        return codes[keep]
    return torch.from_numpy(np.compress(keep.numpy().ravel(), codes.numpy().ravel()))


def _filled_keep(codes: Tensor, pattern: Pattern) -> Tensor | None:
    """Bool like ``codes [N, groups·group]``: all but the last ``dropped`` zeros of every group, which is the canonical fill.

    None where a group has too few zeros.
    """
    zero = codes == 0
    lanes = by_position(zero.view(-1, pattern.group))  # one contiguous row per position: every step below is a vector operation
    count = torch.zeros(lanes.shape[1], dtype=torch.uint8, device=codes.device)
    for position in reversed(range(pattern.group)):
        lane = lanes[position]
        lane &= count < pattern.dropped
        count += lane
    if bool((count < pattern.dropped).any()):
        return None
    return by_group(lanes.logical_not_()).view(zero.shape)


def _pack_bits(keep: Tensor) -> Tensor:
    """Bool ``[N, P]`` → uint8 ``[N, ceil(P/8)]``, bit i of byte j = position 8j + i."""
    keep = F.pad(keep, (0, -keep.shape[1] % 8)) if keep.shape[1] % 8 else keep.contiguous()
    eight = keep.view(torch.uint8).view(-1).view(torch.int64).view(keep.shape[0], keep.shape[1] // 8)
    return (eight * _GATHER >> 56 & 0xFF).to(torch.uint8)


def _bit_flags(keep: Tensor) -> Tensor:
    """As `_byte_flags`, on any device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (keep.unsqueeze(-1) >> shifts).bitwise_and_(1).view(torch.bool).flatten(1)


def _byte_flags(keep: Tensor) -> Tensor:
    """uint8 ``[N, B]`` → bool ``[N, 8·B]`` through a table of the 256 bytes."""
    table = torch.arange(256).unsqueeze(-1).bitwise_right_shift(torch.arange(8)).bitwise_and_(1).to(torch.uint8)
    return table.view(torch.int64).view(-1)[keep.int()].view(torch.uint8).view(torch.bool)
