"""One safetensors file: its header read and checked, or written. No weights pass through here.

A shard is 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then data, contiguous from offset 0 to the end of the file. It comes from a stranger: every length,
offset and name is checked against the file's own size before anything is allocated, and every
fault is one :class:`CheckpointError` naming the file.
"""

from __future__ import annotations

import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from halfweight.checkpoint.json_files import parse_json
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import DTYPE_BYTES, TensorInfo

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own cap."""
MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its bytes are: `shard`[begin:end], absolute offsets into the file.

    Where it is some columns of a matrix, `pitch` bytes lie from one of its rows to the next.
    """

    info: TensorInfo
    shard: Path
    begin: int
    end: int
    pitch: int | None = None

    @property
    def name(self) -> str:
        """The tensor's full name."""
        return self.info.name

    def rows(self, begin: int, end: int) -> StoredTensor:
        """Rows begin to end of it."""
        height, *rest = self.info.shape
        each = self.info.num_bytes // height
        info = replace(self.info, shape=(end - begin, *rest))
        return replace(
            self, info=info, begin=self.begin + begin * each, end=self.begin + end * each
        )

    def columns(self, begin: int, end: int) -> StoredTensor:
        """Columns begin to end of a matrix that is whole in its file."""
        assert self.pitch is None, self.name
        height, width = self.info.shape
        item = DTYPE_BYTES[self.info.dtype]
        info, pitch = replace(self.info, shape=(height, end - begin)), width * item
        last = self.begin + (height - 1) * pitch
        return StoredTensor(info, self.shard, self.begin + begin * item, last + end * item, pitch)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its size, the length of its header, its tensors by offset."""

    path: Path
    num_bytes: int
    header_bytes: int
    tensors: tuple[StoredTensor, ...]


def read_shard(path: Path) -> Shard:
    """The checked header of one safetensors file. Raises CheckpointError naming the fault."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise broken(path, "not a regular file")
        with open(path, "rb") as file:
            raw = _read_header(path, file.read(8), status.st_size, file.read)
    except OSError as error:
        raise broken(path, f"cannot be read ({error.strerror})") from error
    header = _parse_header(path, raw)
    header.pop("__metadata__", None)
    start = 8 + len(raw)
    tensors = sorted(
        (_stored(path, name, entry, start) for name, entry in header.items()),
        key=lambda tensor: (tensor.begin, tensor.end),
    )
    _check_layout(path, tensors, start, status.st_size)
    return Shard(path, status.st_size, len(raw), tuple(tensors))


def broken(path: Path, fault: str) -> CheckpointError:
    """The error of a file that is not what it should be."""
    return CheckpointError(f"{path}: {fault}", hint="download or copy this file again")


def some(names: Iterable[str]) -> str:
    """A few names in words: 'tensor a and 3 more'."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 1} more" if len(ordered) > 1 else ""
    return f"tensor {ordered[0]}{rest}"


def _read_header(path: Path, prefix: bytes, num_bytes: int, read: Callable[[int], bytes]) -> bytes:
    if len(prefix) < 8:
        raise broken(path, f"{num_bytes} bytes, too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, num_bytes - 8):
        limit = f"at most {min(MAX_HEADER_BYTES, num_bytes - 8)}"
        raise broken(path, f"header of {length} bytes, expected {limit} (file: {num_bytes})")
    return read(length)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise broken(path, f"header names {twice} twice")
        return found

    try:
        header = parse_json(raw, unique)
    except (ValueError, RecursionError) as error:
        raise broken(path, f"header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise broken(path, f"header is a {type(header).__name__}, expected an object")
    return header


def _stored(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise broken(path, f"tensor {name}: header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name}: dtype {dtype!r} is not known",
            hint=f"expected one of {', '.join(DTYPE_BYTES)}",
        )
    if not _is_sizes(shape, MAX_DIMENSIONS) or not _is_sizes(offsets, 2) or len(offsets) != 2:
        raise broken(path, f"tensor {name}: bad shape {shape!r} or data_offsets {offsets!r}")
    info = TensorInfo(name, dtype, tuple(shape))
    begin, end = offsets
    if end - begin != info.num_bytes:
        size = f"{dtype} {shape} takes {info.num_bytes}"
        raise broken(path, f"tensor {name}: {end - begin} bytes of data, but {size}")
    return StoredTensor(info, path, start + begin, start + end)


def _is_sizes(values: Any, most: int) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_layout(path: Path, tensors: list[StoredTensor], start: int, num_bytes: int) -> None:
    """Data contiguous from `start` to the end of the file, without hole or overlap."""
    position = start
    for tensor in tensors:
        if tensor.begin != position:
            fault = "overlaps another" if tensor.begin < position else "leaves a hole before it"
            raise broken(path, f"tensor {tensor.name} {fault} at byte {tensor.begin}")
        position = tensor.end
    if position > num_bytes:
        cut = [tensor.name for tensor in tensors if tensor.end > num_bytes]
        raise broken(path, f"truncated: {position - num_bytes} bytes short, cut off: {some(cut)}")
    if position < num_bytes:
        raise broken(path, f"{num_bytes - position} bytes after the last tensor")
