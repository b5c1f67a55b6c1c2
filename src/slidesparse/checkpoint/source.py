"""Opening a checkpoint directory: config.json, shards, and every file checked before any long work starts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..format import MARKER, PackedConfig
from ..pattern import Pattern, tightest_first
from ..select import DEFAULT_IGNORE
from .formats import find_layers
from .formats.packed import read_packed_config
from .layers import OF_QUANTISED, Layer
from .tensorfile import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_SETTINGS_BYTES = 1 << 17
_OTHER_WEIGHTS = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.keras", "*.msgpack", "*.ot", "*.safetensors", "*.nemo"),
    *("weights*.npz", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.tflite", "saved_model.pb", "*.data-?????-of-?????"),
    *("*.safetensors.index*.json", "*.bin.index*.json", "*.h5.index*.json", "*.msgpack.index*.json"),
    *("*.ckpt-*.index", "*.pdparams", "*.pdmodel", "*.mlmodel", "*.mlpackage", "*.mlmodelc", "*.pte", "*.engine", "openvino_*.xml"),
)
"""Names of weights in forms that are not read, and of their indexes, in files that other frameworks and engines write."""


@dataclass
class Checkpoint:
    """A model directory on disk.

    ``shards`` maps file names to their tensors in file order, ``layers`` maps names to the linear layers found in them, and
    ``packed`` is the stored form's configuration when the checkpoint is packed.
    """

    path: Path
    config: dict[str, Any]
    shards: dict[str, dict[str, TensorInfo]]
    packed: PackedConfig | None = None
    layers: dict[str, Layer] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open and check a model directory, reading only headers.

        Raises:
            CheckpointError: not a model directory, a missing or damaged file, an index that contradicts its shards, a quantisation
                or architecture this library cannot read; the message names the file or tensor.
        """
        path = Path(path)
        config = read_config(path)
        shards = {name: read_header(path / name)[0] for name in _shard_names(path)}
        _check_index(path, shards)
        checkpoint = cls(path, config, shards, read_packed_config(path, config))
        checkpoint.layers = find_layers(path, config, checkpoint.tensors)
        return checkpoint

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name."""
        return {name: info for shard in self.shards.values() for name, info in shard.items()}

    @property
    def names(self) -> list[str]:
        """Names of the tensors without those that a layer has beside its weights."""
        beside = {info.name for layer in self.layers.values() for info in layer.tensors.values() if info is not layer.main}
        return [name for name in self.tensors if name not in beside]

    @property
    def strays(self) -> tuple[str, ...]:
        """Tensors of quantised layers that belong to none, by their names."""
        return tuple(name for name in self.names if OF_QUANTISED.fullmatch(name.rpartition(".")[2]))

    @property
    def of_vocabulary(self) -> frozenset[str]:
        """Matrices outside the repeated blocks with a row for every token: embeddings and heads, whatever they are called."""
        places = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        sizes = [place.get(key) for place in places for key in ("vocab_size", "padded_vocab_size")]
        outside = (layer for name, layer in self.layers.items() if not any(part.isdigit() for part in name.split(".")))
        return frozenset(layer.name for layer in outside if layer.n in sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def marker(self) -> dict[str, Any] | None:
        """The ``slidesparse`` key of a portable dense twin, wherever it stands."""
        for place in (self.config, self.config.get("quantization_config") or {}):
            if isinstance(place.get(MARKER), dict):
                return place[MARKER]
        return None

    @property
    def marked_ignore(self) -> tuple[str, ...]:
        """Layers the dense twin's marker makes no claim about: what is never converted by default where it does not say."""
        return tuple((self.marker or {}).get("ignore", (*DEFAULT_IGNORE, *self.of_vocabulary)))

    def marked_pattern(self, layer: str) -> Pattern | None:
        """The pattern the dense twin's marker claims for a layer.

        Raises:
            CheckpointError: see `marked_patterns`.
        """
        common, overrides = self._marked
        return overrides.get(layer, common)

    def marked_patterns(self) -> tuple[Pattern, ...]:
        """Every pattern the dense twin's marker claims, tightest first; none for other checkpoints.

        Raises:
            CheckpointError: the marker holds something else than patterns.
        """
        common, overrides = self._marked
        return () if common is None else tightest_first({common, *overrides.values()})

    @cached_property
    def _marked(self) -> tuple[Pattern | None, dict[str, Pattern]]:
        marker = self.marker
        if marker is None:
            return None, {}
        try:
            overrides = {layer: Pattern.parse(text) for layer, text in (marker.get("overrides") or {}).items()}
            return Pattern.parse(marker.get("pattern", "")), overrides
        except ValueError as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {MARKER}: {error}") from error

    def side_files(self) -> tuple[list[Path], list[Path]]:
        """Files and folders that go along unchanged, such as tokenizer, chat templates and licence; and weights that are not read."""
        along: list[Path] = []
        left: list[Path] = []
        named = _named_in_settings(self.path)
        for file in sorted(self.path.iterdir()):
            hidden = file.name.startswith(".") and file.is_dir()  # .git and .cache are of the tool that fetched the model
            if hidden or file.name in (*self.shards, "config.json", INDEX):
                continue
            inside = [file, *file.rglob("*")] if file.is_dir() else [file]
            if any(each.is_symlink() and each.is_dir() for each in inside):
                left.append(file)  # what is behind a link to a folder may have no end
                continue
            weights = any(each.match(pattern) for each in inside for pattern in _OTHER_WEIGHTS) and file.name not in named
            _check_links(inside)
            # An adapter's settings without its weights keep loaders from opening the model, and on packed layers so do both.
            weights = weights or file.name == ADAPTER
            if weights or file.is_dir() or file.is_file():
                (left if weights else along).append(file)
        return along, left


def _named_in_settings(path: Path) -> set[str]:
    """Files and folders of a model that its own settings name, as those of sentence-transformers name folders of further modules."""
    found: set[str] = set()
    for file in path.glob("*.json"):
        index = any(file.match(pattern) for pattern in _OTHER_WEIGHTS)
        if index or file.name == ADAPTER or not file.is_file() or file.stat().st_size > _SETTINGS_BYTES:
            continue
        try:
            places: list[Any] = [json.loads(file.read_text(encoding="utf-8-sig"))]
        except (OSError, ValueError, RecursionError):
            continue  # a file that goes along, whatever is in it
        while places:
            place = places.pop()
            if isinstance(place, str):
                found.add(place.removeprefix("./").partition("/")[0])
            elif isinstance(place, (dict, list)):
                places += place.values() if isinstance(place, dict) else place
    return found


def _check_links(files: list[Path]) -> None:
    """Refuse a link to nowhere, as a half-fetched hub cache leaves it: the file it stands for would silently be missing."""
    for file in files:
        if file.is_symlink() and not file.exists():
            raise CheckpointError(f"{file} is a link to a file that is not there: fetch the model again")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        CheckpointError: no directory, no config.json, or not JSON.
    """
    if path.is_file():
        hint = "import it first: slidesparse import" if path.suffix == ".gguf" else "name the directory that holds config.json"
        raise CheckpointError(f"{path} is a file, not a model directory: {hint}")
    if not path.is_dir():
        on_the_hub = "" if len(path.parts) > 1 or path.suffix else ", and on the hub a model's name is org/name"
        raise CheckpointError(f"{path}: no such directory{on_the_hub}")
    file = path / "config.json"
    _check_links([file])
    try:
        if file.exists() and not file.is_file():
            raise CheckpointError(f"{file} is not a regular file")
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        adapter = ", but an adapter: merge it into its model first (peft's merge_and_unload)" if (path / ADAPTER).exists() else ""
        raise CheckpointError(f"{path} is not a model directory: it has no config.json{adapter}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} does not hold a model configuration")
    if (old := config.pop("compression_config", None)) and not config.get("quantization_config"):
        # The key's name until compressed-tensors 0.5, which had but one method.
        config["quantization_config"] = {"quant_method": "compressed-tensors"} | old if isinstance(old, dict) else old
    parts = [part for part in config.values() if isinstance(part, dict)]
    nested = [found for part in parts if (found := part.pop("quantization_config", None))]
    if nested and not config.get("quantization_config"):
        config["quantization_config"] = nested[0]  # of a model with a vision tower, in text_config
    quantization = config.get("quantization_config") or {}
    expected = [(config, "quantization_config", dict), (config, "model_type", str), (config, "architectures", list)]
    if isinstance(quantization, dict):
        expected += [(quantization, "config_groups", dict), (quantization, "quant_method", str)]
        expected += [(group, key, dict) for group in (config.get(MARKER), quantization.get(MARKER)) if group for key in ("overrides",)]
        expected += [(group, "ignore", list) for group in (config.get(MARKER), quantization.get(MARKER)) if group]
    for place, key, kind in expected:
        if not isinstance(place, dict) or not isinstance(place.get(key) or kind(), kind):
            raise CheckpointError(
                f"{file}: {key} should be a {kind.__name__}, got {place.get(key) if isinstance(place, dict) else place!r}"
            )
    if isinstance(quantization, dict):
        groups = [group for group in (quantization.get("config_groups") or {}).values() if isinstance(group, dict)]
        for names in (quantization.get("ignore"), *(group.get("targets") for group in groups)):
            _check_names(names, file)
    return config


def _check_names(names: object, file: Path) -> None:
    """Refuse layer names of compressed-tensors' kind that nobody can match."""
    for name in names if isinstance(names, list) else ():
        try:
            re.compile(name.removeprefix("re:"))
        except (AttributeError, re.error) as error:
            raise CheckpointError(f"{file}: {name!r} is no layer's name and no regular expression ({error})") from error


def _shard_names(path: Path) -> list[str]:
    _check_links([path / INDEX, *path.glob("*.safetensors")])
    if (path / INDEX).exists():
        names = sorted(set(_weight_map(path).values()))
        if (path / SINGLE).exists() and SINGLE not in names:
            raise CheckpointError(f"{path} holds both {SINGLE} and {INDEX} with other shards: remove the one that is not the model")
        if not names:
            raise CheckpointError(f"{path / INDEX} lists no tensor")
        return names
    if (path / SINGLE).exists():
        return [SINGLE]
    others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in path.glob(pattern))
    found = f" (found {others[0]}; only {SINGLE} or shards with {INDEX} are read)" if others else ""
    raise CheckpointError(f"{path} holds no {SINGLE} and no {INDEX}{found}")


def _weight_map(path: Path) -> dict[str, str]:
    file = path / INDEX
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        entries = [(str(tensor), str(shard)) for tensor, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error!r}") from error
    for tensor, shard in entries:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{file}: tensor {tensor} points outside the folder, to {shard!r}")
        if not (path / shard).exists():
            raise CheckpointError(f"{file}: shard {shard} with tensor {tensor} is missing: fetch it again")
    return dict(entries)


def _check_index(path: Path, shards: dict[str, dict[str, TensorInfo]]) -> None:
    seen: dict[str, str] = {}
    for shard, tensors in shards.items():
        for name in tensors:
            if name in seen:
                raise CheckpointError(f"{path}: tensor {name} stands in both {seen[name]} and {shard}")
            seen[name] = shard
    if not (path / INDEX).exists():
        return
    for name, shard in _weight_map(path).items():
        if seen.get(name) != shard:
            raise CheckpointError(f"{path / INDEX}: tensor {name} should be in {shard}, which does not hold it")
