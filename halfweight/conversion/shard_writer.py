"""One output shard, written as a stream of blocks of rows. Holds a few blocks, never a tensor."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.layout import OutputShard, header, module_of, scale_dtype, with_dtypes
from halfweight.checkpoint.sources.matrices import Int8Rows
from halfweight.checkpoint.sources.source import Source
from halfweight.conversion.parts import Advance, Part
from halfweight.errors import CheckpointError
from halfweight.quantization.fast_pass import QuantizedRows, RowStatistics, quantize_rows
from halfweight.quantization.float_bytes import as_float32
from halfweight.quantization.grid8 import lies_on_grid8
from halfweight.quantization.scheme import DTYPE_BYTES, FLOAT_DTYPE_BYTES, Decision, TensorInfo

BLOCK_BYTES = 1_000_000
"""Read at a time: small enough to stay in a core's cache until it is quantized."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Block:
    """Bytes [begin, end) of one source tensor; whole rows where it is quantized."""

    decision: Decision
    begin: int
    end: int


def _blocks(decision: Decision) -> list[_Block]:
    tensor = decision.tensor
    itemsize = DTYPE_BYTES[tensor.dtype]
    row_bytes = itemsize if decision.scheme is None else itemsize * tensor.shape[1]
    step = max(1, BLOCK_BYTES // row_bytes) * row_bytes
    starts = range(0, tensor.num_bytes, step)
    return [_Block(decision, a, min(a + step, tensor.num_bytes)) for a in starts]


def shard_part(source: Source, shard: OutputShard) -> Part:
    """A whole output file as a part of its output."""
    write = partial(write_shard, source, shard)
    return Part(shard.name, shard.name, 0, shard.num_bytes, shard.source_bytes, write)


def write_shard(
    source: Source,
    shard: OutputShard,
    path: Path,
    pool: ThreadPoolExecutor,
    window: int,
    advance: Advance,
) -> dict[str, Any]:
    """Write one output file; returns what the manifest says of its quantized tensors.

    At most `window` blocks are in memory. `pool` reads and quantizes; writing is left to this
    thread, for writers to one file only wait for each other. `advance(tensor name, bytes)` is
    called as the source is used up. Raises CheckpointError for a NaN or infinite weight, OSError
    from the disk.
    """
    records: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    blocks = [block for decision in shard.decisions for block in _blocks(decision)]
    with open(path, "wb") as file:
        fd = file.fileno()
        _reserve(fd, shard.num_bytes)
        results = _in_order(pool, partial(_convert_block, source), blocks, window)
        for tensor in _written(fd, shard, results, advance):
            if tensor.statistics["bad"].any():
                raise _not_finite(source, tensor.decision.tensor)
            tensor.write(fd, shard.offsets)
            dtypes[tensor.scale_name] = tensor.scale_dtype
            records[tensor.decision.tensor.name] = tensor.record
        first = header(with_dtypes(shard.tensors, dtypes), len(shard.header))
        _write_all(fd, memoryview(first), 0)
    return records


def write_tensors(
    source: Source,
    places: Mapping[TensorInfo, int],
    fd: int,
    pool: ThreadPoolExecutor,
    window: int,
    advance: Advance,
    *,
    first: bytes,
    num_bytes: int,
) -> None:
    """Write tensors as the source gives them to their places in a file of `num_bytes` bytes.

    `first` goes to its beginning, if there is any. The rest is as in `write_shard`.
    """
    _reserve(fd, num_bytes)
    _write_all(fd, memoryview(first), 0)
    blocks = [b for tensor in places for b in _blocks(Decision(tensor, None, ""))]
    for block, data in _in_order(pool, partial(_convert_block, source), blocks, window):
        tensor = block.decision.tensor
        assert isinstance(data, np.ndarray)
        _write_all(fd, data.data, places[tensor] + block.begin)
        advance(tensor.name, block.end - block.begin)


def _written(
    fd: int,
    shard: OutputShard,
    results: Iterable[tuple[_Block, QuantizedRows | NDArray[np.uint8]]],
    advance: Advance,
) -> Iterator[_Finished]:
    """Write blocks as they come; yields each quantized tensor once its packed bytes are written."""
    parts: list[tuple[NDArray[np.float32], NDArray[Any]]] = []
    for block, result in results:
        tensor = block.decision.tensor
        advance(tensor.name, block.end - block.begin)
        if not isinstance(result, QuantizedRows):
            _write_all(fd, result.data, shard.offsets[tensor.name] + block.begin)
            continue
        packed_at = shard.offsets[f"{module_of(tensor)}.weight_packed"]
        begin = block.begin // DTYPE_BYTES[tensor.dtype]
        _write_all(fd, result.packed.data, packed_at + begin)
        parts.append((result.scales, result.statistics))
        if block.end == tensor.num_bytes:
            scales, statistics = (np.concatenate(part) for part in zip(*parts, strict=True))
            yield _Finished(block.decision, scales, statistics)
            parts = []


def _reserve(fd: int, num_bytes: int) -> None:
    """Take the disk space at once, so that a full disk shows before the work, not after."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, num_bytes)
    else:
        os.ftruncate(fd, num_bytes)


def _convert_block(source: Source, block: _Block) -> QuantizedRows | NDArray[np.uint8]:
    """A block's rows quantized, or where the tensor is kept its bytes."""
    decision, tensor = block.decision, block.decision.tensor
    if decision.keeps_int8:
        row_bytes = DTYPE_BYTES[tensor.dtype] * tensor.shape[1]
        return _kept(source.read_int8(tensor, block.begin // row_bytes, block.end // row_bytes))
    raw = source.read(tensor, block.begin, block.end)
    if decision.scheme is None:
        if (
            tensor.dtype in FLOAT_DTYPE_BYTES
            and not np.isfinite(as_float32(raw, tensor.dtype)).all()
        ):
            raise _not_finite(source, tensor)
        return raw
    return quantize_rows(raw, tensor.dtype, decision.scheme, tensor.shape[1])


def _kept(rows: Int8Rows) -> QuantizedRows:
    """Rows that are INT8 in the source, without an error of ours."""
    statistics = np.zeros(len(rows.packed), RowStatistics)
    q = rows.packed.astype(np.int16) - np.int16(128)
    squares = (q * q).reshape(*rows.scales.shape, -1).sum(axis=2, dtype=np.int64)
    norms = squares * np.square(rows.scales, dtype=np.float64)
    statistics["squared_norm"] = norms.sum(axis=1)
    return QuantizedRows(rows.packed, rows.scales, statistics)


def _not_finite(source: Source, tensor: TensorInfo) -> CheckpointError:
    """The error of a tensor with NaN or Inf in it: how many, and the first."""
    count, first, value = 0, 0, 0.0
    itemsize = DTYPE_BYTES[tensor.dtype]
    for begin in range(0, tensor.num_bytes, BLOCK_BYTES * itemsize):
        end = min(begin + BLOCK_BYTES * itemsize, tensor.num_bytes)
        values = as_float32(source.read(tensor, begin, end), tensor.dtype)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size and not count:
            first, value = begin // itemsize + int(bad[0]), float(values[bad[0]])
        count += bad.size
    index = [int(i) for i in np.unravel_index(first, tensor.shape)]
    return CheckpointError(
        f"tensor {tensor.name}: {count} of {tensor.num_elements} weights not finite, "
        f"first {value} at {index}",
        hint="repair the source checkpoint; a NaN or Inf weight has no INT8 value",
    )


def _write_all(fd: int, data: memoryview, at: int) -> None:
    data = data.cast("B")
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], window: int
) -> Iterator[tuple[T, R]]:
    """(item, function(item)) in order, with at most `window` calls in flight."""
    flight: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        flight.append((item, pool.submit(function, item)))
        if len(flight) >= window:
            done, future = flight.popleft()
            yield done, future.result()
    for done, future in flight:
        yield done, future.result()


@dataclass(frozen=True)
class _Finished:
    """A tensor whose packed bytes are all written: scales float32 [N, K/G], statistics [N]."""

    decision: Decision
    scales: NDArray[np.float32]
    statistics: NDArray[Any]

    @property
    def scale_name(self) -> str:
        """The name of the scales on disk."""
        return f"{module_of(self.decision.tensor)}.weight_scale"

    @cached_property
    def scale_dtype(self) -> str:
        """F16 where the source is F16 and holds grid8 scales exactly, else as the scheme says."""
        assert self.decision.scheme is not None
        if self.decision.scheme.scale_format == "grid8" and self.decision.tensor.dtype == "F16":
            with np.errstate(over="ignore"):
                exact = np.array_equal(self.scales.astype(np.float16), self.scales)
            return "F16" if exact else "BF16"
        return scale_dtype(self.decision.scheme)

    @property
    def record(self) -> dict[str, Any]:
        """Group size, errors and crushed groups, for the manifest.

        Of what was INT8 in the source also the format that memory will hold its scales in.
        """
        assert self.decision.scheme is not None
        record = {
            "group_size": self.decision.scheme.group_size,
            "squared_error": float(self.statistics["squared_error"].sum()),
            "squared_norm": float(self.statistics["squared_norm"].sum()),
            "crushed_groups": int(self.statistics["crushed_groups"].sum()),
        }
        if not self.decision.keeps_int8:
            return record
        on_grid = lies_on_grid8(self.scales)
        return record | {"scale_format": "grid8" if on_grid else self.decision.scheme.scale_format}

    def write(self, fd: int, offsets: dict[str, int]) -> None:
        """Write scales and shape record."""
        stored = _in_dtype(self.scales, self.scale_dtype)
        _write_all(fd, stored.data, offsets[self.scale_name])
        shape = np.array(self.decision.tensor.shape, np.int64)
        _write_all(fd, shape.data, offsets[f"{module_of(self.decision.tensor)}.weight_shape"])


def _in_dtype(scales: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Scales, exactly representable in `dtype`, as its bits."""
    if dtype == "BF16":
        return (scales.view(np.uint32) >> 16).astype(np.uint16)
    return scales.astype({"F16": np.float16, "F32": np.float32}[dtype])
