"""Fast packing: dense masked weights ↔ kept values and keep-bits, and the slid layout derived from them."""

from .checks import check_packed, check_scale
from .codes import integer_view, without_negative_zeros
from .obeys import detect, find_violation
from .pack import pack, restore, slid_mask, slide, unpack_keep
from .sharding import Shard

__all__ = [
    "Shard",
    "check_packed",
    "check_scale",
    "detect",
    "find_violation",
    "integer_view",
    "pack",
    "restore",
    "slid_mask",
    "slide",
    "unpack_keep",
    "without_negative_zeros",
]
