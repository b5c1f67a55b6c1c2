"""What lies in a packed checkpoint's files, under the names a transformers model has for it.

transformers only warns of missing tensors and, with a quantised model, does not look at shapes; both are errors here, before anything
is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ..checkpoint.tensorfile import DTYPE_NAMES
from ..compat.transformers import ignored_keys, names_when_loading, tied_weights
from ..errors import CheckpointError
from ..format import PackedConfig, packed_tensors
from ..nn import SlideSparseLinear

_SUFFIXES = ("weight_values", "weight_keep", "weight_scale", "weight_global_scale")
# Buffers that old checkpoints stored and models now compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")


@dataclass(frozen=True)
class StoredTensor:
    """File, name there, dtype as safetensors names it, and shape; None where transformers merges it with others."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...] | None


@dataclass
class StoredTensors:
    """Stored tensors by the model's name for them; ``strict``: the files were written for this class of model, so nothing may miss."""

    where: Path
    tensors: dict[str, StoredTensor]
    strict: bool

    @classmethod
    def read(cls, model: nn.Module, files: list[str]) -> StoredTensors:
        """Read the headers.

        Raises:
            CheckpointError: a file is damaged or not safetensors.
        """
        target_of, tensors = names_in_model(model), {}
        for file in files:
            for stored in _header(file):
                target, merged = target_of(stored.key)
                tensors[target] = replace(stored, shape=None) if merged else stored
        architectures = getattr(model.config, "architectures", None)
        return cls(Path(files[0]).parent, tensors, not architectures or type(model).__name__ in architectures)

    def layer_name(self, module: str) -> str:
        """A module's name in the files, which is the one config.json uses."""
        for suffix in ("weight_values", "weight", "weight_keep"):
            stored = self.tensors.get(f"{module}.{suffix}")
            if stored is not None and stored.shape is not None:
                return stored.key.removesuffix(f".{suffix}")
        return module


def names_in_model(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """What gives a stored tensor's name in the model, and whether transformers merges it with others there."""
    known = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            known |= {f"{name}.{suffix}": True for suffix in _SUFFIXES}
    return names_when_loading(model, known)


def check_layer(stored: StoredTensors, config: PackedConfig, name: str, layer: SlideSparseLinear) -> None:
    """A packed layer's tensors must all be there, with the dtypes and shapes that config.json and the model imply.

    Raises:
        CheckpointError: names the layer and what is wrong.
    """
    for spec in packed_tensors(layer.scheme, layer.pattern, layer.out_features, layer.in_features):
        found = stored.tensors.get(f"{name}.{spec.suffix}")
        if found is None:
            dense = " (it is stored dense: list it under ignore in config.json)" if f"{name}.weight" in stored.tensors else ""
            raise CheckpointError(f"{stored.where}: layer {layer.name} has no {spec.suffix}{dense}")
        wanted = DTYPE_NAMES[spec.dtype]
        if found.dtype != wanted or found.shape != spec.shape:
            raise CheckpointError(
                f"{stored.where}: layer {layer.name}: {spec.suffix} is {found.dtype} {list(found.shape or ())}; pattern {layer.pattern} in "
                f"config.json and a model with {layer.out_features} × {layer.in_features} weights there need {wanted} {list(spec.shape)}"
            )


def check_rest(stored: StoredTensors, model: nn.Module, ignore: Collection[str] = ()) -> None:
    """The other tensors: none missing, none left over but those that ``ignore`` names, none of another shape.

    Raises:
        CheckpointError: names the tensor.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        found = stored.tensors.get(name)
        if found is not None and found.shape is not None and found.shape != tuple(tensor.shape):
            raise CheckpointError(f"{stored.where}: {found.key} has shape {list(found.shape)}, the model needs {list(tensor.shape)}")
    if not stored.strict:
        return
    if missing := missing_tensors(model, stored.tensors):
        raise CheckpointError(f"{stored.where}: tensor {missing[0]} is missing")
    for name, found in stored.tensors.items():
        if name not in expected and found.key not in ignore and not may_be_left_over(name, model):
            raise CheckpointError(f"{stored.where}: the model has no place for tensor {found.key}")


def check_parameters(stored: StoredTensors, model: nn.Module, prefix: str) -> None:
    """Parameters whose names begin with ``prefix`` must all be there: transformers makes random ones up, and only warns.

    Raises:
        CheckpointError: names the tensor.
    """
    parameters = dict(model.named_parameters())
    for name in missing_tensors(model, stored.tensors):
        if name.startswith(prefix) and name in parameters:
            raise CheckpointError(f"{stored.where}: tensor {name} is missing")


def restore_scales(model: nn.Module, files: list[str]) -> None:
    """Give packed layers the float32 scales that a dense twin stores: transformers rounds them to the model's type when it loads.

    Raises:
        CheckpointError: a file is damaged.
    """
    stored = StoredTensors.read(model, files)
    for name, module in model.named_modules():
        found = stored.tensors.get(f"{name}.weight_scale")
        if isinstance(module, SlideSparseLinear) and module.scheme.dynamic and found is not None and found.dtype == "F32":
            with safe_open(found.file, framework="pt") as opened:
                scale = opened.get_tensor(found.key)
            rounded = module.weight_scale
            module.weight_scale = scale.reshape(-1, 1).expand_as(rounded).contiguous().to(rounded.device)


def missing_tensors(model: nn.Module, targets: Collection[str]) -> list[str]:
    """What a model asks for, by its own names, and does not find among these."""
    tied = tied_weights(model)
    partners = {**tied, **{source: target for target, source in tied.items()}}
    asked = (name for name in model.state_dict() if name not in targets and partners.get(name) not in targets)
    return [name for name in asked if not _listed(name, model, "missing")]


def may_be_left_over(name: str, model: nn.Module) -> bool:
    """Whether a tensor without a place is one that models compute, or that the model's author knows of."""
    return bool(_COMPUTED.search(name)) or _listed(name, model, "unexpected")


def _listed(name: str, model: nn.Module, kind: str) -> bool:
    """Whether the model's author says that such a tensor may be missing or left over."""
    return any(re.search(pattern, name) for pattern in ignored_keys(model, kind))


def _header(file: str) -> list[StoredTensor]:
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{file}: packed checkpoints are safetensors files")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
            return [StoredTensor(file, key, view.get_dtype(), tuple(view.get_shape())) for key, view in slices.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
