"""How GGUF lays out Q8_0: blocks of 32 weights of a row, each behind its scale.

A block is 34 bytes: a float16 scale, then 32 signed bytes q; a weight is q times the scale. So Q8_0
is symmetric INT8 in groups of 32 with float16 scales, and both ways keep every bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GROUP_SIZE = 32
BLOCK_BYTES = 2 + GROUP_SIZE
SIGN = np.uint8(0x80)


def unpack_q8_0(raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Rows of blocks, uint8 [R, K/32 * 34] -> packed uint8 [R, K], q + 128; scales [R, K/32]."""
    blocks = raw.reshape(raw.shape[0], -1, BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0]
    return (blocks[:, :, 2:] ^ SIGN).reshape(raw.shape[0], -1), scales


def pack_q8_0(packed: NDArray[np.uint8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """packed uint8 [R, K], q + 128, and float16 scales [R, K/32] -> uint8 [R, K/32 * 34]."""
    num_rows, num_groups = scales.shape
    blocks = np.empty((num_rows, num_groups, BLOCK_BYTES), np.uint8)
    blocks[:, :, :2] = np.ascontiguousarray(scales)[:, :, None].view(np.uint8)
    blocks[:, :, 2:] = packed.reshape(num_rows, num_groups, GROUP_SIZE) ^ SIGN
    return blocks.reshape(num_rows, -1)
