"""Modules that run packed weights, and the call that puts them into a model."""

from .linear import SlideSparseLinear
from .pack_model import PackingReport, pack_model, packing_report
from .placement import Placement, place
from .restore_model import restore_model

__all__ = ["PackingReport", "Placement", "SlideSparseLinear", "pack_model", "packing_report", "place", "restore_model"]
