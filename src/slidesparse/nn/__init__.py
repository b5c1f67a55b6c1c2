"""Modules that run packed weights, and the call that puts them into a model."""

from .accelerate import AccelerationReport, accelerate, acceleration_report
from .linear import SlideSparseLinear
from .placement import Placement, place

__all__ = ["AccelerationReport", "Placement", "SlideSparseLinear", "accelerate", "acceleration_report", "place"]
