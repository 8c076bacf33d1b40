"""INT8 weights that lie as ours do but for their sign bit: [N, K] bytes with scales of their own.

    bitsandbytes (LLM.int8)   weight, SCB float32 [N]: the scale is SCB / 127, rounded to float32
    torchao                   _weight_qdata, _weight_scale [N, K/G], _weight_zero_point of zeros
    compressed-tensors        weight, weight_scale [N, 1], [N, K/G] or one; int-quantized

The integers are kept bit for bit. What some of these files say of activations (scales to round them
by) is left: activations stay in 16 bits here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfweight.checkpoint.forms import ORIGINAL
from halfweight.checkpoint.scale_formats import FLOAT_NAMES
from halfweight.checkpoint.sources.matrices import (
    Int8Rows,
    Matrix,
    ReadBytes,
    misfit,
    whole,
)
from halfweight.errors import CheckpointError
from halfweight.quantization.float_bytes import as_float32
from halfweight.quantization.scheme import Scheme, TensorInfo, stored_group_size

SIGN = np.uint8(0x80)
LAYOUTS = (
    ("weight", "SCB", ("weight_format",)),
    ("_weight_qdata", "_weight_scale", ("_weight_zero_point",)),
    ("weight", "weight_scale", ("weight_zero_point",)),
)
"""Ends of the names of data, scales, and of what must be zero: zero points, or a row format."""
DATA_ENDS = tuple(f".{layout[0]}" for layout in LAYOUTS)
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
BITSANDBYTES_STEP = np.float32(1 / 127)


@dataclass(frozen=True)
class Int8Matrix:
    """One weight [N, K]: `data` I8, `scale`, `zeros` that must be zero, `left` that is not read."""

    module: str
    dtype: str
    data: TensorInfo
    scale: TensorInfo
    zeros: tuple[TensorInfo, ...]
    left: tuple[TensorInfo, ...]

    @property
    def info(self) -> TensorInfo:
        """weight [N, K], INT8 kept where whole words of it can be written."""
        rows, columns = self.data.shape
        scale_format = "float32" if self._is_bitsandbytes else FLOAT_NAMES[self.scale.dtype]
        size = stored_group_size(columns, self._num_groups)
        int8 = None if columns % 4 else Scheme(size, scale_format, "absmax")
        return TensorInfo(f"{self.module}.weight", self.dtype, (rows, columns), int8)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """All that the file has of it."""
        return (self.data, self.scale, *self.zeros, *self.left)

    @property
    def rows_at_once(self) -> int:
        """Any."""
        return 0

    def check(self, read: ReadBytes) -> None:
        """Raise CheckpointError for zero points, or rows in another order."""
        for part in self.zeros:
            if whole(read, part).any():
                raise CheckpointError(
                    f"tensor {part.name}: not all are 0, expected symmetric weights in plain rows",
                    hint=ORIGINAL,
                )

    def loses(self, read: ReadBytes) -> str:
        """Nothing: the product of an integer and its scale is rounded only where it is decoded."""
        return ""

    def rows(self, read: ReadBytes, begin: int, end: int) -> Int8Rows:
        """Rows [begin, end)."""
        columns = self.data.shape[1]
        data = read(self.data, begin * columns, end * columns).reshape(end - begin, columns)
        span = (0, self.scale.num_bytes)
        if self.scale.num_elements > 1:
            row_bytes = self.scale.num_bytes // self.data.shape[0]
            span = (begin * row_bytes, end * row_bytes)
        scales = as_float32(read(self.scale, *span), self.scale.dtype).reshape(-1, self._num_groups)
        if self._is_bitsandbytes:
            scales = scales * BITSANDBYTES_STEP
        shape = (end - begin, self._num_groups)
        return Int8Rows(data ^ SIGN, np.ascontiguousarray(np.broadcast_to(scales, shape)))

    @property
    def _is_bitsandbytes(self) -> bool:
        return self.scale.name.endswith(".SCB")

    @property
    def _num_groups(self) -> int:
        return self.scale.shape[1] if len(self.scale.shape) == 2 else 1


def matrices(
    tensors: Mapping[str, TensorInfo], dtype: str, declared: Mapping[str, Any]
) -> list[Matrix]:
    """Every weight in plain INT8. Raises CheckpointError for scales that do not fit."""
    return list(_matrices(tensors, dtype))


def _matrices(tensors: Mapping[str, TensorInfo], dtype: str) -> Iterator[Matrix]:
    for name, data in tensors.items():
        if data.dtype != "I8" or len(data.shape) != 2 or not name.endswith(DATA_ENDS):
            continue
        for end, scale_end, zero_ends in LAYOUTS:
            module = name.removesuffix(f".{end}")
            scale = tensors.get(f"{module}.{scale_end}")
            if module == name or scale is None:
                continue
            _check_scale(data, scale)
            zeros, left = (
                tuple(t for n in ends if (t := tensors.get(f"{module}.{n}")) is not None)
                for ends in (zero_ends, OF_ACTIVATIONS)
            )
            yield Int8Matrix(module, dtype, data, scale, zeros, left)
            break
        else:
            raise CheckpointError(
                f"tensor {name} is I8 and has no scales that are known", hint=ORIGINAL
            )


def _check_scale(data: TensorInfo, scale: TensorInfo) -> None:
    rows, columns = data.shape
    shape = scale.shape
    one = scale.num_elements == 1
    a_row = shape == (rows,)
    groups = len(shape) == 2 and shape[0] == rows and shape[1] > 0 and columns % shape[1] == 0
    if scale.dtype not in FLOAT_NAMES or not (one or a_row or groups):
        raise misfit(scale, f"floats [{rows}, K/G] beside {data.name} {list(data.shape)}")
