"""GPTQ in 8 bits, symmetric, groups in order: our INT8 in another layout, kept bit for bit.

The layout itself is in gptq_packing.py. A word holds four weights along K, so a linear's words are
turned whole: one at a time, in twice its own bytes. Where K is no multiple of the group size the
last group is shorter, and groups of the largest size that divides both repeat its scales.

Refused: groups out of order (act-order), whose scales our kernels have no place for, and zero
points other than 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.forms import ORIGINAL
from halfweight.checkpoint.scale_formats import FLOAT_NAMES
from halfweight.checkpoint.sources.gptq_packing import STORED_ZERO_POINTS, unpack_qweight
from halfweight.checkpoint.sources.matrices import (
    Int8Rows,
    Matrix,
    ReadBytes,
    misfit,
    part_of,
    whole,
)
from halfweight.errors import CheckpointError
from halfweight.quantization.float_bytes import as_float32
from halfweight.quantization.scheme import Scheme, TensorInfo, stored_group_size


@dataclass(frozen=True)
class GptqMatrix:
    """One linear, whose groups of `group_size` columns share a row of scales."""

    module: str
    dtype: str
    group_size: int
    stored_zero_point: int
    qweight: TensorInfo
    scales: TensorInfo
    qzeros: TensorInfo
    g_idx: TensorInfo | None

    @property
    def info(self) -> TensorInfo:
        """weight [N, K], INT8 kept."""
        rows, columns = self.qweight.shape[1], self.qweight.shape[0] * 4
        group_size = stored_group_size(columns, columns // self._own_group_size)
        scheme = Scheme(group_size, FLOAT_NAMES[self.scales.dtype], "absmax")
        return TensorInfo(f"{self.module}.weight", self.dtype, (rows, columns), scheme)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Words, scales, zero points, order."""
        always = (self.qweight, self.scales, self.qzeros)
        return always if self.g_idx is None else (*always, self.g_idx)

    @property
    def rows_at_once(self) -> int:
        """All: a row of ours is a column of words."""
        return self.qweight.shape[1]

    def check(self, read: ReadBytes) -> None:
        """Raise CheckpointError for groups out of order or zero points other than 128."""
        columns = np.arange(4 * self.qweight.shape[0])
        if self.g_idx is not None:
            order = whole(read, self.g_idx).view(np.int32)
            if not np.array_equal(order, columns // self.group_size):
                raise CheckpointError(
                    f"tensor {self.g_idx.name}: its groups are out of order (act-order), "
                    "expected groups of consecutive columns",
                    hint=ORIGINAL,
                )
        zero_points = whole(read, self.qzeros).reshape(self.qzeros.shape[0], -1)
        if (zero_points[:, : self.qweight.shape[1]] != self.stored_zero_point).any():
            raise CheckpointError(
                f"tensor {self.qzeros.name}: zero points are not all 128, expected symmetric ones",
                hint=ORIGINAL,
            )

    def rows(self, read: ReadBytes, begin: int, end: int) -> Int8Rows:
        """Rows [begin, end): the columns of words turned."""
        num_words, num_rows = self.qweight.shape
        words = whole(read, self.qweight).view(np.int32).reshape(num_words, num_rows)
        scales = as_float32(whole(read, self.scales), self.scales.dtype)
        turned = scales.reshape(self.scales.shape).T[begin:end]
        return Int8Rows(unpack_qweight(words[:, begin:end]), self._repeated(turned))

    @property
    def _own_group_size(self) -> int:
        return gcd(self.group_size, 4 * self.qweight.shape[0])

    def _repeated(self, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """[R, groups of the file] -> [R, K/G] of ours."""
        begins = np.arange(0, 4 * self.qweight.shape[0], self._own_group_size)
        return np.ascontiguousarray(scales[:, begins // self.group_size])


def matrices(
    tensors: Mapping[str, TensorInfo], dtype: str, declared: Mapping[str, Any]
) -> list[Matrix]:
    """Every linear in GPTQ. Raises CheckpointError for parts that do not fit each other."""
    return list(_matrices(tensors, dtype, declared))


def _matrices(
    tensors: Mapping[str, TensorInfo], dtype: str, declared: Mapping[str, Any]
) -> Iterator[Matrix]:
    version = declared.get("checkpoint_format")
    stored_zero_point = STORED_ZERO_POINTS["gptq_v2" if version == "gptq_v2" else "gptq"]
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        qweight, scales, qzeros = (
            part_of(tensors, module, part) for part in ("qweight", "scales", "qzeros")
        )
        g_idx = tensors.get(f"{module}.g_idx")
        _check_shapes(qweight, scales, qzeros, g_idx)
        group_size = _group_size(qweight, scales, declared)
        yield GptqMatrix(
            module, dtype, group_size, stored_zero_point, qweight, scales, qzeros, g_idx
        )


def _check_shapes(
    qweight: TensorInfo, scales: TensorInfo, qzeros: TensorInfo, g_idx: TensorInfo | None
) -> None:
    if qweight.dtype != "I32" or len(qweight.shape) != 2 or not all(qweight.shape):
        raise misfit(qweight, "I32 [K/4, N]")
    words, rows = qweight.shape
    if scales.dtype not in FLOAT_NAMES or scales.shape[1:] != (rows,) or not scales.shape[0]:
        raise misfit(scales, f"floats [K/G, {rows}]")
    if qzeros.dtype != "I32" or qzeros.shape != (scales.shape[0], -(-rows // 4)):
        raise misfit(qzeros, f"I32 [{scales.shape[0]}, {-(-rows // 4)}]")
    if g_idx is not None and (g_idx.dtype, g_idx.shape) != ("I32", (4 * words,)):
        raise misfit(g_idx, f"I32 [{4 * words}]")


def _group_size(qweight: TensorInfo, scales: TensorInfo, declared: Mapping[str, Any]) -> int:
    """As the config says where that is what the scales say, else by their number."""
    columns, num_groups = 4 * qweight.shape[0], scales.shape[0]
    size = declared.get("group_size")
    if isinstance(size, int) and size > 0 and -(-columns // size) == num_groups:
        return size
    if columns % num_groups:
        raise misfit(scales, f"a number of groups that divides {columns} columns")
    return columns // num_groups
