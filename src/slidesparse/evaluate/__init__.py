"""Running and scoring models: perplexity, and continuing a prompt."""

from .generation import check_fits, complete, read_text, tokenize_file
from .perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "check_fits", "complete", "perplexity", "read_text", "tokenize_file"]
