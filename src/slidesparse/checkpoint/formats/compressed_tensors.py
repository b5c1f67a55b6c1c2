"""Dense quantised weights with scales, as llm-compressor writes them: W8A8 per channel and token, or NVFP4 with 16-bit activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...format import SCHEMES, Scheme, dense_tensors
from ...quantization import canonical_nvfp4
from ..layers import FLOATS, Block, Layer, check_quantised, check_tensors, check_zero_points, float_scheme, matrices, tensors_of
from ..tensorfile import TensorInfo, TensorReader
from .floating import Floating

METHOD = "compressed-tensors"

NO_LAYER = "re:(?!)experts"
"""A target that means no layer: see `slidesparse.checkpoint.configs`."""

BITMASKS = ("sparse-bitmask", "sparse-24-bitmask")
"""Formats of sparse weights that `bitmask` reads."""


class Quantized(Layer):
    """A layer with dense quantised weights and their scales."""

    holds, may_stay = "dense quantised weights with scales", ("dense",)

    @property
    def restored(self) -> bool:  # type: ignore[override]
        """Only with one scale for every row: an output has one strategy, which is a scale per row."""
        return self.one_scale

    def _read(self, reader: TensorReader, ranges: Iterable[tuple[int, int]]) -> Iterator[Block]:
        for first, last in ranges:
            scale, values = self._scale(reader, first, last), reader.read_rows(self.main, first, last)
            yield Block(first, canonical_nvfp4(values) if self.scheme.pair else values, scale)


class Left(Floating):
    """A layer of a quantised checkpoint that its maker left in 16 bits: it stays so unless it is named."""

    holds, by_default = "16- or 32-bit weights that the maker of the quantised checkpoint left so", False


@dataclass(frozen=True)
class Quantization:
    """What a configuration says of its weights: their scheme, and whether a tensor has one scale for all its rows."""

    scheme: Scheme
    per_tensor: bool = False


def find(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Layer]:
    """Layers by name; refuses other schemes, zero points that are not zero, and tensors that contradict the configuration."""
    quantization = read_quantization(path, config, tensors)
    if quantization is None:
        return {}
    layers: dict[str, Layer] = {}
    for name, suffix, info in matrices(tensors):
        if info.dtype_name in FLOATS and suffix == "weight":
            layers[name] = Left(name, info.shape[0], info.shape[1], float_scheme(info), {suffix: info})
            continue
        n, k = info.shape[0], info.shape[1] * (2 if quantization.scheme.pair else 1)
        own = tensors_of(name, (suffix, "weight_scale", "weight_global_scale", "weight_zero_point"), tensors)
        layers[name] = Quantized(name, n, k, quantization.scheme, own)
        check_tensors(layers[name], dense_tensors(quantization.scheme, n, k)[:1], ())
        check_scales(layers[name], quantization)
    return layers


def check_scales(layer: Layer, quantization: Quantization) -> None:
    """A quantised layer must have the scales of its scheme, and no zero points that are not zero."""
    scale = layer.tensors.get("weight_scale")
    specs = dense_tensors(layer.scheme, layer.n, layer.k)[1:]
    if scale is not None and quantization.per_tensor and layer.one_scale:
        specs = (replace(specs[0], shape=scale.shape),)
    check_tensors(layer, specs, ("F8_E4M3",) if layer.scheme.pair else FLOATS)
    if "weight_zero_point" in layer.tensors:
        check_zero_points(layer.name, layer.tensors["weight_zero_point"])


def read_quantization(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> Quantization | None:
    """What config.json says of the weights; None where it is no such configuration, or quantises nothing.

    Raises:
        CheckpointError: anything but the schemes that are computed exactly; names what is not supported.
    """
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        return None
    told = f"{path / 'config.json'}: quantization_config"
    if quantization.get("transform_config"):
        raise CheckpointError(f"{told}.transform_config: rotated weights are not supported: start from the 16-bit checkpoint")
    if quantization.get("kv_cache_scheme"):
        raise CheckpointError(
            f"{told}.kv_cache_scheme: a quantised KV cache is not supported, and would be lost without a word: "
            "set kv_cache_scheme to null to go on without it"
        )
    sparsity = quantization.get("sparsity_config") or {}
    stored = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if stored not in ("dense", *BITMASKS):
        raise CheckpointError(f"{told}.sparsity_config: sparse weights stored as {stored} are not supported: save them dense")
    groups = list((quantization.get("config_groups") or {}).values())
    if not groups and quantization.get("format", "dense") in ("dense", *BITMASKS):
        return None  # pruned, not quantised
    check_quantised(path, tensors, f"by {METHOD!r}", "quantization_config")
    if not groups or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{told}.config_groups describes no scheme")
    found = {_of_group(f"{told}.config_groups", group) for group in groups if group.get("targets") != [NO_LAYER]}
    if len(found) != 1:
        raise CheckpointError(f"{told}.config_groups: {len(found)} different schemes in one checkpoint are not supported")
    return found.pop()


def _of_group(told: str, group: dict[str, Any]) -> Quantization:
    """The one scheme of a group; refuses what would be computed otherwise than its maker meant."""
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    for part, name in ((weights, "weights"), (activations or {}, "input_activations")):
        if not isinstance(part, dict) or any(isinstance(part.get(key), list | dict) for key in ("num_bits", "type", "strategy")):
            raise CheckpointError(f"{told}: {name} is {part!r}, which describes no scheme")
    bits, strategy = (weights.get("num_bits"), weights.get("type", "int")), weights.get("strategy")
    nvfp4 = (*bits, strategy) == (4, "float", "tensor_group")
    if nvfp4 and weights.get("symmetric", True) and activations is None:
        return Quantization(SCHEMES["nvfp4"])
    names: dict[tuple[Any, ...], str] = {(8, "int"): "int8", (8, "float"): "fp8"}
    dynamic = activations or {}
    refusals = {
        "NVFP4 weights with quantised activations": nvfp4 and activations is not None,
        f"{bits[0]}-bit {bits[1]} weights": bits not in names,
        f"weights with scales per {strategy}": strategy not in ("channel", "tensor"),
        "asymmetric weights": not weights.get("symmetric", True),
        "weights quantised when they are used": bool(weights.get("dynamic")),
        "quantised weights with activations that are not": activations is None,
        "quantised outputs": bool(group.get("output_activations")),
        "quantised embeddings": "Embedding" in (group.get("targets") or ()),
        "activations with static scales": activations is not None and dynamic.get("dynamic") is not True,
        "asymmetric activations": not dynamic.get("symmetric", True),
        f"activations with scales per {dynamic.get('strategy')}": dynamic.get("strategy") != "token",
        "weights and activations of different types": (dynamic.get("num_bits"), dynamic.get("type", "int")) != bits,
    }
    wrong = next((what for what, refused in refusals.items() if refused), None)
    if wrong:
        raise CheckpointError(
            f"{told}: {wrong} are not supported: W8A8 int8 or fp8 with symmetric weights and symmetric dynamic per-token activations is, "
            "and NVFP4 weights with 16-bit activations; start from the 16-bit checkpoint for others"
        )
    return Quantization(SCHEMES[names[bits]], strategy == "tensor")
