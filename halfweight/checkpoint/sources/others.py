"""A folder of safetensors in a quantized form of others as a source: weights as the model has them.

Headers and small parts are read first; weights are decoded as the conversion asks for rows of
them, holding at most the matrix in hand. INT8 values are handed on bit for bit.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.forms import Form
from halfweight.checkpoint.headers import Checkpoint, model_dtype
from halfweight.checkpoint.shard import some
from halfweight.checkpoint.sources.folder import FolderSource
from halfweight.checkpoint.sources.matrices import Held, Int8Rows, Matrix, Reader
from halfweight.quantization.float_bytes import as_bytes
from halfweight.quantization.scheme import TensorInfo

log = logging.getLogger("halfweight")

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class OthersFolder(FolderSource):
    """A folder whose weights are in `form`, which has a reader."""

    def __init__(self, checkpoint: Checkpoint, name: str, form: Form) -> None:
        """Reads small parts and checks them; raises CheckpointError for what is not read."""
        super().__init__(checkpoint, name)
        plain, matrices = as_the_model_has_them(form, checkpoint.config, self.tensors)
        for matrix in matrices:
            matrix.check(self._read_stored)
        self.config = {k: v for k, v in self.config.items() if k != "compression_config"}
        self.tensors = (*plain, *(matrix.info for matrix in matrices))
        self._matrices = {matrix.info.name: matrix for matrix in matrices}
        self._held_bytes: Held[NDArray[np.uint8]] = Held()
        self._held_int8: Held[Int8Rows] = Held()
        self._log(form)

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor as the model has it, decoded where it is in the form."""
        if tensor.name not in self._matrices:
            return super().read(tensor, begin, end)
        if begin == end:
            return np.empty(0, np.uint8)
        row_bytes = tensor.num_bytes // tensor.shape[0]
        found = []
        for first, last in self._pieces(tensor.name, begin // row_bytes, -(-end // row_bytes)):
            decoded, at = self._decoded(tensor, first, last), first * row_bytes
            found.append(decoded[max(begin - at, 0) : end - at])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def read_int8(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows:
        """Rows [begin, end) of a weight that is INT8 in the file."""
        found = []
        for first, last in self._pieces(tensor.name, begin, end):
            rows = self._int8(tensor, first, last)
            part = slice(max(begin - first, 0), end - first)
            found.append((rows.packed[part], rows.scales[part]))
        packed, scales = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Int8Rows(packed, scales).sound(tensor.name)

    def _pieces(self, name: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Spans of leading rows that hold [begin, end), as the form is read."""
        matrix = self._matrices[name]
        if not (step := matrix.rows_at_once):
            yield begin, end
            return
        for start in range(begin // step * step, end, step):
            yield start, min(start + step, matrix.info.shape[0])

    def _decoded(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes of rows in the tensor's dtype; held where others of the same piece will come."""

        def make() -> NDArray[np.uint8]:
            rows = self._rows(tensor, begin, end)
            with np.errstate(over="ignore", invalid="ignore"):
                values = rows.values() if isinstance(rows, Int8Rows) else rows
            return as_bytes(values, tensor.dtype)

        if not self._matrices[tensor.name].rows_at_once:
            return make()
        return self._held_bytes.get((tensor.name, begin), make)

    def _int8(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows:
        def make() -> Int8Rows:
            rows = self._rows(tensor, begin, end)
            assert isinstance(rows, Int8Rows)
            return rows

        if not self._matrices[tensor.name].rows_at_once:
            return make()
        return self._held_int8.get((tensor.name, begin), make)

    def _rows(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows | NDArray[np.float32]:
        """What is not finite in the file is found by who asked, and not warned of here."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._matrices[tensor.name].rows(self._read_stored, begin, end)

    def _log(self, form: Form) -> None:
        infos = [matrix.info for matrix in self._matrices.values()]
        kept = [info.name for info in infos if info.int8 is not None]
        decoded = [info for info in infos if info.int8 is None]
        if kept:
            log.info("%s: %s: %s kept bit for bit", self.name, form.name, some(kept))
        if decoded:
            losses = {matrix.loses(self._read_stored) for matrix in self._matrices.values()}
            lost = next(iter(losses - {""}), None)
            how = "exactly" if lost is None else f"rounded by {lost}"
            what = (some(info.name for info in decoded), form.name, decoded[0].dtype, how)
            log.warning("%s: %s decoded from %s to %s, %s", self.name, *what)


def as_the_model_has_them(
    form: Form, config: Mapping[str, Any], tensors: Iterable[TensorInfo]
) -> tuple[list[TensorInfo], list[Matrix]]:
    """The tensors that are not in the form, and the weights that are. Headers alone are needed."""
    assert form.reader is not None
    by_name = {tensor.name: tensor for tensor in tensors}
    reader: Reader = importlib.import_module(f"halfweight.checkpoint.sources.{form.reader}")
    declared = config.get("quantization_config") or {}
    dtype = DTYPES[model_dtype(config, by_name.values())]
    found = reader.matrices(by_name, dtype, declared if isinstance(declared, dict) else {})
    parts = {part.name for matrix in found for part in matrix.parts}
    return [tensor for tensor in by_name.values() if tensor.name not in parts], found
