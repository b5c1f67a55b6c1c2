"""Checkpoints on disk: streaming conversion, inspection and verification of safetensors directories."""

from .calibration import Calibration
from .convert import ConversionReport, ConvertedLayer, convert
from .inspection import InspectedLayer, Inspection, inspect
from .norms import NORMS, read_norms
from .overrides import read_overrides
from .recipe import Recipe
from .solved import PruningReport
from .source import Checkpoint
from .verify import LayerVerdict, VerifyReport, verify

__all__ = [
    "NORMS",
    "Calibration",
    "Checkpoint",
    "ConversionReport",
    "ConvertedLayer",
    "InspectedLayer",
    "Inspection",
    "LayerVerdict",
    "PruningReport",
    "Recipe",
    "VerifyReport",
    "convert",
    "inspect",
    "read_norms",
    "read_overrides",
    "verify",
]
