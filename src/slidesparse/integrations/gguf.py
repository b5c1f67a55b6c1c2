"""GGUF files → ordinary dense checkpoints that `slidesparse.checkpoint` reads, tensor by tensor; names come from transformers' tables."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint.source import INDEX, SINGLE
from ..checkpoint.staging import Staging, write_json
from ..checkpoint.tensorfile import DTYPE_NAMES, TensorWriter
from ..errors import CheckpointError, UnsupportedError
from .faults import one_line
from .gguf_file import ROPE_FREQUENCIES, ROPE_KEYS, GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SETTINGS = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Keys of the file that transformers leaves unread for some architectures, with the setting that each is."""
_SHARD_BYTES = 2_000_000_000


def import_gguf(path: str | Path, out: str | Path, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Dequantise a GGUF file into a dense checkpoint: safetensors, config, generation config and tokenizer.

    A GGUF file's weights are usually quantised already, mostly to 4 bits: the checkpoint holds what they dequantise to, not the
    weights the model was published with. Tensors are read one by one; 2 GB of them wait to be written, and those
    experts of a layer that the class merges.

    Args:
        path: the ``.gguf`` file. What lies beside it is not read.
        out: the directory to write; it appears only when it is complete.
        dtype: ``bf16``, ``fp16`` or ``fp32`` for all tensors. None keeps float32, float16 and bfloat16 as they are in the file and writes
            quantised tensors as bfloat16; vectors take the type of most weights where this type holds them exactly.
        overwrite: replace ``out`` if it is there.

    Raises:
        CheckpointError: no such file, not GGUF, damaged, cut short or a part of several, of an architecture that transformers does not
            load from GGUF, or with tensors or a rope scaling that transformers' class cannot take.
        OutputExistsError: ``out`` is there and may not be replaced, or is no checkpoint.
        UnsupportedError: transformers or gguf is not installed.
        ValueError: unknown dtype.
    """
    source, target = Path(path), Path(out)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")
    file = GgufFile(source)
    stat = source.stat()
    staging = Staging(target, source, {"gguf": [str(source.resolve()), stat.st_size, stat.st_mtime_ns], "dtype": dtype}, overwrite)
    try:
        with staging:
            model, tokenizer, names = _understood(file)
            main = file.main_dtype if dtype is None else _DTYPES[dtype]
            _write_tensors(file, model, names, None if dtype is None else main, staging.path)
            tokenizer.save_pretrained(staging.path)
            _tidy_tokenizer(staging.path)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(staging.path)
            model.config.dtype = main
            model.config.architectures = [type(model).__name__]
            staging.commit(json.loads(model.config.to_json_string()))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {staging.path}: {error}") from error
    return target


@dataclass(frozen=True)
class _Names:
    """The model's name of each of the file's tensors, and transformers' processor, which gives them the model's layout."""

    known: dict[str, str]
    processor: Any
    parsed: dict[str, Any]

    def tensors(self, file: GgufFile, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors; experts that it holds merged come as soon as the file's last part of them was read.

        Raises:
            CheckpointError: tensors that the model has no place for, or parts of merged ones that the file lacks; names them.
        """
        left, merged = [], file.main_dtype
        parts: dict[str, set[str]] = {}
        for known, whole in self.known.items():
            parts.setdefault(whole, set()).add(known.removesuffix(".weight"))
        for name in file.tensors:
            with one_line(file.path):
                found = self.processor.process(
                    weights=file.dequantised(name), name=name, tensor_key_mapping=self.known, parsed_parameters=self.parsed
                )
            if found.name in self.known:
                yield self.known[found.name], torch.from_numpy(found.weights.copy()).to(dtype or file.dtype(name))
            elif found.name is None:
                merged = file.dtype(name)
                for waited in parts.values():
                    waited.discard(name.removesuffix(".weight"))
                for whole in [whole for whole in self.parsed["tensors"] if not parts.get(whole)]:
                    yield whole, self.parsed["tensors"].pop(whole).to(dtype or merged)
            elif name != ROPE_FREQUENCIES:
                left.append(name)
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise CheckpointError(
                f"{file.path}: transformers' class has no place for {', '.join(left[:3])}{more}: import the original checkpoint"
            )
        for name in self.parsed["tensors"]:
            raise CheckpointError(f"{file.path}: the file does not hold the whole model: a part of {name} is missing")


def _understood(file: GgufFile) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, _Names]:
    """The model on the meta device, its tokenizer, and the names of its tensors."""
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise UnsupportedError("importing GGUF needs transformers: pip install slidesparse[gguf]") from error
    from ..compat.gguf import parsed_once

    with tempfile.TemporaryDirectory() as folder, one_line(file.path), _quiet("transformers"), parsed_once(file.path, file.reader):
        # In a folder of its own: transformers prefers the tokenizer and the config of another model that lie beside the file.
        (Path(folder) / "model.gguf").symlink_to(file.path.resolve())
        where: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
        config = AutoConfig.from_pretrained(folder, **where)
        if rope := file.rope_parameters():
            config.rope_parameters = dict(config.rope_parameters or {}) | rope
        model, names = _named(file, config)
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    if templates := file.chat_templates:
        tokenizer.chat_template = {"default": tokenizer.chat_template or next(iter(templates.values()))} | templates
    if len(ends := file.ends_of_text) > 1 and model.generation_config is not None:
        model.generation_config.eos_token_id = ends
    for name, index in file.special_tokens.items():
        # transformers guesses special tokens from the tokenizer's family; the file says which they are.
        text = tokenizer.convert_ids_to_tokens(index)
        if isinstance(text, str):
            setattr(tokenizer, name, text)
    return model, tokenizer, names


def _named(file: GgufFile, config: PreTrainedConfig) -> tuple[PreTrainedModel, _Names]:
    from transformers import AutoModelForCausalLM

    from ..compat.transformers import gguf_tables

    tables = gguf_tables()
    keys = tables.GGUF_CONFIG_MAPPING
    named = (config.model_type, file.architecture.replace("-", "_"), file.architecture)
    read = {*next((keys[name] for name in named if name in keys), {}), "vocab_size"}
    for key, name in _SETTINGS.items():
        value = file.own(key)
        if key not in read and isinstance(value, int | float) and hasattr(config, name):
            setattr(config, name, value)
            read.add(key)
    if "attention.key_length" in read:
        read.add("attention.value_length")  # another length of values shows as another shape of tensors
    read |= ROPE_KEYS | {key for key in file.own_keys if config.model_type == "gpt_oss" and key.startswith("rope.scaling.")}
    left = [key for key in file.own_keys if key not in read]
    if left := [*left, *file.unread_of_tokenizer(tables.GGUF_TOKENIZER_MAPPING)]:
        _LOG.warning("%s: transformers does not read these keys of the model: %s", file.path, ", ".join(left))
    if any(name.endswith(".attn_q.bias") for name in file.tensors) and getattr(config, "attention_bias", None) is False:
        config.attention_bias = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if not _turns(model, file.rotary) and "rope_type" in (config.rope_parameters or {}):
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            config.rope_parameters = dict(config.rope_parameters) | {"partial_rotary_factor": file.rotary / head}
            model = AutoModelForCausalLM.from_config(config)
    if not _turns(model, file.rotary):
        raise CheckpointError(
            f"{file.path}: rope turns {file.rotary} dimensions of each head, transformers' class turns another number: import the original "
            "checkpoint"
        )
    parsed = tables.load_gguf_checkpoint(str(file.path)) | {"tensors": {}}
    processor = tables.TENSOR_PROCESSORS.get(file.architecture, tables.TensorProcessor)(config=parsed["config"])
    return model, _Names(tables.get_gguf_hf_weights_map(model, processor), processor, parsed)


def _turns(model: PreTrainedModel, dimensions: int | None) -> bool:
    """Whether rope turns so many dimensions of a head in a model; true where the file or the model does not tell."""
    found = {2 * buffer.shape[-1] for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    return dimensions is None or not found or dimensions in found


def _write_tensors(file: GgufFile, model: PreTrainedModel, names: _Names, dtype: torch.dtype | None, folder: Path) -> None:
    """All tensors in the model's names, in files of about 2 GB; ``dtype`` is for all where it is given.

    Raises:
        CheckpointError: the model lacks a tensor, has no place for one, or needs one of another shape.
    """
    shapes, shards = {name: tensor.shape for name, tensor in model.state_dict().items()}, _Shards(folder)
    missing = set(shapes)
    if model.config.tie_word_embeddings:
        from ..compat.transformers import tied_weights

        missing -= set(tied_weights(model))
    for name, tensor in names.tensors(file, dtype):
        missing.discard(name)
        if tensor.shape != shapes.get(name, tensor.shape):
            told = f"{name} is {list(tensor.shape)}, the model that the file's keys describe needs {list(shapes[name])}"
            raise CheckpointError(f"{file.path}: {told}: import the original checkpoint")
        shards.add(name, tensor)
    if missing:
        raise CheckpointError(f"{file.path}: the file does not hold the whole model, missing keys: {', '.join(sorted(missing)[:3])}")
    shards.finish()


class _Shards:
    """Tensors on their way into safetensors files; each is written when it is full, and named when their number is known."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._bytes = folder, 0
        self._waiting: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._waiting[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= _SHARD_BYTES:
            self._write()

    def finish(self) -> None:
        """Write the rest, and the index where there are several files."""
        self._write()
        count = len(self._names)
        files = [SINGLE] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        for number, file in enumerate(files):
            self._part(number).rename(self._folder / file)
        if count > 1:
            places = {name: file for file, names in zip(files, self._names, strict=True) for name in names}
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": places})

    def _write(self) -> None:
        if self._waiting:
            kinds = {name: (DTYPE_NAMES[one.dtype], tuple(one.shape), one.nbytes) for name, one in self._waiting.items()}
            with TensorWriter(self._part(len(self._names)), kinds) as writer:
                for name, tensor in self._waiting.items():
                    writer.write(name, 0, tensor)
            self._names.append(list(self._waiting))
            self._total += self._bytes
            self._waiting, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"{number}.part"


def _tidy_tokenizer(folder: Path) -> None:
    """Drop where the tokenizer came from, and a switch that transformers ignores with a warning at every load."""
    path = folder / "tokenizer_config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("is_local", "local_files_only", "name_or_path", "gguf_file", "clean_up_tokenization_spaces"):
            config.pop(key, None)
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors of a library's log: its remarks on how it reads a GGUF tokenizer help nobody."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
