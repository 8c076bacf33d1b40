"""MXFP4 experts of gpt-oss, decoded: exactly, for every value has two significant bits.

A stack of experts [E, H, M] lies as `NAME_blocks` U8 [E, M, H/32, 16] and `NAME_scales` U8
[E, M, H/32]: a byte holds two weights along H, the lower four bits first, and each 32 of them a
power of two. One expert is decoded at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.sources.matrices import Matrix, ReadBytes, misfit, part_of
from halfweight.quantization.float_bytes import float8_values
from halfweight.quantization.scheme import TensorInfo

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""E2M1, by its four bits."""
BLOCK_BYTES = 16


@dataclass(frozen=True)
class Mxfp4Experts:
    """A stack of experts as transformers has it."""

    dtype: str
    blocks: TensorInfo
    scales: TensorInfo

    @property
    def info(self) -> TensorInfo:
        """[E, H, M]."""
        experts, rows, groups, _ = self.blocks.shape
        shape = (experts, groups * 2 * BLOCK_BYTES, rows)
        return TensorInfo(self.blocks.name.removesuffix("_blocks"), self.dtype, shape)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Blocks and scales."""
        return (self.blocks, self.scales)

    @property
    def rows_at_once(self) -> int:
        """One expert."""
        return 1

    def check(self, read: ReadBytes) -> None:
        """Any bytes are values; a scale of 255 is a NaN, which the conversion finds."""

    def loses(self, read: ReadBytes) -> str:
        """Nothing."""
        return ""

    def rows(self, read: ReadBytes, begin: int, end: int) -> NDArray[np.float32]:
        """Experts [begin, end), each [H, M]."""
        size = prod(self.scales.shape[1:])
        scales = float8_values("F8_E8M0")[read(self.scales, begin * size, end * size)]
        size *= BLOCK_BYTES
        codes = read(self.blocks, begin * size, end * size).reshape(-1, BLOCK_BYTES)
        values = VALUES[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(len(codes), -1)
        values *= scales[:, None]
        by_expert = values.reshape(end - begin, self.blocks.shape[1], -1)
        return np.ascontiguousarray(by_expert.transpose(0, 2, 1))


def matrices(
    tensors: Mapping[str, TensorInfo], dtype: str, declared: Mapping[str, Any]
) -> list[Matrix]:
    """Every stack of experts in MXFP4. Raises CheckpointError for parts that do not fit."""
    return list(_matrices(tensors, dtype))


def _matrices(tensors: Mapping[str, TensorInfo], dtype: str) -> Iterator[Matrix]:
    for name, blocks in tensors.items():
        if not name.endswith("_blocks"):
            continue
        module, _, own = name.rpartition(".")
        scales = part_of(tensors, module, f"{own.removesuffix('_blocks')}_scales")
        form = (blocks.dtype, len(blocks.shape), blocks.shape[-1:])
        if form != ("U8", 4, (BLOCK_BYTES,)) or not blocks.num_elements:
            raise misfit(blocks, f"U8 [E, M, H/32, {BLOCK_BYTES}]")
        if (scales.dtype, scales.shape) != ("U8", blocks.shape[:-1]):
            raise misfit(scales, f"U8 {list(blocks.shape[:-1])}")
        yield Mxfp4Experts(dtype, blocks, scales)
