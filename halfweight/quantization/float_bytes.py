"""Numbers of every float dtype of safetensors, from their bytes and to them. numpy alone.

What is small enough to be looked at before any work (scales, tables of eight-bit floats) goes
through here; weights by the million go through the compiled passes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

E8M0_BIAS = 127


def as_float32(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """The values that bytes of safetensors' `dtype` stand for, rounded to float32 from F64."""
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F64":
        with np.errstate(over="ignore"):
            return raw.view(np.float64).astype(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0"):
        return float8_values(dtype)[raw]
    return raw.view(np.float32)


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


@cache
def float8_values(dtype: str) -> NDArray[np.float32]:
    """The 256 values of F8_E4M3 (no infinity), F8_E5M2 or F8_E8M0 (a power of two)."""
    codes = np.arange(256)
    if dtype == "F8_E8M0":
        powers = np.ldexp(1.0, codes - E8M0_BIAS)
        return _read_only(np.where(codes == 255, np.nan, powers))
    mantissa_bits, bias = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}[dtype]
    exponents, mantissas = (codes & 0x7F) >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    leading = np.where(exponents > 0, 1 << mantissa_bits, 0)
    shifts = np.maximum(exponents, 1) - bias - mantissa_bits
    values = np.ldexp((leading + mantissas).astype(np.float32), shifts)
    if dtype == "F8_E4M3":
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        last = exponents == 31
        values[last] = np.where(mantissas[last] == 0, np.inf, np.nan)
    return _read_only(np.where(codes & 0x80, -values, values))


def significant_bits(values: NDArray[np.float32]) -> int:
    """The most significant bits that any of the values has; 0 where all are zero."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    mantissas = np.where(bits & 0x7F800000, bits & 0x7FFFFF | 0x800000, bits & 0x7FFFFF)
    found = mantissas[mantissas != 0]
    if not found.size:
        return 0
    lowest = found & -found.astype(np.int64)
    return int((np.log2(found.astype(np.float64)).astype(int) - np.log2(lowest) + 1).max())


def _read_only(values: NDArray[Any]) -> NDArray[np.float32]:
    table = values.astype(np.float32)
    table.flags.writeable = False
    return table
