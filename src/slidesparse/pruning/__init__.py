"""Pruning to kept:group patterns: one method, one file, all behind `prune`."""

from .admm import admm
from .magnitude import magnitude
from .methods import METHODS, Method, method_named, prune
from .random import random
from .rounding import round_to_grid
from .sparsegpt import sparsegpt
from .statistics import Gathering, Statistics, layer_error
from .wanda import wanda

__all__ = [
    "METHODS",
    "Gathering",
    "Method",
    "Statistics",
    "admm",
    "layer_error",
    "magnitude",
    "method_named",
    "prune",
    "random",
    "round_to_grid",
    "sparsegpt",
    "wanda",
]
