"""transformers: after this module is imported, ``from_pretrained`` loads packed checkpoints.

Importing it registers the quantisation method ``slidesparse`` with transformers' public registry, and does nothing else.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..checkpoint.source import read_config
from ..compat.transformers import (
    INITIALISED,
    AutoTokenizer,
    HfQuantizer,
    PreTrainedModel,
    QuantizationConfigMixin,
    register_method,
    tied_weights,
)
from ..errors import CheckpointError, WeightError
from ..format import BLOCK, QUANT_METHOD, PackedConfig, Scheme
from ..gemm import Problem
from ..gemm.layouts import LAYOUTS
from ..nn import SlideSparseLinear, pack_model, place, restore_model
from ..nn.describe import model_config
from ..pattern import Pattern
from ..select import matches
from .calibration import TOKENIZER_FILES
from .classes import auto_class, check_code, named_class
from .faults import one_line
from .hub import model_folder
from .transformers_files import StoredTensors, check_layer, check_rest, restore_scales

_LOG = getLogger(__name__)


class SlideSparseConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint, as transformers sees it.

    Raises:
        CheckpointError: see `PackedConfig.from_dict`.
    """

    def __init__(self, **data: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.packed = PackedConfig.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return self.packed.to_dict()

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())


class SlideSparseQuantizer(HfQuantizer):
    """Puts `SlideSparseLinear` in the place of every packed nn.Linear before weights are loaded, and checks them afterwards."""

    requires_calibration = True  # a dense checkpoint is not packed on the fly: that is what `pack_model` and `slidesparse pack` do
    quantization_config: SlideSparseConfig

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        config = self.quantization_config.packed
        stored = StoredTensors.read(model, checkpoint_files) if checkpoint_files else None
        for name, linear in [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
            layer = name if stored is None else stored.layer_name(name)
            if self._stays_dense(model, config, name, layer, stored):
                continue
            packed = _empty_layer(config, layer, linear)
            packed.name = layer
            setattr(packed, INITIALISED, True)  # its tensors come from the checkpoint; it has no weight to initialise
            packed.weight_marks[INITIALISED] = True  # nor have the modules around it
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)
            if stored is not None:
                check_layer(stored, config, name, packed)
        if stored is not None:
            check_rest(stored, model, config.ignore)

    def _stays_dense(self, model: nn.Module, config: PackedConfig, name: str, layer: str, stored: StoredTensors | None) -> bool:
        ignored = config.ignores(layer) or config.ignores(name)
        if stored is None:
            return ignored
        if f"{name}.weight_values" in stored.tensors:
            if ignored:
                raise CheckpointError(f"{stored.where}: layer {layer} is packed, but config.json lists it under ignore")
            return False
        if ignored or f"{name}.weight" in tied_weights(model):
            return True
        # A head that the checkpoint never had, as in a classifier on a language model's body.
        new = not stored.strict and f"{name}.weight" not in stored.tensors
        if new:
            config.ignore.append(name)  # `save_pretrained` writes it dense, and says so
        return new

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for module in model.modules():
            if not isinstance(module, SlideSparseLinear):
                continue
            values = module.weight_values
            if values.is_floating_point() and values.dtype != module.scheme.dtype:
                # transformers widens whole modules it knows to need float32; the values came through unharmed.
                module.weight_values = values.to(module.scheme.dtype)
            try:
                module.check()
            except WeightError as error:
                raise CheckpointError(str(error)) from error
        for inner in model.modules():
            if inner is not model and isinstance(inner, PreTrainedModel):
                inner.hf_quantizer = self._of_inner()

    def _of_inner(self) -> SlideSparseQuantizer:
        """That of a model inside: saved alone, its layers have other names, and often its configuration is one of its own."""
        own = copy(self)
        own.quantization_config = SlideSparseConfig(
            **replace(self.quantization_config.packed, ignore=[], overrides={}, in_features={}).to_dict()
        )
        return own

    def adjust_max_memory(self, max_memory: dict[int | str, int | str]) -> dict[int | str, int | str]:
        """So much less of a GPU for the packed weights as the dense copies that may run in their place are larger."""
        packed = self.quantization_config.packed
        sizes = [_packed_share(packed.scheme, pattern) for pattern in (packed.pattern, *packed.overrides.values())]
        share = min(1.0, *sizes)
        return {
            place: int(room * share) if isinstance(place, int) and isinstance(room, int) else room for place, room in max_memory.items()
        }

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the packed form again."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Nothing; transformers asks before it saves the configuration, which then tells what the model holds: layers may be others."""
        found = model_config(model, self.quantization_config.packed)
        for inner in model.modules():
            if isinstance(inner, PreTrainedModel) and inner.config is not model.config:
                vars(inner.config).pop("quantization_config", None)  # from when it was saved alone
        if found is None:
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            return None, {}
        self.quantization_config.packed = found
        model.config.quantization_config = self.quantization_config
        return None, {}

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """The masked dense model, in place; see `slidesparse.restore_model`."""
        restore_model(model, dtype=dtype)
        self.remove_quantization_config(model)
        return model

    @property
    def is_trainable(self) -> bool:
        """Gradients reach what stands before packed layers, such as adapters; see `slidesparse.integrations.peft`."""
        return True


def register() -> None:
    """Register with transformers; does nothing the second time."""
    register_method(QUANT_METHOD, SlideSparseConfig, SlideSparseQuantizer)


register()


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "auto",
    memory: str = "fast",
    tokenizer: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model and its tokenizer from a directory, or of a name on the hub: packed, a dense twin (packed on the way), or plain dense.

    The model is of the class that config.json names, or a causal language model where transformers does not have it.

    Args:
        dtype: type of everything that is not packed; ``auto`` takes that of config.json.
        device: where it is to run; ``auto`` takes a GPU if there is one.
        memory: how packed layers use the device's memory, see `slidesparse.nn.place`.
        tokenizer: False gives None in its place.
        trust_remote_code: run Python files that the model brings.

    Raises:
        CheckpointError: not a model directory, a damaged checkpoint, an architecture transformers does not know, no tokenizer.
        PatternError: a layer of a dense twin does not obey what config.json says of it; names layer, row, group and values.
    """
    path = model_folder(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = Checkpoint.open(path)
    words = open_tokenizer(path, trust_remote_code) if tokenizer else None
    model = open_model(path, dtype, named_class(checkpoint.config), trust_remote_code)
    if checkpoint.marker is not None:
        shards, unclaimed = [str(path / shard) for shard in checkpoint.shards], checkpoint.marked_ignore
        stored = StoredTensors.read(model, shards)  # config.json names layers as the files do, not as every class does
        linear = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)]
        ignore = [*unclaimed, *(name for name in linear if matches(stored.layer_name(name), list(unclaimed)))]
        pack_model(model, ignore=ignore, candidates=checkpoint.marked_patterns(), strict=True)
        restore_scales(model, shards)
    _LOG.info("%s", place(model.eval(), device, memory=memory))
    return model, words


def open_model(path: Path, dtype: torch.dtype | str = "auto", kind: Any = None, trust_remote_code: bool = False) -> Any:
    """A model of a class, a causal language model if none is given, on the CPU, just as transformers loads it.

    Raises:
        CheckpointError: transformers cannot load it, or has no class for it and may not run the model's; gives the reason in a line.
    """
    config = read_config(path)
    check_code(path, config, trust_remote_code)
    if kind is None or (trust_remote_code and "auto_map" in config):
        kind = auto_class(config)
    with one_line(path):
        return kind.from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=trust_remote_code).eval()


def open_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model directory.

    Raises:
        CheckpointError: there is none, or transformers cannot load it.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}): copy the one of the original model there")
    check_code(path, read_config(path), trust_remote_code)
    with one_line(path, "its tokenizer"):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)


def _packed_share(scheme: Scheme, pattern: Pattern) -> float:
    """Bytes of packed weights as a share of those of their dense copy on a GPU, in groups of the pattern and blocks of a scheme."""
    k = BLOCK * pattern.group * pattern.unit
    problem = Problem(1, k, pattern, scheme, (9, 0), torch.bfloat16 if scheme.dynamic or scheme.pair else scheme.dtype)
    return LAYOUTS["packed"].nbytes(problem) / LAYOUTS["dense"].nbytes(problem)


def _empty_layer(config: PackedConfig, layer: str, linear: nn.Linear) -> SlideSparseLinear:
    """The packed layer that takes the place of ``linear``, its tensors still to be loaded."""
    k, told = linear.in_features, config.in_features.get(layer)
    if told is not None and told != k:
        raise CheckpointError(f"layer {layer}: config.json says K = {told} (in_features), the model has {k}")
    has_bias = linear.bias is not None
    try:
        return SlideSparseLinear(
            k,
            linear.out_features,
            has_bias,
            pattern=config.pattern_of(layer),
            scheme=config.scheme,
            dtype=linear.bias.dtype if has_bias else linear.weight.dtype,
            device=linear.weight.device,
        )
    except ValueError as error:
        raise CheckpointError(f"layer {layer}: {error}") from error
