"""Running and scoring models: perplexity, distance from a reference, scores on tasks, and continuing a prompt."""

from .divergence import DivergenceResult, divergence
from .generation import check_fits, check_predicts, complete, read_text, tokenize_file
from .perplexity import PerplexityResult, perplexity
from .windows import windows_per_pass

__all__ = [
    "DivergenceResult",
    "PerplexityResult",
    "check_fits",
    "check_predicts",
    "complete",
    "divergence",
    "perplexity",
    "read_text",
    "tokenize_file",
    "windows_per_pass",
]
