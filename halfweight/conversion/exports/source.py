"""INT8 weights as a Source: what the forms of export share of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.sources.int8_folder import OFFSET, Int8Folder
from halfweight.checkpoint.sources.matrices import Int8Rows
from halfweight.quantization.scheme import TensorInfo

Rows = Callable[[int, int], NDArray[Any]]
"""Rows [first, last) of a tensor."""


class ExportSource:
    """An Int8Folder as a Source of a form's tensors; a form has its own `read`."""

    def __init__(self, folder: Int8Folder, tensors: tuple[TensorInfo, ...]) -> None:
        self.name, self.path, self.config = folder.name, folder.path, folder.config
        self.stored_bytes = folder.stored_bytes
        self.folder, self.tensors = folder, tensors

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor of the form."""
        raise NotImplementedError

    def read_int8(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows:
        """Never asked for: nothing is quantized."""
        raise NotImplementedError(tensor.name)

    def fingerprint(self) -> dict[str, Any]:
        """That of the folder."""
        return self.folder.fingerprint()

    def state(self) -> list[Any]:
        """That of the folder."""
        return self.folder.state()

    def write_companions(self, folder: Path) -> None:
        """Those of the folder."""
        self.folder.write_companions(folder)


def bytes_of_rows(rows: Rows, row_bytes: int, begin: int, end: int) -> NDArray[np.uint8]:
    """Bytes [begin, end) of a tensor whose rows, of `row_bytes`, are made together."""
    first, last = begin // row_bytes, -(-end // row_bytes)
    data = np.ascontiguousarray(rows(first, last)).reshape(-1).view(np.uint8)
    return data[begin - first * row_bytes : end - first * row_bytes]


def dequantized(folder: Int8Folder, module: str, begin: int, end: int) -> NDArray[np.float32]:
    """Weights [begin, end) of a module in row-major order: whole groups are read around them."""
    group = folder.weights[module].group_size
    first, last = begin // group, -(-end // group)
    values = folder.packed(module, first * group, last * group).astype(np.float32)
    values -= OFFSET
    groups = values.reshape(-1, group)
    groups *= folder.scales(module).reshape(-1, 1)[first:last]
    return values[begin - first * group : end - first * group]
