"""A .gguf file's header as a config.json, for plans: no weights, no torch, no other package.

The converter reads GGUF through gguf-py and transformers, which takes seconds: names are translated
by building the model, the vocabulary is parsed string by string. A plan needs sizes only, so this
walks the header and says what config it describes, or None for what it does not know; whoever asks
then takes the long way.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
"""general.architecture -> model_type, of dense models."""
KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
}
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""GGUF's number of a type -> struct's letter."""
STRING, ARRAY = 8, 9
FLOAT_TYPES = {0: "float32", 1: "float16", 30: "bfloat16"}
LONGEST_STRING = 1 << 24


@dataclass(frozen=True)
class GgufHeader:
    """The config that a file describes, and the numbers in all its tensors."""

    config: dict[str, Any]
    num_parameters: int


class _Walk:
    """A position in a mapped file; every read moves it. Past the end is a struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def number(self, letter: str) -> Any:
        form = struct.Struct("<" + letter)
        (value,) = form.unpack_from(self._data, self._at)
        self._at += form.size
        return value

    def string(self) -> str:
        return self.raw_string().decode("utf-8", "replace")

    def raw_string(self) -> bytes:
        length = self.number("Q")
        if length > LONGEST_STRING:
            raise struct.error("string too long")
        begin, self._at = self._at, self._at + length
        return self._data[begin : self._at]

    def value(self, kind: int) -> Any:
        """A number or string; None for an array, which is passed over."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            self._at += count * struct.calcsize("<" + SCALARS[inner])
            return None
        for _ in range(count):
            self.value(inner)
        return None


def read_gguf_header(path: Path) -> GgufHeader | None:
    """The file's header, or None where it is not one that this knows."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                return None
            walk = _Walk(data)
            walk.number("I")
            return _header(walk)
    except (OSError, ValueError, KeyError, struct.error):
        return None


def _header(walk: _Walk) -> GgufHeader | None:
    if walk.number("I") not in (2, 3):
        return None
    num_tensors, num_fields = walk.number("Q"), walk.number("Q")
    fields = {}
    for _ in range(num_fields):
        name = walk.string()
        fields[name] = walk.value(walk.number("I"))
    shapes: dict[str, tuple[int, ...]] = {}
    kinds = set()
    for _ in range(num_tensors):
        name = walk.string()
        shapes[name] = tuple(walk.number("Q") for _ in range(walk.number("I")))
        kind, _ = walk.number("I"), walk.number("Q")
        kinds |= {kind} if len(shapes[name]) == 2 else set()
    config = _config(fields, shapes, kinds)
    own = {name: shape for name, shape in shapes.items() if not name.startswith("rope_freqs")}
    return None if config is None else GgufHeader(config, sum(map(prod, own.values())))


def _config(
    fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], kinds: set[int]
) -> dict[str, Any] | None:
    name = fields.get("general.architecture")
    if name not in MODEL_TYPES or fields.get(f"{name}.expert_count"):
        return None
    found = {ours: fields.get(f"{name}.{theirs}") for theirs, ours in KEYS.items()}
    sizes = {key: value for key, value in found.items() if value is not None}
    return {
        "model_type": MODEL_TYPES[name],
        **sizes,
        "vocab_size": shapes["token_embd.weight"][-1],
        "tie_word_embeddings": "output.weight" not in shapes,
        "dtype": _dtype(kinds),
    }


def _dtype(kinds: set[int]) -> str:
    """As the converter decodes to."""
    found = {FLOAT_TYPES.get(kind) for kind in kinds}
    if "bfloat16" in found:
        return "bfloat16"
    return "float32" if found == {"float32"} else "float16"
