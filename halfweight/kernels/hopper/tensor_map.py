"""Tensor maps: how bulk copies see a matrix in memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from halfweight.kernels.cuda import driver

KINDS = {torch.int8: "uint8", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""Activations as a tensor map names them."""

Shape = tuple[int, ...]


@lru_cache(maxsize=16384)
def tensor_map(pointer: int, kind: str, sizes: Shape, strides: Shape, box: Shape) -> Any:
    """Tensor map of bytes or 16-bit values, read in boxes 128 or 64 bytes wide.

    `sizes` and `box` count elements, innermost first; `strides` are bytes, from the second on.
    """
    from cuda.bindings import driver as cuda

    types = cuda.CUtensorMapDataType
    dtype, size = {
        "uint8": (types.CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
        "float16": (types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2),
        "bfloat16": (types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
    }[kind]
    swizzles = cuda.CUtensorMapSwizzle
    wide = box[0] * size == 128
    return driver.check(
        cuda.cuTensorMapEncodeTiled(
            dtype,
            len(sizes),
            pointer,
            [cuda.cuuint64_t(n) for n in sizes],
            [cuda.cuuint64_t(n) for n in strides],
            [cuda.cuuint32_t(n) for n in box],
            [cuda.cuuint32_t(1)] * len(sizes),
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if wide else swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "tensor map",
    )
