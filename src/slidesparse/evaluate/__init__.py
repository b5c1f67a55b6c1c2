"""Running and scoring models: perplexity, and continuing a prompt."""

from .generation import complete, tokenize_file
from .perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "complete", "perplexity", "tokenize_file"]
