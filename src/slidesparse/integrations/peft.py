"""LoRA on packed layers, by peft: ``get_peft_model(model, packed_lora(LoraConfig(...)))``.

Packed weights stay as they are: gradients pass them on the way to the adapters.
"""

from __future__ import annotations

from typing import Any

from ..compat.peft import LoraLinear, register_layer
from ..errors import UnsupportedError
from ..nn import SlideSparseLinear

__all__ = ["LoraPackedLinear", "packed_lora"]


class LoraPackedLinear(LoraLinear):
    """peft's adapters beside a packed layer."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's, once the layer is dense.

        Raises:
            UnsupportedError: it is packed: the sum of weights and adapters would obey no pattern.
        """
        layer = self.get_base_layer()
        if isinstance(layer, SlideSparseLinear):
            raise UnsupportedError(
                f"layer {layer.name}: adapters cannot be merged into packed weights, which would obey no pattern then: "
                "call slidesparse.restore_model on the model first"
            )
        super().merge(safe_merge, adapter_names)


def packed_lora(config: Any) -> Any:
    """The LoraConfig itself, which knows packed layers afterwards; one that is read from a folder has to be told again.

    Raises:
        UnsupportedError: this version of peft takes no layers of others, or the layers are meant by ``all-linear``.
    """
    if getattr(config, "target_modules", None) == "all-linear":
        raise UnsupportedError(
            "peft means nn.Linear by all-linear, not packed layers: name these in target_modules, as ['q_proj', 'v_proj']"
        )
    register_layer(config, SlideSparseLinear, LoraPackedLinear)
    return config
