"""Modules that run packed weights, and the call that puts them into a model."""

from .accelerate import AccelerationReport, accelerate, acceleration_report
from .linear import SlideSparseLinear

__all__ = ["AccelerationReport", "SlideSparseLinear", "accelerate", "acceleration_report"]
