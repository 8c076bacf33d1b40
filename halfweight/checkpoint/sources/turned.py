"""A source some of whose weights are stored as [K, N] and read as [N, K].

GPT-2 and its kin multiply x with weights that lie the other way round than a Linear's. Turned here,
all else quantizes them like any other. The matrix in hand is held whole: one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from halfweight.checkpoint.forms import ORIGINAL
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import DTYPE_BYTES, TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from halfweight.checkpoint.sources.matrices import Int8Rows
    from halfweight.checkpoint.sources.source import Source


class TurnedSource:
    """`source` with the tensors in `names` transposed."""

    def __init__(self, source: Source, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.name, self.path, self.config = source.name, source.path, source.config
        self.stored_bytes = source.stored_bytes
        self._source = source
        self._stored = {t.name: t for t in source.tensors if t.name in self.names}
        self._lock = Lock()
        self._held: tuple[str, NDArray[np.uint8]] | None = None
        _refuse_int8(self._stored.values())
        self.tensors = tuple(
            replace(t, shape=t.shape[::-1]) if t.name in self.names else t for t in source.tensors
        )

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor as `tensors` states it."""
        if tensor.name not in self.names:
            return self._source.read(tensor, begin, end)
        return self._turned(self._stored[tensor.name])[begin:end]

    def _turned(self, stored: TensorInfo) -> NDArray[np.uint8]:
        with self._lock:
            if self._held is None or self._held[0] != stored.name:
                self._held = None
                size = DTYPE_BYTES[stored.dtype]
                data = self._source.read(stored, 0, stored.num_bytes).reshape(*stored.shape, size)
                turned = np.ascontiguousarray(data.transpose(1, 0, 2)).reshape(-1)
                self._held = (stored.name, turned)
            return self._held[1]

    def read_int8(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows:
        """Rows of a weight that is INT8 in the source, which is none that is turned."""
        return self._source.read_int8(tensor, begin, end)

    def fingerprint(self) -> dict[str, Any]:
        """That of the source."""
        return self._source.fingerprint()

    def state(self) -> list[Any]:
        """That of the source."""
        return self._source.state()

    def write_companions(self, folder: Path) -> None:
        """Those of the source."""
        self._source.write_companions(folder)


def _refuse_int8(tensors: Iterable[TensorInfo]) -> None:
    for tensor in tensors:
        if tensor.int8 is not None:
            raise CheckpointError(
                f"tensor {tensor.name}: INT8 of a layer whose weight lies as [K, N] is not read",
                hint=ORIGINAL,
            )


def turned_source(source: Source, names: Iterable[str]) -> Source:
    """`source` itself where `names` is empty, else with those tensors transposed."""
    names = tuple(names)
    return TurnedSource(source, names) if names else source


def turned_names(source: Source) -> frozenset[str]:
    """The tensors that `turned_source` has turned."""
    return source.names if isinstance(source, TurnedSource) else frozenset()
