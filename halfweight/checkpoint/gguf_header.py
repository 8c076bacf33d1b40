"""A .gguf file's header: the config it describes, the dtype it decodes to. No weights, no torch.

The converter reads GGUF through gguf-py and transformers, which takes seconds: names are translated
by building the model, the vocabulary is parsed string by string. A plan needs sizes only, so this
walks the header and says what config it describes, or None for what it does not know; whoever asks
then takes the long way.
"""

from __future__ import annotations

import mmap
import re
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
Q8_0 = 8
"""GGUF's number of the type that is INT8."""
SPLIT_NAME = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf", re.DOTALL)
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FLOAT_TYPES = {0: "F32", 1: "F16", 30: "BF16"}
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOAT16_ARCHITECTURES = ("bloom", "gpt2", "llama")
"""Those that run in float16. Others were trained in bfloat16 and may pass float16's 65,504, as
Gemma's residuals do, whatever their weights were stored in."""
LONGEST_STRING = 1 << 24


@dataclass(frozen=True)
class GgufHeader:
    """The config that a file describes, the numbers in all its tensors, those that are INT8 in it.

    The names are those of transformers.
    """

    config: dict[str, Any]
    num_parameters: int
    int8: frozenset[str] = frozenset()


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
    """What a header holds: its fields, shapes and types of tensors by name."""

    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, int]

    @property
    def kinds(self) -> set[int]:
        """The types of its matrices."""
        return {self.types[name] for name, shape in self.shapes.items() if len(shape) == 2}


def read_gguf_header(path: Path) -> GgufHeader | None:
    """The config that a file describes, or None where it is not one that this knows."""
    found = _read_joined(path)
    if found is None:
        return None
    try:
        config = _config(found)
    except (KeyError, IndexError, TypeError):
        return None
    own = [shape for name, shape in found.shapes.items() if not name.startswith("rope_freqs")]
    int8 = {_model_name(name) for name in found.shapes if found.types[name] == Q8_0}
    if config is None or None in int8:
        return None
    return GgufHeader(config, sum(map(prod, own)), frozenset(filter(None, int8)))


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The file itself, or all files of the split model that it is one of, in order.

    Raises CheckpointError where one is missing or the names are not llama.cpp's.
    """
    found = _read(path)
    count = found.values.get("split.count") if found is not None else None
    if type(count) is not int or count <= 1:
        return (path,)
    named = SPLIT_NAME.fullmatch(path.name)
    if named is None or int(named[2]) != count:
        raise CheckpointError(
            f"{path}: one of {count} files of a split model, expected NAME-00001-of-0000N.gguf",
            hint="give the files their names back; a download must not rename them",
        )
    files = tuple(
        path.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    )
    for number, file in enumerate(files):
        _check_part(file, number, count)
    return files


def _check_part(file: Path, number: int, count: int) -> None:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: missing, one of {count} files of a split model", hint="download it too"
        )
    found = _read(file)
    values = {} if found is None else found.values
    if (values.get("split.no"), values.get("split.count")) != (number, count):
        raise CheckpointError(
            f"{file}: is not part {number} of {count} of a split model, as its name says",
            hint="download the file again",
        )


def _read_joined(path: Path) -> _Fields | None:
    """The header of a whole model: the first file's fields, the tensors of all."""
    parts = [_read(file) for file in gguf_files(path)]
    if not parts or any(part is None for part in parts):
        return None
    found = [part for part in parts if part is not None]
    shapes = {name: shape for part in found for name, shape in part.shapes.items()}
    types = {name: kind for part in found for name, kind in part.types.items()}
    return _Fields(found[0].values, shapes, types)


def _model_name(name: str) -> str | None:
    """A matrix of one of MODEL_TYPES as transformers calls it."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    found = LAYER_NAME.fullmatch(name)
    own = LAYER_NAMES.get(found[2]) if found else None
    return None if found is None or own is None else f"model.layers.{found[1]}.{own}.weight"


def decoded_dtype(architecture: Any, kinds: Collection[str]) -> str:
    """F32, F16 or BF16: what the matrices of a file are decoded to, by their types."""
    if set(kinds) == {"F32"}:
        return "F32"
    in_float16 = architecture in FLOAT16_ARCHITECTURES and "BF16" not in kinds
    return "F16" if in_float16 else "BF16"


def file_dtype(path: Path) -> str:
    """`decoded_dtype` of a file, as torch calls it. Raises CheckpointError if it is no GGUF."""
    found = _read_joined(path)
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
    types = {}
    for _ in range(num_tensors):
        name = walk.string()
        shapes[name] = tuple(walk.number("Q") for _ in range(walk.number("I")))
        types[name], _ = walk.number("I"), walk.number("Q")
    return _Fields(fields, shapes, types)


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
