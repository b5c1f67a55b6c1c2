"""Calibrated pruning of transformers models, block by block."""

from .streaming import solve

__all__ = ["solve"]
