"""Which scales lie on grid8's grid: codes 1..255 times one power of two a row. No torch needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_EXPONENT, MAX_EXPONENT = -120, 119
"""Range of grid8's row exponent: scales and their reciprocals stay normal float32 numbers."""


def grid8_from_bits(bits: Any, xp: Any) -> tuple[Any, Any, Any]:
    """Codes, exponents and whether they are exact, of bfloat16 as int16; xp is numpy or torch.

    The 8 significant bits of each scale, shifted to the largest exponent of its row.
    """
    top = xp.amax(bits, axis=-1, keepdims=True) >> 7
    shifts = (top - (bits >> 7)).clip(max=8)
    significands = (bits & 0x7F) | 0x80
    codes = significands >> shifts
    exponents = top[..., 0] - (127 + 7)
    in_range = (exponents >= MIN_EXPONENT) & (exponents <= MAX_EXPONENT)
    on_grid = ((codes << shifts) == significands).all() & in_range.all()
    return xp.asarray(codes, dtype=xp.uint8), xp.asarray(exponents, dtype=xp.int8), on_grid


def lies_on_grid8(scales: NDArray[np.float32]) -> bool:
    """Whether scales [N, K/G] are held as grid8 once they are in memory."""
    bits = np.ascontiguousarray(scales).view(np.uint32)
    if (bits & 0xFFFF).any():
        return False
    return bool(grid8_from_bits((bits >> 16).astype(np.uint16).view(np.int16), np)[2])
