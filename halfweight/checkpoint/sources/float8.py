"""FP8 weights with a scale a tensor, a row or a block, decoded: value times scale.

A scale stands beside its weight as `weight_scale_inv` (DeepSeek, Qwen) or `weight_scale`
(compressed-tensors, fbgemm, ModelOpt), and multiplies in both. Scales to round activations by are
left. Whether 16 bits hold the products exactly follows from the scales' own bits, and is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.forms import ORIGINAL
from halfweight.checkpoint.sources.matrices import Matrix, ReadBytes, misfit, whole
from halfweight.errors import CheckpointError
from halfweight.quantization.float_bytes import as_float32, significant_bits
from halfweight.quantization.scheme import TensorInfo

SIGNIFICANT_BITS = {"F8_E4M3": 4, "F8_E5M2": 3, "BF16": 8, "F16": 11, "F32": 24}
SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")
SCALE_ENDS = ("_scale_inv", "_scale")
OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "output_scale")


@dataclass(frozen=True)
class Float8Matrix:
    """One weight of any shape; `blocks` are the elements of each axis that share a scale."""

    dtype: str
    data: TensorInfo
    scale: TensorInfo
    blocks: tuple[int, ...]
    left: tuple[TensorInfo, ...]

    @property
    def info(self) -> TensorInfo:
        """The weight, decoded."""
        return TensorInfo(self.data.name, self.dtype, self.data.shape)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Weight, scales, and what is not read."""
        return (self.data, self.scale, *self.left)

    @property
    def rows_at_once(self) -> int:
        """Any of a matrix; of a stack of them one at a time."""
        return 1 if len(self.data.shape) > 2 else 0

    def check(self, read: ReadBytes) -> None:
        """Raise CheckpointError for a scale that is not positive and finite."""
        scales = as_float32(whole(read, self.scale), self.scale.dtype)
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise CheckpointError(
                f"tensor {self.scale.name}: a scale is not positive and finite",
                hint="download the file again; if it stays so, quantize the 16-bit original",
            )

    def loses(self, read: ReadBytes) -> str:
        """How much of a weight its dtype cannot hold; nothing where the scales have few bits."""
        scales = as_float32(whole(read, self.scale), self.scale.dtype)
        bits = significant_bits(scales) + SIGNIFICANT_BITS[self.data.dtype]
        return _rounding(bits, self.dtype)

    def rows(self, read: ReadBytes, begin: int, end: int) -> NDArray[np.float32]:
        """Leading rows [begin, end)."""
        shape = (end - begin, *self.data.shape[1:])
        row_bytes = self.data.num_bytes // self.data.shape[0]
        data = read(self.data, begin * row_bytes, end * row_bytes)
        values = as_float32(data, self.data.dtype).reshape(shape)
        scales = as_float32(whole(read, self.scale), self.scale.dtype)
        grid = scales.reshape(
            [-(-n // b) for n, b in zip(self.data.shape, self.blocks, strict=True)]
        )
        spans = [(begin, end), *((0, n) for n in self.data.shape[1:])]
        places = [np.arange(*span) // b for span, b in zip(spans, self.blocks, strict=True)]
        found: NDArray[np.float32] = values * grid[np.ix_(*places)]
        return found


def matrices(
    tensors: Mapping[str, TensorInfo], dtype: str, declared: Mapping[str, Any]
) -> list[Matrix]:
    """Every weight in FP8. Raises CheckpointError for one without a scale that fits."""
    return list(_matrices(tensors, dtype, _declared_block(declared)))


def _matrices(
    tensors: Mapping[str, TensorInfo], dtype: str, block: tuple[int, ...]
) -> Iterator[Matrix]:
    for name, data in tensors.items():
        if data.dtype not in ("F8_E4M3", "F8_E5M2"):
            continue
        scale = next((tensors[name + e] for e in SCALE_ENDS if name + e in tensors), None)
        if scale is None or not data.num_elements:
            raise CheckpointError(
                f"tensor {name} is {data.dtype} without a scale, expected one beside it",
                hint=ORIGINAL,
            )
        module = name.removesuffix("weight")
        left = tuple(tensors[module + n] for n in OF_ACTIVATIONS if module + n in tensors)
        yield Float8Matrix(dtype, data, scale, _blocks(data, scale, block), left)


def _declared_block(declared: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows and columns that share a scale, where the config says so."""
    groups = declared.get("config_groups")
    weights = [
        group.get("weights")
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict)
    ]
    stated = [w.get("block_structure") for w in weights if isinstance(w, dict)]
    for found in (declared.get("weight_block_size"), *stated):
        if (
            isinstance(found, list)
            and len(found) == 2
            and all(type(n) is int and n > 0 for n in found)
        ):
            return tuple(found)
    return ()


def _blocks(data: TensorInfo, scale: TensorInfo, block: tuple[int, ...]) -> tuple[int, ...]:
    """The elements of each axis of `data` that share a scale."""
    shape, grid = data.shape, scale.shape
    if scale.num_elements == 1:
        grid = (1,) * len(shape)
    grid = (*grid, *(1,) * (len(shape) - len(grid)))
    stated = (*(1,) * (len(shape) - 2), *block) if block else (0,) * len(shape)
    sizes = tuple(map(_block, shape, grid, stated))
    if scale.dtype not in SCALE_DTYPES or len(grid) != len(shape) or 0 in sizes:
        raise misfit(scale, f"a scale for each block of {data.name} {list(shape)}")
    return sizes


def _block(length: int, num_scales: int, stated: int) -> int:
    """Elements of an axis that share a scale: 1, all, as stated, or equal parts; 0: none fits."""
    if num_scales in (1, length):
        return length // num_scales
    if stated:
        return stated if -(-length // stated) == num_scales else 0
    return length // num_scales if num_scales and length % num_scales == 0 else 0


def _rounding(bits: int, dtype: str) -> str:
    """What is lost of numbers of so many significant bits."""
    held = SIGNIFICANT_BITS[dtype]
    return "" if bits <= held else f"up to {2.0**-held:.2%} of a weight"
