"""A Hugging Face folder of safetensors shards as a source."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.forms import ORIGINAL
from halfweight.checkpoint.headers import (
    LEGAL_PREFIXES,
    Checkpoint,
    check_inside,
    quantized_modules,
)
from halfweight.checkpoint.json_files import read_json
from halfweight.checkpoint.shard import Shard, StoredTensor, broken
from halfweight.checkpoint.sources.matrices import Int8Rows
from halfweight.checkpoint.sources.source import CODE_KEYS, is_tied, publishable
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import FLOAT_DTYPE_BYTES, TensorInfo

COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
NOT_COMPANIONS = ("config.json", "quantize_config.json", "quant_config.json", "halfweight.json")


SPAN = 4_000_000


class FolderSource:
    """A Hugging Face folder of safetensors shards."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        """`name` is what the user called the folder."""
        self.path = checkpoint.root
        self.name = name
        self.config = publishable(checkpoint.config)
        self._checkpoint = checkpoint
        self._stored = {tensor.name: tensor for tensor in checkpoint.tensors}
        self.tensors = tuple(t.info for t in checkpoint.tensors if not self._is_tied_head(t.info))
        self.stored_bytes = sum(tensor.num_bytes for tensor in self.tensors)

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor; raises CheckpointError if the file got shorter."""
        return self._read_stored(tensor, begin, end)

    def read_int8(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows:
        """Never asked for: no weight is in INT8."""
        raise NotImplementedError(tensor.name)

    def _read_stored(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        return read_stored(self._stored[tensor.name], begin, end)

    def _is_tied_head(self, head: TensorInfo) -> bool:
        """Whether this is a head stored beside the embedding that it shares its values with.

        One that differs is a weight of its own: transformers does not tie it either.
        """
        if not (head.name.endswith("lm_head.weight") and is_tied(self.config)):
            return False
        twins = (t.info for t in self._checkpoint.tensors if t.name != head.name)
        return any(_same_form(head, twin) and self._same_bytes(head, twin) for twin in twins)

    def _same_bytes(self, a: TensorInfo, b: TensorInfo) -> bool:
        spans = ((i, min(i + SPAN, a.num_bytes)) for i in range(0, a.num_bytes, SPAN))
        read = self._read_stored
        return all(np.array_equal(read(a, *span), read(b, *span)) for span in spans)

    def fingerprint(self) -> dict[str, Any]:
        """Name, size and header hash of each shard, and the hash of config.json."""
        return fingerprint(self._checkpoint)

    def state(self) -> list[Any]:
        """Size and modification time of every shard."""
        return state(self._checkpoint)

    def write_companions(self, folder: Path) -> None:
        """Copy tokenizer, generation config and licence; never code."""
        copy_companions(self._checkpoint.root, folder)


def read_stored(stored: StoredTensor, begin: int, end: int) -> NDArray[np.uint8]:
    """Bytes [begin, end) of a stored tensor; raises CheckpointError if the file got shorter."""
    block = np.empty(end - begin, np.uint8)
    rest = block.data
    with open(stored.shard, "rb", buffering=0) as file:
        file.seek(stored.begin + begin)
        while rest:
            count = file.readinto(rest)
            if not count:
                raise broken(stored.shard, f"ended at byte {file.tell()}, inside {stored.name}")
            rest = rest[count:]
    return block


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Name, size and header hash of each shard, and the hash of config.json."""
    config = (checkpoint.root / "config.json").read_bytes()
    return {
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "shards": [_shard_fingerprint(shard) for shard in checkpoint.shards],
    }


def state(checkpoint: Checkpoint) -> list[Any]:
    """Size and modification time of every shard."""
    found = [(shard.path.name, shard.path.stat()) for shard in checkpoint.shards]
    return [[name, status.st_size, status.st_mtime_ns] for name, status in found]


def copy_companions(root: Path, folder: Path) -> None:
    """Copy tokenizer, generation config and licence from a checkpoint's folder; never code."""
    for path in sorted(root.iterdir()):
        if not _is_companion(path):
            continue
        data = check_inside(root, path.name).read_bytes()
        if path.suffix == ".json":
            data = _json_publishable(path, data)
        (folder / path.name).write_bytes(data)


def _same_form(a: TensorInfo, b: TensorInfo) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def require_floats(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the weights are already quantized, by us or in an unknown form."""
    path = checkpoint.root
    if quantized_modules(checkpoint):
        raise CheckpointError(
            f"{path}: already quantized by compressed-tensors, in 8 bits",
            hint="run it as it is, or quantize the 16-bit model that it was made from",
        )
    for tensor in checkpoint.tensors:
        is_weight = len(tensor.info.shape) == 2 and "weight" in tensor.name
        if is_weight and tensor.info.dtype not in FLOAT_DTYPE_BYTES:
            found = f"already quantized: tensor {tensor.name} is {tensor.info.dtype}"
            raise CheckpointError(f"{path}: {found}, expected 16 or 32 bits", hint=ORIGINAL)


def _shard_fingerprint(shard: Shard) -> dict[str, Any]:
    with open(shard.path, "rb") as file:
        head = file.read(8 + shard.header_bytes)
    return {
        "name": shard.path.name,
        "bytes": shard.num_bytes,
        "header_sha256": hashlib.sha256(head).hexdigest(),
    }


def _is_companion(path: Path) -> bool:
    name = path.name
    if name.startswith(".") or name in NOT_COMPANIONS or name.endswith(".index.json"):
        return False
    named = path.suffix in COMPANION_SUFFIXES or name.startswith(LEGAL_PREFIXES)
    return named and path.is_file()


def _json_publishable(path: Path, data: bytes) -> bytes:
    if not any(key.encode() in data for key in CODE_KEYS):
        return data
    return json.dumps(publishable(read_json(path)), indent=2, ensure_ascii=False).encode()
