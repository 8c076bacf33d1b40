"""Numbers of every float dtype of safetensors, to their bytes. numpy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def as_bytes(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    """Values as bytes of F32, F16 or BF16, rounded half to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
        quiet_nan = (bits >> 16) | 0x40
        halves = np.where(np.isnan(values), quiet_nan, rounded >> 16)
        return halves.astype(np.uint16).reshape(-1).view(np.uint8)
    with np.errstate(over="ignore"):
        numbers = values.astype({"F16": np.float16, "F32": np.float32}[dtype])
    return numbers.reshape(-1).view(np.uint8)
