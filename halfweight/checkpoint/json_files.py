"""Every JSON file is read here, and is of the types that the rest of the code expects.

A checkpoint comes from a stranger, so a key may hold anything. What is read of a file by name is
declared below, once; msgspec checks it in microseconds and names the place that is wrong. (pydantic
would do as well, but takes a plan's whole start-up time to import.) Keys that nothing here reads
are let through: they are for transformers, which has its own opinion of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from halfweight.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000
LONGEST_NAME = 255
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""How half a character looks in JSON: allowed in pairs only."""


class TensorRecord(msgspec.Struct):
    """Of a quantized tensor, in manifest and journal."""

    group_size: int | str
    squared_error: float
    squared_norm: float
    crushed_groups: int
    scale_format: str | None = None


class FileRecord(msgspec.Struct):
    """Of a file, in the manifest."""

    bytes: int
    sha256: str


class ShardRecord(FileRecord):
    """Of a shard, in the manifest."""

    tensors: dict[str, TensorRecord]


class JournalLine(ShardRecord):
    """Of a finished shard, in the journal of a conversion."""

    shard: str


class SchemeRecord(msgspec.Struct):
    """The scheme of a recipe, in the manifest."""

    scale_format: str


class RecipeRecord(msgspec.Struct):
    """The recipe of a job, in the manifest."""

    scheme: SchemeRecord


class ExportRecord(msgspec.Struct):
    """The form of an export, in the manifest."""

    to: str


class JobRecord(msgspec.Struct):
    """What a folder was made from, in the manifest: a recipe's work, or an export's."""

    recipe: RecipeRecord | None = None
    export: ExportRecord | None = None


class Manifest(msgspec.Struct):
    """halfweight.json."""

    job: JobRecord
    shards: dict[str, ShardRecord]
    files: dict[str, FileRecord]


class GroupWeights(msgspec.Struct):
    """How the weights of a config group are stored."""

    num_bits: int | None = None
    type: str | None = None
    symmetric: bool | None = None
    group_size: int | None = None


class ConfigGroup(msgspec.Struct):
    """One of the groups of a quantization config."""

    targets: list[str] | None = None
    weights: GroupWeights | None = None


class CompressedTensors(msgspec.Struct):
    """quantization_config of config.json, where modules are packed."""

    config_groups: dict[str, ConfigGroup] | None = None
    ignore: list[str] | None = None


class ModelConfig(msgspec.Struct):
    """config.json, as far as it is read without transformers. Sizes have many names: see
    memory/cache_layers.py, which looks at the type of each it finds.
    """

    model_type: str | None = None
    architectures: list[str] | None = None
    text_config: ModelConfig | None = None
    quantization_config: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None
    is_encoder_decoder: bool | None = None
    layer_types: list[str] | None = None
    layers_block_type: list[str] | None = None
    hybrid_override_pattern: str | None = None
    block_types: list[str] | None = None
    attn_layer_indices: list[int] | None = None
    full_attn_idxs: list[int] | None = None
    attn_layer_period: int | None = None
    attn_layer_offset: int | None = None
    max_window_layers: int | None = None
    num_kv_shared_layers: int | None = None


class Index(msgspec.Struct):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


def read_json(path: Path, kind: type[msgspec.Struct] | None = None) -> dict[str, Any]:
    """A JSON object from a file, of the types that `kind` declares.

    Raises CheckpointError naming the file, and the key that is wrong.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: {size} bytes of JSON, expected at most {MAX_JSON_BYTES}",
                hint="this is not a model's JSON file; download it again",
            )
        value = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({error})", hint="download the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(value).__name__}",
            hint="download the file again",
        )
    if kind is not None:
        check_types(path, value, kind)
    return value


def is_plain_name(name: str) -> bool:
    """Whether a name from a file can only mean an entry of that file's own folder."""
    is_short = len(name.encode("utf-8", "replace")) <= LONGEST_NAME
    return is_short and name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def parse_json(
    raw: bytes, unique: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> Any:
    """The value of a JSON text in UTF-8, of whole characters. Raises ValueError, RecursionError."""
    value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    if SURROGATE.search(raw):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def check_types(path: Path, value: Any, kind: type[msgspec.Struct]) -> None:
    """Raise CheckpointError where what was read of a file is of other types than declared."""
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {error}", hint="download or copy this file again"
        ) from error
