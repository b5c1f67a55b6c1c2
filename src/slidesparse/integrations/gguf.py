"""GGUF files → ordinary dense checkpoints that `slidesparse.checkpoint` reads, through transformers' GGUF loader."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ..checkpoint.staging import Staging
from ..errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAGIC = b"GGUF"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKEN_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def import_gguf(path: str | Path, out: str | Path, dtype: str = "bf16", overwrite: bool = False) -> Path:
    """Dequantise a GGUF file into a dense checkpoint: safetensors, config, generation config and tokenizer.

    A GGUF file's weights are usually quantised already, mostly to 4 bits: the checkpoint holds what they dequantise to, not the
    weights the model was published with. The whole model is in memory once, in float32, for as long as it takes to write it.

    Args:
        path: the ``.gguf`` file.
        out: the directory to write; it appears only when it is complete.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        overwrite: replace ``out`` if it is there.

    Raises:
        CheckpointError: no such file, not GGUF, damaged or cut short, or of an architecture that transformers does not load from GGUF.
        OutputExistsError: ``out`` is there and may not be replaced, or is no checkpoint.
        UnsupportedError: transformers or gguf is not installed.
        ValueError: unknown dtype.
    """
    source, target = Path(path), Path(out)
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")
    tokens = _special_tokens(source)
    stat = source.stat()
    staging = Staging(target, source, {"gguf": [str(source.resolve()), stat.st_size, stat.st_mtime_ns], "dtype": dtype}, overwrite)
    try:
        with staging:
            model, tokenizer = _load(source)
            _set_tokens(tokenizer, tokens)
            folder = staging.path / "import.part"  # config.json is written first here, and must not stand in the staging directory yet
            shutil.rmtree(folder, ignore_errors=True)
            fresh = _fresh_copy(model, _DTYPES[dtype])
            del model
            fresh.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _tidy_tokenizer(folder)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            (folder / "config.json").unlink()
            for file in folder.iterdir():
                file.rename(staging.path / file.name)
            folder.rmdir()
            staging.commit(config)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {staging.path}: {error}") from error
    return target


def _special_tokens(source: Path) -> dict[str, int]:
    """Check that the file is GGUF and complete; returns the ids of its special tokens."""
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file")
    with source.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise CheckpointError(f"{source}: not a GGUF file (it begins with {magic!r}, not {_MAGIC!r})")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UnsupportedError("reading GGUF needs the package gguf: pip install slidesparse[gguf]") from error
    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        # The reader checks nothing itself: a file cut short shows as a numpy view that does not fit.
        raise CheckpointError(f"{source}: damaged or cut short ({error})") from error
    if not reader.tensors:
        raise CheckpointError(f"{source}: holds no tensors")
    _check_whole(source, reader)
    fields = {token: reader.fields.get(f"tokenizer.ggml.{key}_token_id") for token, key in _TOKEN_KEYS.items()}
    return {token: int(field.contents()) for token, field in fields.items() if field is not None}


def _check_whole(source: Path, reader: Any) -> None:
    """Refuse what transformers' loader would leave out: the other parts of a split file, and rope scaling."""
    told = {key: field.contents() for key, field in reader.fields.items() if key.endswith(("split.count", ".rope.scaling.type"))}
    if (parts := told.pop("split.count", 1)) > 1:
        raise CheckpointError(f"{source} is one of {parts} parts of a split file: join them first (llama-gguf-split --merge)")
    scaling = next(iter(told.values()), "none")
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        kind = scaling if scaling != "none" else "by rope_freqs.weight"
        raise CheckpointError(f"{source} asks for rope scaling ({kind}), which transformers drops when it loads GGUF: import another form")


def _load(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UnsupportedError("importing GGUF needs transformers: pip install slidesparse[gguf]") from error
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    try:
        # In a folder of its own: transformers would take the neighbours' tokenizer and configuration.
        with tempfile.TemporaryDirectory() as folder, _quiet("transformers"):
            (Path(folder) / source.name).symlink_to(source.resolve())
            model, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **where)
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    except (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{source}: transformers cannot load it ({str(error).strip().splitlines()[0]})") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, loaded.get(kind) or ())):
            raise CheckpointError(f"{source}: the file does not hold the whole model, {kind.replace('_', ' ')}: {', '.join(names[:3])}")
    return model, tokenizer


def _set_tokens(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, int]) -> None:
    """transformers guesses special tokens from the tokenizer's family; the file says which they are."""
    for name, index in tokens.items():
        text = tokenizer.convert_ids_to_tokens(index)
        if isinstance(text, str):
            setattr(tokenizer, name, text)


def _fresh_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a model of the same configuration that transformers does not take for quantised, so that it can be saved."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


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
