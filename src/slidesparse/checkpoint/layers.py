"""Which tensors are linear layers, and in which of the forms we read: dense, compressed-tensors, BitNet, packed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..format import QUANT_METHOD, SCHEMES, PackedConfig, Scheme, dense_tensors, packed_tensors, scheme_of_dtype
from ..pattern import Pattern
from .tensorfile import DTYPES, TensorInfo

# Their weights are stored [K, N]: groups along the last axis would run over output features.
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_FLOATS = ("F32", "F16", "BF16")


class Form(Enum):
    """How a layer's weights lie in the file."""

    FLOAT = "16- or 32-bit weights"
    QUANTIZED = "dense quantised weights with scales"
    TERNARY = "BitNet ternary weights, four to a byte"
    MASTER = "BitNet master weights"
    PACKED = "packed"


@dataclass(frozen=True)
class Layer:
    """One linear layer ``[n, k]``; ``scheme`` is None for float32, ``pattern`` is set when packed.

    ``inverse_scale``: a ternary layer's scale divides instead of multiplying.
    """

    name: str
    n: int
    k: int
    form: Form
    scheme: Scheme | None
    tensors: dict[str, TensorInfo]
    pattern: Pattern | None = None
    inverse_scale: bool = False

    @property
    def main(self) -> TensorInfo:
        """The tensor with the weights."""
        return self.tensors[
            {Form.PACKED: "weight_values"}.get(self.form, "weight_packed" if self.scheme and self.scheme.pair else "weight")
        ]

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales included."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same weights in dense form, with the same element type."""
        if self.scheme is None:
            return self.n * self.k * 4
        return self.n * self.scheme.k_stored(self.k) * self.scheme.dtype.itemsize + sum(
            info.nbytes for suffix, info in self.tensors.items() if "scale" in suffix
        )


def read_packed_config(path: Path, config: dict[str, Any]) -> PackedConfig | None:
    """The stored form's configuration, None for other checkpoints.

    Raises:
        CheckpointError: see `PackedConfig.from_dict`; the message names config.json.
    """
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        return None
    try:
        return PackedConfig.from_dict(quantization)
    except CheckpointError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error


def find_layers(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo], packed: PackedConfig | None) -> dict[str, Layer]:
    """Every linear layer by name, in tensor order.

    Raises:
        CheckpointError: transposed or otherwise quantised weights, or tensors whose shapes contradict each other.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    transposed = _transposed(config, tensors)
    if transposed:
        raise CheckpointError(f"{path}: {transposed} stores its linear weights transposed ([K, N]); that is not supported")
    if packed is not None:
        layers = _packed_layers(path, tensors, packed)
        _check_claims(path, layers, tensors, packed)
        return layers
    if method not in (None, "compressed-tensors", "bitnet"):
        raise CheckpointError(f"{path}: weights quantised by {method!r} cannot be read; start from the 16-bit checkpoint")
    if method == "bitnet" and quantization.get("use_rms_norm"):
        raise CheckpointError(f"{path}: BitNet layers with their own RMSNorm (use_rms_norm) are not supported")
    quantized = _compressed_tensors_scheme(path, quantization) if method == "compressed-tensors" else None
    bitnet = method == "bitnet" or config.get("model_type") == "bitnet"
    inverse = quantization.get("linear_class", "bitlinear") == "bitlinear"
    layers: dict[str, Layer] = {}
    for tensor, info in tensors.items():
        name, _, suffix = tensor.rpartition(".")
        if suffix not in ("weight", "weight_packed") or len(info.shape) != 2 or not name:
            continue
        layer = _dense_layer(name, suffix, tensors, quantized, bitnet, inverse)
        if layer is not None:
            layers[name] = layer
    return layers


def _transposed(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> str | None:
    """What gives transposed weights away: a model type anywhere in the configuration, or a bias that fits the wrong side."""
    if config.get("model_type") in _TRANSPOSED:
        return str(config["model_type"])
    for value in config.values():
        if isinstance(value, dict) and (found := _transposed(value, {})):
            return found
    for tensor, info in tensors.items():
        layer = tensor.removesuffix(".weight")
        bias = tensors.get(f"{layer}.bias")
        if layer.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc") and bias is not None and len(info.shape) == 2:
            n, k = info.shape
            if bias.shape == (k,) and n != k:
                return layer
    return None


def _check_claims(path: Path, layers: dict[str, Layer], tensors: dict[str, TensorInfo], packed: PackedConfig) -> None:
    """Tensors and config.json must tell the same story about which layers are packed."""
    known = {name for name, layer in layers.items() if layer.form is Form.PACKED}
    for tensor in tensors:
        name, _, suffix = tensor.rpartition(".")
        if name not in known and suffix in ("weight_keep", "weight_scale", "weight_global_scale"):
            raise CheckpointError(f"{path}: tensor {tensor} belongs to no packed layer: {name}.weight_values is missing")
        if name in known and suffix == "weight":
            raise CheckpointError(f"{path}: layer {name} is there twice, dense ({tensor}) and packed")
    for name in known:
        if packed.ignores(name):
            raise CheckpointError(f"{path}: layer {name} is packed, but config.json lists it under ignore")
    for key, table in (("overrides", packed.overrides), ("in_features", packed.in_features)):
        for name in table.keys() - known:
            raise CheckpointError(f"{path}: config.json names {name} under {key}, but no such layer is packed")


def _dense_layer(
    name: str, suffix: str, tensors: dict[str, TensorInfo], quantized: Scheme | None, bitnet: bool, inverse: bool
) -> Layer | None:
    info = tensors[f"{name}.{suffix}"]
    n, k = info.shape
    own = {part: tensors[f"{name}.{part}"] for part in (suffix, "weight_scale", "weight_global_scale") if f"{name}.{part}" in tensors}
    if bitnet and info.dtype_name == "U8":
        if "weight_scale" not in own:
            raise CheckpointError(f"{info.path}: ternary tensor {info.name} has no weight_scale")
        if not inverse and f"{name}.bias" in tensors:
            raise CheckpointError(
                f"{info.path}: {name}.bias would be scaled with the ternary weights (autobitlinear); that is not supported"
            )
        return Layer(name, n * 4, k, Form.TERNARY, SCHEMES["int8"], own, inverse_scale=inverse)
    if info.dtype_name in _FLOATS and suffix == "weight":
        form = Form.MASTER if bitnet else Form.FLOAT
        return Layer(name, n, k, form, scheme_of_dtype(DTYPES[info.dtype_name]), {"weight": info})
    if quantized is None:
        if "weight_scale" in own:
            raise CheckpointError(f"{info.path}: tensor {info.name} is quantised, but config.json does not say how")
        return None
    if f"{name}.weight_zero_point" in tensors:
        raise CheckpointError(f"{info.path}: layer {name} has zero points; only symmetric weights are supported")
    k = k * 2 if quantized.pair else k
    _check_specs(info.path, name, own, {spec.suffix: spec.shape for spec in dense_tensors(quantized, n, k)}, quantized)
    return Layer(name, n, k, Form.QUANTIZED, quantized, own)


def _packed_layers(path: Path, tensors: dict[str, TensorInfo], packed: PackedConfig) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for tensor, info in tensors.items():
        name, _, suffix = tensor.rpartition(".")
        if suffix == "weight" and len(info.shape) == 2 and name and info.dtype_name in _FLOATS:
            layers[name] = Layer(name, *info.shape, Form.FLOAT, scheme_of_dtype(DTYPES[info.dtype_name]), {"weight": info})
        if suffix != "weight_values":
            continue
        if len(info.shape) != 2:
            raise CheckpointError(f"{info.path}: {tensor} has shape {list(info.shape)}, expected two dimensions")
        pattern, scheme = packed.pattern_of(name), packed.scheme
        per_group = pattern.kept * (1 if scheme.pair else pattern.unit)
        k_full = info.shape[1] // per_group * pattern.group * (2 if scheme.pair else pattern.unit)
        k = packed.in_features.get(name, k_full)
        specs = {spec.suffix: spec.shape for spec in packed_tensors(scheme, pattern, info.shape[0], k)}
        own = {part: tensors[f"{name}.{part}"] for part in specs if f"{name}.{part}" in tensors}
        _check_specs(info.path, name, own, specs, scheme, f"pattern {pattern} with K = {k} in config.json")
        layers[name] = Layer(name, info.shape[0], k, Form.PACKED, scheme, own, pattern)
    if not any(layer.form is Form.PACKED for layer in layers.values()):
        raise CheckpointError(f"{path}: config.json says {QUANT_METHOD}, but no tensor is packed (*.weight_values)")
    return layers


def _check_specs(
    path: Path, name: str, own: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]], scheme: Scheme, why: str = ""
) -> None:
    why = f" ({why})" if why else ""
    for suffix, shape in shapes.items():
        info = own.get(suffix)
        if info is None:
            raise CheckpointError(f"{path}: layer {name} has no {suffix}")
        flat_scale = suffix == "weight_scale" and scheme.dynamic and info.shape in ((shape[0],), shape)
        if info.shape != shape and not flat_scale:
            raise CheckpointError(f"{info.path}: {info.name} has shape {list(info.shape)}, expected {list(shape)}{why}")
        if suffix in ("weight", "weight_packed", "weight_values") and info.dtype != scheme.dtype:
            raise CheckpointError(f"{info.path}: {info.name} is {info.dtype_name}, config.json says {scheme.name}")
        if suffix == "weight_keep" and info.dtype_name != "U8":
            raise CheckpointError(f"{info.path}: {info.name} is {info.dtype_name}, expected U8")
        allowed = ("F8_E4M3",) if scheme.pair else ("F32",) if "weight_keep" in shapes else _FLOATS
        if suffix == "weight_scale" and info.dtype_name not in allowed:
            raise CheckpointError(f"{info.path}: {info.name} is {info.dtype_name}, expected {' or '.join(allowed)}")


def _compressed_tensors_scheme(path: Path, quantization: dict[str, Any]) -> Scheme:
    """The scheme of a compressed-tensors configuration, if it is one we compute exactly: W8A8 per channel and token, or NVFP4."""
    for key in ("transform_config", "kv_cache_scheme"):
        if quantization.get(key):
            raise CheckpointError(f"{path}: compressed-tensors checkpoints with {key} are not supported")
    sparsity = quantization.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{path}: sparse compressed-tensors weights ({sparsity['format']}) are not supported: save them dense")
    groups = list((quantization.get("config_groups") or {}).values())
    if not groups or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{path}: quantization_config.config_groups describes no scheme")
    schemes = set()
    for group in groups:
        weights, activations = group.get("weights") or {}, group.get("input_activations")
        kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"), weights.get("symmetric", True))
        if kind == (4, "float", "tensor_group", True) and activations is None:
            schemes.add("nvfp4")
            continue
        dynamic = activations and (
            activations.get("num_bits"),
            activations.get("type"),
            activations.get("strategy"),
            activations.get("dynamic"),
        )
        names = {(8, "int", "channel", True): "int8", (8, "float", "channel", True): "fp8"}
        if kind not in names or dynamic != (8, kind[1], "token", True):
            raise CheckpointError(
                f"{path}: compressed-tensors scheme {weights.get('num_bits')}-bit {weights.get('type')} {weights.get('strategy')} is not "
                "supported: W8A8 int8 or fp8 with symmetric per-channel weights and dynamic per-token activations is"
            )
        schemes.add(names[kind])
    if len(schemes) != 1:
        raise CheckpointError(f"{path}: compressed-tensors checkpoints with {len(schemes)} different schemes are not supported")
    return SCHEMES[schemes.pop()]
