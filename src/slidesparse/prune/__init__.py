"""Pruning to kept:group patterns: one method, one file, all behind `prune`."""

from .magnitude import magnitude
from .methods import METHODS, Method, prune
from .random import random

__all__ = ["METHODS", "Method", "magnitude", "prune", "random"]
