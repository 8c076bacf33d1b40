"""A folder of safetensors in a quantized form of others as a source: weights as the model has them.

Headers and small parts are read first; weights are decoded as the conversion asks for rows of
them, holding at most the matrix in hand. INT8 values are handed on bit for bit.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
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
        self._held: Held[Int8Rows | NDArray[np.float32]] = Held()
        self._log(form)

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor as the model has it, decoded where it is in the form."""
        if tensor.name not in self._matrices:
            return super().read(tensor, begin, end)
        row_bytes = tensor.num_bytes // tensor.shape[0]
        first, last = begin // row_bytes, -(-end // row_bytes)
        pieces = []
        for rows in self._rows(tensor.name, first, last):
            values = rows.values() if isinstance(rows, Int8Rows) else rows
            pieces.append(as_bytes(values, tensor.dtype))
        decoded = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return decoded[begin - first * row_bytes : end - first * row_bytes]

    def read_int8(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows:
        """Rows [begin, end) of a weight that is INT8 in the file."""
        found = [rows for rows in self._rows(tensor.name, begin, end) if isinstance(rows, Int8Rows)]
        packed = np.concatenate([rows.packed for rows in found])
        return Int8Rows(packed, np.concatenate([rows.scales for rows in found])).sound(tensor.name)

    def _rows(self, name: str, begin: int, end: int) -> Iterable[Int8Rows | NDArray[np.float32]]:
        """Leading rows [begin, end), in the pieces that the form is read in."""
        matrix = self._matrices[name]
        step = matrix.rows_at_once
        if not step:
            yield matrix.rows(self._read_stored, begin, end)
            return
        for start in range(begin // step * step, end, step):
            stop = min(start + step, matrix.info.shape[0])
            rows = self._held.get((name, start), lambda: self._piece(matrix, start, stop))  # noqa: B023
            part = slice(max(begin - start, 0), min(end, stop) - start)
            if isinstance(rows, Int8Rows):
                yield Int8Rows(rows.packed[part], rows.scales[part])
            else:
                yield rows[part]

    def _piece(self, matrix: Matrix, begin: int, end: int) -> Int8Rows | NDArray[np.float32]:
        return matrix.rows(self._read_stored, begin, end)

    def _log(self, form: Form) -> None:
        infos = [matrix.info for matrix in self._matrices.values()]
        kept = [info.name for info in infos if info.int8 is not None]
        decoded = [info for info in infos if info.int8 is None]
        if kept:
            log.info("%s: %s: %s kept bit for bit", self.name, form.name, some(kept))
        if decoded:
            names = some(info.name for info in decoded)
            log.warning(
                "%s: %s decoded from %s to %s", self.name, names, form.name, decoded[0].dtype
            )


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
