"""Names of peft that its next version may drop. Importing this imports peft, so only `integrations` may.

peft documents the registration of layers for LoRA as an experimental interface, under a name with an underscore.
"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedError

try:
    from peft.tuners.lora.layer import Linear as LoraLinear
except ImportError as error:
    raise UnsupportedError(f"LoRA on packed layers needs peft: pip install 'peft>=0.18' ({error})") from error

__all__ = ["LoraLinear", "register_layer"]


def register_layer(config: Any, layer: type, adapter: type) -> None:
    """Let a LoraConfig put ``adapter`` around every ``layer``.

    Raises:
        UnsupportedError: the configuration, or this version of peft, has no such registration.
    """
    register = getattr(config, "_register_custom_module", None)
    if register is None:
        raise UnsupportedError(f"this {type(config).__name__} takes no layers of other packages: give a LoraConfig of peft 0.18 or newer")
    register({layer: adapter})
