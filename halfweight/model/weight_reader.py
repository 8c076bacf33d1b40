"""From file to device once: the bytes of a checkpoint, without a copy of the model in the host.

On the CPU a tensor is a view of the mapped file: loading costs no memory and no time until pages
are touched. For any other device the file is read in chunks by several threads. Each thread owns
two staging buffers (pinned for CUDA): while one is on its way to the device on the thread's own
stream, the other is being read into, so disk (or page cache), processor and bus all work at once.
A thread holds Python's lock a few dozen microseconds a chunk, so all of this goes on beside other
work of the process; `Tally.stop` calls it off.
At most NUM_THREADS * 2 * CHUNK_BYTES of host memory are in use, whatever the model's size.

The caller owns the destinations: `read_into` fills tensors that exist already, so projections to
be fused are read straight into the rows of one tensor. Chunks follow the file, not the tensors:
small neighbours come with one read.

Refused: one allocation a shard with tensors as views of it. Scales leave memory once they are in
grid8 (1.5 % of the model), and a view would keep the whole shard alive.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from halfweight.checkpoint.headers import Checkpoint
from halfweight.checkpoint.shard import StoredTensor, broken

CHUNK_BYTES = 8 << 20
NUM_THREADS = 8
NARROW_BYTES = 1 << 10
"""Of a row's columns that are wanted: fewer are read with the rest of their row."""
STAGING_BYTES = 2 * NUM_THREADS * CHUNK_BYTES
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""torch's dtype of each safetensors dtype."""
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from any thread, one call at a time."""
_cuda: Any = torch.cuda
"""torch.cuda, whose stubs leave events and streams untyped."""


@dataclass(frozen=True)
class _Piece:
    """Bytes of one tensor that lie in a chunk: where in the chunk, and where they go.

    A destination [rows, width] takes the first `width` of every `pitch` bytes.
    """

    at: int
    destination: Tensor
    pitch: int = 0

    def source(self, buffer: Tensor) -> Tensor:
        """The bytes where the chunk was read into `buffer`."""
        if self.pitch:
            return buffer.as_strided(self.destination.shape, (self.pitch, 1), self.at)
        return buffer[self.at : self.at + self.destination.numel()]


@dataclass(frozen=True)
class _Chunk:
    """Bytes of a shard that are staged together, and the pieces of tensors that they are.

    `count` runs of `width` bytes, the first at `begin`, the others `pitch` bytes apart.
    """

    shard: Path
    begin: int
    width: int
    pieces: tuple[_Piece, ...]
    count: int = 1
    pitch: int = 0

    @property
    def num_bytes(self) -> int:
        """What is read."""
        return self.width * self.count


def map_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor by name as a view of its mapped file; a copy where not aligned to its dtype."""
    found: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        if not shard.tensors:
            continue
        with open(shard.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for tensor in shard.tensors:
            found[tensor.name] = _view_of(mapped, tensor)
    return found


def _view_of(mapped: mmap.mmap, tensor: StoredTensor) -> Tensor:
    """A tensor whose storage is its own bytes of the file, so that a pickle holds no others."""
    dtype, num_bytes = DTYPES[tensor.info.dtype], tensor.end - tensor.begin
    if not num_bytes:
        return torch.empty(tensor.info.shape, dtype=dtype)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes, offset=tensor.begin)
    aligned = raw if tensor.begin % dtype.itemsize == 0 else raw.clone()
    return _shaped(aligned.view(dtype), tensor)


def _shaped(numbers: Tensor, tensor: StoredTensor) -> Tensor:
    """A tensor of the numbers that lie in a file from its first to its last."""
    if tensor.pitch is None:
        return numbers.view(tensor.info.shape)
    return numbers.as_strided(tensor.info.shape, (tensor.pitch // numbers.itemsize, 1))


class Tally:
    """Counts the bytes that have arrived, from any thread, and tells `progress`."""

    def __init__(self, total: int, progress: Progress | None = None) -> None:
        self.stopped = False
        self._done, self._total = 0, total
        self._lock = Lock()
        self._progress = progress

    def add(self, num_bytes: int) -> None:
        """So many more bytes have arrived."""
        with self._lock:
            self._done += num_bytes
            if self._progress is not None:
                self._progress(self._done, self._total)

    def finish(self) -> None:
        """All that was wanted is there, some of it by other ways."""
        self.add(self._total - self._done)

    def stop(self) -> None:
        """No more are wanted: reading ends after the chunks under way, its targets half filled."""
        self.stopped = True


def read_into(targets: Iterable[tuple[StoredTensor, Tensor]], tally: Tally | None = None) -> None:
    """Fill each target, contiguous and of the stored tensor's bytes, from the file; then return.

    Targets lie on one device. Raises CheckpointError if a file is shorter than its header says.
    """
    tally = tally or Tally(0)
    pairs = sorted(targets, key=lambda pair: (str(pair[0].shard), pair[0].begin))
    if not pairs:
        return
    chunks = [chunk for _, run in groupby(pairs, lambda pair: pair[0].shard) for chunk in _cut(run)]
    todo = iter(chunks)
    device = pairs[0][1].device
    ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def work() -> None:
        try:
            with _Lane(device, ready) as lane:
                for chunk in todo:
                    if tally.stopped:
                        break
                    lane.move(chunk)
                    tally.add(chunk.num_bytes)
        except BaseException:
            tally.stop()
            raise

    num_threads = min(NUM_THREADS, len(chunks))
    with ThreadPoolExecutor(num_threads) as pool:
        for done in [pool.submit(work) for _ in range(num_threads)]:
            done.result()


def _cut(run: Iterable[tuple[StoredTensor, Tensor]]) -> Iterator[_Chunk]:
    """Chunks of one shard: runs of neighbouring bytes, cut every CHUNK_BYTES."""
    pieces: list[_Piece] = []
    begin = end = 0
    for stored, target in run:
        if stored.pitch is not None:
            yield from _cut_columns(stored, target)
            continue
        data = _bytes(stored, target)
        position = stored.begin
        while position < stored.end:
            if pieces and (position != end or end - begin == CHUNK_BYTES):
                yield _Chunk(stored.shard, begin, end - begin, tuple(pieces))
                pieces = []
            if not pieces:
                begin = end = position
            step = min(stored.end - position, CHUNK_BYTES - (end - begin))
            offset = position - stored.begin
            pieces.append(_Piece(position - begin, data[offset : offset + step]))
            position = end = position + step
    if pieces:
        yield _Chunk(stored.shard, begin, end - begin, tuple(pieces))


def _cut_columns(stored: StoredTensor, target: Tensor) -> Iterator[_Chunk]:
    """Chunks of some columns of a matrix: of as many of its rows as fit, each row by itself.

    Where a row has few bytes, all that lies between is read with them: a call costs more.
    """
    assert stored.pitch is not None
    height, pitch = stored.info.shape[0], stored.pitch
    data = _bytes(stored, target).view(height, -1)
    width = data.shape[1]
    is_narrow = width < NARROW_BYTES
    most = max(1, CHUNK_BYTES // (pitch if is_narrow else width))
    for row in range(0, height, most):
        part, begin = data[row : row + most], stored.begin + row * pitch
        count = len(part)
        if is_narrow:
            whole = (count - 1) * pitch + width
            yield _Chunk(stored.shard, begin, whole, (_Piece(0, part, pitch),))
        else:
            yield _Chunk(stored.shard, begin, width, (_Piece(0, part.view(-1)),), count, pitch)


def _bytes(stored: StoredTensor, target: Tensor) -> Tensor:
    assert target.is_contiguous(), stored.name
    assert target.nbytes == stored.info.num_bytes, stored.name
    return target.view(-1).view(torch.uint8)


class _Lane:
    """One thread's way to the device: two staging buffers and, for CUDA, a stream of its own.

    The stream begins after `ready`, the event at which the targets' memory may be written. A buffer
    is allocated when its first chunk comes: pinning takes longer than reading into it.
    """

    def __init__(self, device: torch.device, ready: Any) -> None:
        self._stream = _cuda.Stream(device) if device.type == "cuda" else None
        self._ready = ready
        self._buffers: list[Tensor] = []
        self._sent: list[Any] = [None, None]
        self._turn = 0

    def __enter__(self) -> _Lane:
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)  # of this thread, which ends with the lane
            self._stream.wait_event(self._ready)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def move(self, chunk: _Chunk) -> None:
        """Read a chunk and send its pieces off; returns while they may still be on their way."""
        turn, self._turn = self._turn, 1 - self._turn
        if self._sent[turn] is not None:
            self._sent[turn].synchronize()
        if turn == len(self._buffers):
            pinned = self._stream is not None
            self._buffers.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned))
        buffer = self._buffers[turn]
        _read(chunk, buffer)
        for piece in chunk.pieces:
            piece.destination.copy_(piece.source(buffer), non_blocking=True)
        if self._stream is not None:
            self._sent[turn] = self._stream.record_event()


def _read(chunk: _Chunk, buffer: Tensor) -> None:
    view = buffer.numpy().data
    fd = os.open(chunk.shard, os.O_RDONLY)
    try:
        for run in range(chunk.count):
            at = run * chunk.width
            _read_run(chunk, fd, view[at : at + chunk.width], chunk.begin + run * chunk.pitch)
    finally:
        os.close(fd)


def _read_run(chunk: _Chunk, fd: int, view: memoryview, position: int) -> None:
    end = position + len(view)
    while view:
        count = os.preadv(fd, [view], position)
        if count == 0:
            raise broken(chunk.shard, f"ends at byte {position}, expected {end}")
        view, position = view[count:], position + count
