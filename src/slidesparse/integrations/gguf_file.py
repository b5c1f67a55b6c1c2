"""What a GGUF file says of its model: whole or not, special tokens, rope scaling, and the type of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedError

_MAGIC = b"GGUF"
_ENDS = ("eos", "eot", "eom")
"""Tokens at which llama.cpp ends a text."""
_TEMPLATE = "tokenizer.chat_template."
_TOKEN_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BETAS = ("beta_fast", "beta_slow")
ROPE_KEYS = {
    f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "finetuned", *(f"yarn_{key}" for key in _BETAS))
}
"""Keys that `GgufFile.rope_parameters` reads, and one that changes no number."""
ROPE_FREQUENCIES = "rope_freqs.weight"
"""A tensor that stands for a rope scaling, as of Llama 3.1 and later."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all models that were published with this scaling; files do not say them."""


class GgufFile:
    """A whole GGUF file.

    Raises:
        CheckpointError: no such file, not GGUF, damaged or cut short, a part of several, or without tensors.
        UnsupportedError: the gguf package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file (it begins with {magic!r}, not {_MAGIC!r})")
        try:
            from ..compat.gguf import Reader
        except ImportError as error:
            raise UnsupportedError("reading GGUF needs the package gguf: pip install slidesparse[gguf]") from error
        try:
            self.reader = Reader(path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            # The reader checks nothing itself: a file cut short shows as a numpy view that does not fit.
            raise CheckpointError(f"{path}: damaged or cut short ({error})") from error
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        if (kind := self.value("general.type") or "model") != "model":
            raise CheckpointError(f"{path}: holds no model, but what llama.cpp calls {kind}: import the model's own file")
        count = self.value("split.count") or 1
        if count > 1:
            number = (self.value("split.no") or 0) + 1
            raise CheckpointError(f"{path}: part {number} of {count} of a split file: join the parts with llama.cpp's gguf-split --merge")
        if not self.tensors:
            raise CheckpointError(f"{path}: holds no tensors")
        self.architecture = str(self.value("general.architecture"))

    def value(self, key: str) -> Any:
        """A key's value, None if the file has no such key."""
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def own(self, key: str) -> Any:
        """The value of a key of the architecture, as ``rope.freq_base``."""
        return self.value(f"{self.architecture}.{key}")

    @property
    def own_keys(self) -> list[str]:
        """The architecture's keys, without its name in front."""
        start = f"{self.architecture}."
        return [key.removeprefix(start) for key in self.reader.fields if key.startswith(start)]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Their ids, by the names that transformers gives them."""
        found = {token: self.value(f"tokenizer.ggml.{key}_token_id") for token, key in _TOKEN_KEYS.items()}
        return {token: int(index) for token, index in found.items() if index is not None}

    @property
    def ends_of_text(self) -> list[int]:
        """Ids of the tokens that end a text."""
        found = (self.value(f"tokenizer.ggml.{key}_token_id") for key in _ENDS)
        return list(dict.fromkeys(int(index) for index in found if index is not None))

    @property
    def chat_templates(self) -> dict[str, str]:
        """Chat templates beside the one without a name, by theirs."""
        return {key.removeprefix(_TEMPLATE): self.value(key) for key in self.reader.fields if key.startswith(_TEMPLATE)}

    def unread_of_tokenizer(self, tables: Mapping[str, Mapping[str, str]]) -> list[str]:
        """The tokenizer's keys that are read neither here nor by transformers, whose ``tables`` name those that it reads."""
        read = {f"tokenizer.{key}" for table in tables.values() for key in table} | {"tokenizer.chat_templates"}
        read |= {f"tokenizer.ggml.{key}_token_id" for key in (*_TOKEN_KEYS.values(), *_ENDS)}
        own = (key for key in self.reader.fields if key.startswith("tokenizer.") and not key.startswith(_TEMPLATE))
        return [key for key in own if key not in read]

    @property
    def rotary(self) -> int | None:
        """How many dimensions of a head rope turns, None where the file does not say one number."""
        told = self.own("rope.dimension_count")
        return told if isinstance(told, int) else None

    @cached_property
    def main_dtype(self) -> torch.dtype:
        """Type of most of the weights; bfloat16 where they are quantised."""
        elements: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            dtype = _PLAIN.get(tensor.tensor_type.name, torch.bfloat16)
            elements[dtype] = elements.get(dtype, 0) + int(tensor.n_elements)
        return max(elements, key=elements.__getitem__)

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is written as: its own type, bfloat16 if it is quantised; vectors take `main_dtype` where it holds them exactly."""
        tensor = self.tensors[name]
        own = _PLAIN.get(tensor.tensor_type.name, torch.bfloat16)
        if own == self.main_dtype or len(tensor.shape) > 1:
            return own
        values = self.read(name)
        return self.main_dtype if torch.equal(values.to(self.main_dtype).to(values.dtype), values) else own

    def read(self, name: str) -> Tensor:
        """A tensor, float32 where the file's type is another."""
        return torch.from_numpy(np.array(self.dequantised(name)))

    def dequantised(self, name: str) -> np.ndarray:
        """A tensor as numpy reads it: float32, float16, or float32 where it was quantised."""
        from gguf import dequantize

        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.tensor_type)

    def rope_parameters(self) -> dict[str, Any]:
        """The rope scaling in transformers' words; empty without one.

        Raises:
            CheckpointError: one that transformers' words are not known for here.
        """
        kind = self.own("rope.scaling.type")
        original, factor = self.own("rope.scaling.original_context_length"), self.own("rope.scaling.factor")
        if ROPE_FREQUENCIES in self.tensors:
            return self._llama3()
        if kind in (None, "none"):
            return {}
        if kind == "linear" and factor is not None:
            return {"rope_type": "linear", "factor": float(factor)}
        if kind == "yarn" and factor is not None and original is not None:
            betas = {key: float(told) for key in _BETAS if (told := self.own(f"rope.scaling.yarn_{key}")) is not None}
            return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original)} | betas
        raise CheckpointError(f"{self.path}: rope scaling {kind!r} with factor {factor} is not known here: import the original checkpoint")

    def _llama3(self) -> dict[str, Any]:
        """Llama 3.1's scaling, from the factors by which it divides each frequency."""
        found = self.read(ROPE_FREQUENCIES).double()
        factor, base = float(found.max()), float(self.own("rope.freq_base") or 10000.0)
        wavelength = 2 * torch.pi * base ** (torch.arange(len(found), dtype=torch.float64) / len(found))
        low, high, context = (_LLAMA3[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
        if not torch.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
            raise CheckpointError(f"{self.path}: {ROPE_FREQUENCIES} is not Llama 3.1's rope scaling: import the original checkpoint")
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3} if factor > 1 else {}
