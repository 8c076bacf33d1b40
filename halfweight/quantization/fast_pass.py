"""`numerics.quantize` as one pass over memory, for converting whole checkpoints. Same bits.

The torch definition makes a few dozen float32 copies of a weight. Here a row is decoded from the
file's own bytes (F32, F16, BF16) into a buffer that stays in cache, every candidate scale of a
group is tried there, and one byte a weight leaves. Order of operations is the definition's, float32
throughout, without contraction or reordering, so packed bytes and scales are equal to the bit:
tests compare them over dtypes, group sizes, formats, zeros and denormals. Groups longer than
MAX_ORDERED_GROUP (one scale a row) have no fixed order and go to the definition itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from halfweight.quantization.fast_pass_vectors import CANDIDATES, LANES, squared_errors, store_group
from halfweight.quantization.float_bytes import as_float32
from halfweight.quantization.grid8 import MAX_EXPONENT, MIN_EXPONENT
from halfweight.quantization.scheme import Scheme

QMAX = np.float32(127)
CODE_OFFSETS = np.array([0, -1, 1, -2, 2, -3, 3], dtype=np.float32)
SCALE_FACTORS = 1 + CODE_OFFSETS / np.float32(256)
MAX_ORDERED_GROUP = 256
F16_REBIAS = np.float32(2.0**112)
ONE = np.float32(1)
NORM = CANDIDATES - 1
"""The place of a scale of 0, whose squared error is the weights' own sum of squares."""

SMALLEST_SCALE = {"float32": 2.0**-120, "bfloat16": 2.0**-120, "float16": 2.0**-14, "grid8": 0}
LARGEST_SCALE = {"float32": 2.0**128 - 2.0**104, "bfloat16": 2.0**128 - 2.0**120}
LARGEST_SCALE |= {"float16": 65504.0, "grid8": 0}
DROPPED_BITS = {"float32": 0, "bfloat16": 16, "float16": 13, "grid8": 0}
"""Mantissa bits that a float32 scale loses in each format."""

RowStatistics = np.dtype(
    [("squared_error", "f8"), ("squared_norm", "f8"), ("crushed_groups", "i8"), ("bad", "i8")]
)
"""Of one row: sums over its weights; groups in which most non-zero weights read back as zero;
the number of NaN and infinite weights."""


@dataclass(frozen=True)
class QuantizedRows:
    """packed uint8 [R, K]; scales float32 [R, K/G], exact; statistics RowStatistics [R]."""

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    statistics: NDArray[Any]


def quantize_rows(
    raw: NDArray[np.uint8], dtype: str, scheme: Scheme, columns: int
) -> QuantizedRows:
    """Quantize whole rows of `columns` weights, given as the bytes of safetensors' `dtype`.

    Bit-identical to `numerics.quantize`. Rows with NaN or Inf are counted in `statistics.bad` and
    their output means nothing: the caller raises.
    """
    bits = _bits(raw, dtype).reshape(-1, columns)
    _, num_groups = scheme.scales_shape((len(bits), columns))
    if columns // num_groups > MAX_ORDERED_GROUP or columns // num_groups % LANES:
        return _by_definition(as_float32(raw, dtype).reshape(-1, columns), scheme)
    packed = np.empty(bits.shape, np.uint8)
    scales = np.empty((len(bits), num_groups), np.float32)
    statistics = np.zeros(len(bits), RowStatistics)
    name = scheme.scale_format
    _quantize_rows(
        bits,
        dtype == "F16",
        name == "grid8",
        DROPPED_BITS[name],
        np.float32(SMALLEST_SCALE[name]),
        np.float32(LARGEST_SCALE[name]),
        len(CODE_OFFSETS) if scheme.scale_choice == "least_squares" else 1,
        packed,
        scales,
        statistics,
    )
    return QuantizedRows(packed, scales, statistics)


def _bits(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """uint16 for F16 and BF16, uint32 of float32 for F32 and F64."""
    if dtype == "F64":
        with np.errstate(over="ignore"):
            return raw.view(np.float64).astype(np.float32).view(np.uint32)
    return raw.view(np.uint32 if dtype == "F32" else np.uint16)


def _by_definition(weights: NDArray[np.float32], scheme: Scheme) -> QuantizedRows:
    import torch

    from halfweight.quantization.numerics import dequantize, quantize, scales_float32

    statistics = np.zeros(len(weights), RowStatistics)
    finite = np.isfinite(weights)
    statistics["bad"] = (~finite).sum(axis=1)
    tensor = quantize(torch.from_numpy(np.where(finite, weights, 0)), scheme)
    error = dequantize(tensor).numpy() - weights
    lost = (tensor.packed.numpy() == 128) & (weights != 0)
    groups = (*tensor.scales.shape, -1)
    num_lost, num_nonzero = (x.reshape(groups).sum(axis=-1) for x in (lost, weights != 0))
    statistics["squared_error"] = np.square(error, dtype=np.float64).sum(axis=1)
    statistics["squared_norm"] = np.square(weights, dtype=np.float64).sum(axis=1)
    statistics["crushed_groups"] = (2 * num_lost > num_nonzero).sum(axis=1)
    scales = scales_float32(tensor.scales, tensor.exponents).numpy()
    return QuantizedRows(tensor.packed.numpy(), scales, statistics)


def _compiled(function: Any) -> Any:
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


@_compiled
def _decode(bits: Any, is_float16: bool, out: Any) -> int:
    """Write a row as float32 to `out`; returns the number of NaN and infinite values."""
    bad = 0
    wide = out.view(np.uint32)
    if is_float16:
        for k in range(bits.size):
            half = np.uint32(bits[k])
            sign = (half & np.uint32(0x8000)) << np.uint32(16)
            wide[k] = sign | ((half & np.uint32(0x7FFF)) << np.uint32(13))
            out[k] *= F16_REBIAS
            bad += (half & np.uint32(0x7C00)) == np.uint32(0x7C00)
        return bad
    shift = np.uint32(32 - 8 * bits.itemsize)
    for k in range(bits.size):
        wide[k] = np.uint32(bits[k]) << shift
        bad += (wide[k] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return bad


@_compiled
def _round_bits(value: Any, dropped: int) -> Any:
    """A positive normal float32 rounded half to even, `dropped` bits shorter."""
    if dropped == 0:
        return value
    cell = np.empty(1, np.float32)
    cell[0] = value
    bits = cell.view(np.uint32)
    low = np.uint32(dropped)
    odd = (bits[0] >> low) & np.uint32(1)
    bits[0] += (np.uint32(1) << (low - np.uint32(1))) - np.uint32(1) + odd
    bits[0] = (bits[0] >> low) << low
    return cell[0]


@_compiled
def _absmax(bits: Any) -> Any:
    """The largest |w| of a group, found among the bits as integers: vectors, unlike float max."""
    most = np.uint32(0)
    for k in range(bits.size):
        most = max(most, bits[k] & np.uint32(0x7FFFFFFF))
    return most


@_compiled
def _is_crushed(group: Any, num_zeros: int) -> bool:
    """Whether more than half of the non-zero weights became one of the `num_zeros` zeros."""
    if 2 * num_zeros <= group.size:
        return False
    num_nonzero = 0
    for k in range(group.size):
        num_nonzero += group[k] != 0
    num_lost = num_zeros - (group.size - num_nonzero)
    return bool(2 * num_lost > num_nonzero)


@_compiled
def _quantize_rows(
    weights: Any,
    is_float16: bool,
    grid: bool,
    dropped: int,
    smallest: Any,
    largest: Any,
    num_candidates: int,
    packed: Any,
    scales: Any,
    statistics: Any,
) -> None:
    num_rows, columns = weights.shape
    num_groups = scales.shape[1]
    group_size = columns // num_groups
    row = np.empty(columns, np.float32)
    absmax = np.empty(num_groups, np.float32)
    row_bits, most = row.view(np.uint32), absmax.view(np.uint32)
    tried, inverses = np.zeros(CANDIDATES, np.float32), np.zeros(CANDIDATES, np.float32)
    errors = np.empty(CANDIDATES, np.float32)
    for r in range(num_rows):
        statistics[r].bad = _decode(weights[r], is_float16, row)
        highest = np.float32(0)
        for g in range(num_groups):
            most[g] = _absmax(row_bits[g * group_size : (g + 1) * group_size])
            absmax[g] /= QMAX
            highest = max(highest, absmax[g])
        step = ONE
        if grid and highest > 0:
            exponent = min(max(math.frexp(highest)[1] - 8, MIN_EXPONENT), MAX_EXPONENT)
            step = np.float32(math.ldexp(1.0, exponent))
        for g in range(num_groups):
            group = row[g * group_size : (g + 1) * group_size]
            start = min(max(np.ceil(absmax[g] / step), ONE), np.float32(255))
            for c in range(num_candidates):
                if grid:
                    tried[c] = min(max(start + CODE_OFFSETS[c], ONE), np.float32(255)) * step
                elif absmax[g] == 0:
                    tried[c] = ONE
                else:
                    scale = min(max(absmax[g] * SCALE_FACTORS[c], smallest), largest)
                    tried[c] = _round_bits(scale, dropped)
                inverses[c] = ONE / tried[c]
            squared_errors(group, inverses, tried, errors)
            best = 0
            for c in range(1, num_candidates):
                if errors[c] < errors[best]:
                    best = c
            best_scale = tried[best]
            scales[r, g] = best_scale
            stored = packed[r, g * group_size : (g + 1) * group_size]
            num_zeros = store_group(group, inverses[best], stored)
            statistics[r].crushed_groups += _is_crushed(group, num_zeros)
            statistics[r].squared_error += errors[best]
            statistics[r].squared_norm += errors[NORM]
