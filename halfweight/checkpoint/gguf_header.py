"""A .gguf file's header: the config it describes, the dtype it decodes to. No weights, no torch.

The converter reads GGUF through gguf-py and transformers, which takes seconds: names are translated
by building the model, the vocabulary is parsed string by string. A plan needs sizes only, so this
walks the header and says what config it describes, or None for what it does not know; whoever asks
then takes the long way.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from halfweight.errors import CheckpointError

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
FLOAT_TYPES = {0: "F32", 1: "F16", 30: "BF16"}
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOAT16_ARCHITECTURES = ("bloom", "gpt2", "llama")
"""Those that run in float16. Others were trained in bfloat16 and may pass float16's 65,504, as
Gemma's residuals do, whatever their weights were stored in."""
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


@dataclass(frozen=True)
class _Fields:
    """What a header holds: its fields, tensors by name, and the types of its matrices."""

    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Collection[int]


def read_gguf_header(path: Path) -> GgufHeader | None:
    """The config that a file describes, or None where it is not one that this knows."""
    found = _read(path)
    if found is None:
        return None
    try:
        config = _config(found)
    except (KeyError, IndexError, TypeError):
        return None
    own = [shape for name, shape in found.shapes.items() if not name.startswith("rope_freqs")]
    return None if config is None else GgufHeader(config, sum(map(prod, own)))


def refuse_split(path: Path) -> None:
    """Raise CheckpointError for one of several files that hold a model together."""
    found = _read(path)
    count = found.values.get("split.count") if found is not None else None
    if isinstance(count, int) and count > 1:
        raise CheckpointError(
            f"{path}: one of {count} files of a split model, expected a whole one",
            hint="join them: `llama-gguf-split --merge FIRST_FILE WHOLE.gguf`",
        )


def decoded_dtype(architecture: Any, kinds: Collection[str]) -> str:
    """F32, F16 or BF16: what the matrices of a file are decoded to, by their types."""
    if set(kinds) == {"F32"}:
        return "F32"
    in_float16 = architecture in FLOAT16_ARCHITECTURES and "BF16" not in kinds
    return "F16" if in_float16 else "BF16"


def file_dtype(path: Path) -> str:
    """`decoded_dtype` of a file, as torch calls it. Raises CheckpointError if it is no GGUF."""
    found = _read(path)
    if found is None:
        raise CheckpointError(
            f"{path}: its header cannot be read as GGUF", hint="download the file again"
        )
    return TORCH_DTYPES[_decoded_dtype(found)]


def _decoded_dtype(found: _Fields) -> str:
    kinds = {FLOAT_TYPES.get(kind, "") for kind in found.kinds}
    return decoded_dtype(found.values.get("general.architecture"), kinds)


def _read(path: Path) -> _Fields | None:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                return None
            walk = _Walk(data)
            walk.number("I")
            return _fields(walk)
    except (OSError, ValueError, KeyError, RecursionError, struct.error):
        return None


def _fields(walk: _Walk) -> _Fields | None:
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
    return _Fields(fields, shapes, kinds)


def _config(found: _Fields) -> dict[str, Any] | None:
    fields, shapes = found.values, found.shapes
    name = fields.get("general.architecture")
    if name not in MODEL_TYPES or fields.get(f"{name}.expert_count"):
        return None
    known = {ours: fields.get(f"{name}.{theirs}") for theirs, ours in KEYS.items()}
    sizes = {key: value for key, value in known.items() if value is not None}
    return {
        "model_type": MODEL_TYPES[name],
        **sizes,
        "vocab_size": shapes["token_embd.weight"][-1],
        "tie_word_embeddings": "output.weight" not in shapes,
        "dtype": TORCH_DTYPES[_decoded_dtype(found)],
    }
