"""How GPTQ lays out an 8-bit linear: which bits of which word a weight is.

For a linear of weight [N, K] in groups of G:

    qweight  int32 [K/4, N]    byte i of word [k, n] is weight [n, 4 k + i], unsigned: q + 128
    scales   float16 [K/G, N]
    qzeros   int32 [K/G, N/4]  four zero points a word along N, each less 1 in format 1
    g_idx    int32 [K]         the group of each column; k // G where they are in order

Symmetric weights have the zero point 128 everywhere, so the unsigned bytes are ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ZERO_POINT = 128
STORED_ZERO_POINTS = {"gptq": ZERO_POINT - 1, "gptq_v2": ZERO_POINT}
"""`checkpoint_format` -> every byte of qzeros of symmetric weights."""
PARTS = ("qweight", "scales", "qzeros", "g_idx")


def unpack_qweight(qweight: NDArray[Any]) -> NDArray[np.uint8]:
    """int32 [K/4, N] -> uint8 [N, K], q + 128."""
    words = np.ascontiguousarray(qweight.T)
    return words.view(np.uint8).reshape(words.shape[0], -1)


def pack_qweight(packed: NDArray[np.uint8]) -> NDArray[np.int32]:
    """uint8 [N, K], q + 128 -> int32 [K/4, N]."""
    words = np.ascontiguousarray(packed).view(np.int32)
    return np.ascontiguousarray(words.T)


def symmetric_qzeros(num_groups: int, out_features: int, version: str = "gptq") -> NDArray[Any]:
    """int32 [K/G, N/4] of symmetric weights."""
    stored = np.full((num_groups, out_features), STORED_ZERO_POINTS[version], np.uint8)
    return stored.view(np.int32)


def ordered_g_idx(in_features: int, group_size: int) -> NDArray[np.int32]:
    """int32 [K]: groups of consecutive columns."""
    return np.arange(in_features, dtype=np.int32) // group_size
