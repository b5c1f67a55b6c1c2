"""A route: the layout of the weights, the kernel that reads them, and the kernel's variant."""

from __future__ import annotations

from typing import NamedTuple


class Route(NamedTuple):
    """Which copy of the weights is read, by which kernel, in which of its variants (empty: the kernel's own choice)."""

    layout: str
    kernel: str
    variant: str = ""

    def __str__(self) -> str:
        """``layout:kernel`` or ``layout:kernel:variant``, as plans, options and messages write it."""
        return ":".join(filter(None, self))

    @classmethod
    def parse(cls, text: str) -> Route:
        """Read what `__str__` writes.

        Raises:
            ValueError: the text names no kernel.
        """
        layout, _, rest = text.partition(":")
        kernel, _, variant = rest.partition(":")
        if not layout or not kernel:
            raise ValueError(f"{text!r} is not a route: write layout:kernel or layout:kernel:variant")
        return cls(layout, kernel, variant)
