"""vLLM's compiler: whether a model goes through it, and what its cache must know of layers."""

from __future__ import annotations

from collections.abc import Iterable

from ... import __version__
from ...compat.vllm import CompilationMode, VllmConfig

_CACHE_KEY = "slidesparse_layers"
_PACKAGE = "package"
"""No layer's name: those begin with the model's."""


def compiles(config: VllmConfig | None) -> bool:
    """Whether a model of this configuration goes through vLLM's compiler, if not with all its parts."""
    return config is not None and config.compilation_config.mode == CompilationMode.VLLM_COMPILE


def enter_cache_key(configs: Iterable[VllmConfig | None], layer: str, whose: str) -> bool:
    """Let vLLM's compile cache tell graphs apart: whose op stands in them for a layer depends on plans, which it does not see.

    What this package's ops take is its own affair, so its version is told, too. The cache's key covers ``additional_config``. A model
    inside another is built with a configuration of its own: both are told. False where settings are of a kind that cannot be added to.
    """
    told = {id(config): config for config in configs if config is not None}.values()
    if not all(isinstance(config.additional_config, dict) for config in told):
        return False
    for config in told:
        entered = config.additional_config.get(_CACHE_KEY, {}) | {layer: whose, _PACKAGE: __version__}
        config.additional_config = config.additional_config | {_CACHE_KEY: entered}
    return True
