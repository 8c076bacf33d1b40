"""The definition of halfweight's arithmetic, in plain torch. All else is tested against this file.

Symmetric INT8. Groups of G consecutive weights along K share a scale s; a weight w is stored as
q = rint(w / s) clipped to [-127, 127], and read back as q * s. The scale is rounded to its storage
format FIRST, and the weights are rounded against the stored scale, so what is lost when a scale is
rounded is not lost twice.

`grid8` holds a scale in one byte: scale = code * 2^e with an integer code 1..255 a group and one
exponent e (int8) a row, chosen so that the row's largest absmax scale has a code in 128..255. Such
a scale has at most 8 significant bits, so it is exactly a bfloat16: a file that holds it as
bfloat16 loses nothing, and memory holds one byte.

`least_squares` tries a few storable scales around absmax / 127 and keeps the one with the smallest
squared error (ties: the first tried, nearest to absmax). To make that choice reproducible to the
bit in other implementations, sums run in a fixed order: SUM_LANES float32 lanes, lane j summing
the squares of elements j, j + LANES, ... in order, then the lanes folded in halves.

Rounding uses the float32 reciprocal of the scale: |w - q s| <= s/2 * (1 + 2^-15) unless clipped.

Refused: asymmetric zero points (language-model weights are centred; a zero point costs a byte and
an add in every inner loop), and a value of -128 (its mirror does not exist).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfweight.errors import CheckpointError
from halfweight.quantization.grid8 import MAX_EXPONENT, MIN_EXPONENT, grid8_from_bits
from halfweight.quantization.scheme import Scheme

QMAX = 127
OFFSET = 128
"""Added to q to make the stored byte: packed = q + 128 in 1..255."""
SUM_LANES = 16
MAX_ORDERED_GROUP = 256
"""Longer groups (a row, a tensor: for comparison only) are summed in float64 in torch's order."""
MIN_SCALE = 2.0**-120
CODE_OFFSETS = (0, -1, 1, -2, 2, -3, 3)
"""grid8 codes tried around the absmax code (the smallest that clips nothing), nearest first."""
SCALE_FACTORS = tuple(1 + k / 256 for k in CODE_OFFSETS)
"""Multiples of the absmax scale tried for float scale formats."""
FLOAT_FORMATS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [N, K] in one byte a weight.

    packed: uint8 [N, K], q + 128, the file's own bytes. scales: [N, K/G] (or [N, 1], [1, 1]),
    uint8 codes of grid8 or a float dtype. exponents: int8 [N] for grid8, else None.
    """

    packed: Tensor
    scales: Tensor
    exponents: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.packed.shape[0], self.packed.shape[1]

    @property
    def group_size(self) -> int:
        """Weights along K that share a scale."""
        return self.packed.shape[1] // self.scales.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes resident: data, scales, exponents."""
        parts = (self.packed, self.scales, self.exponents)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def quantize(weight: Tensor, scheme: Scheme, *, name: str = "weight") -> QuantizedTensor:
    """Quantize a weight [N, K] of any float dtype by `scheme`.

    Raises CheckpointError naming `name`, the first index and the count if any weight is NaN or
    infinite, and UsageError if the group size does not divide K.
    """
    check_finite(weight, name)
    out_features, in_features = weight.shape[0], weight.shape[1]
    scales_shape = scheme.scales_shape((out_features, in_features))
    groups = weight.float().reshape(*scales_shape, -1)
    if scheme.scale_format == "grid8":
        codes, exponents, q = _quantize_grid8(groups, scheme.scale_choice == "least_squares")
        scales: Tensor = codes
        stored: Tensor | None = exponents
    else:
        scales, q = _quantize_float(groups, scheme)
        stored = None
    packed = (q + OFFSET).to(torch.uint8).reshape(out_features, in_features)
    return QuantizedTensor(packed, scales, stored)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [N, K] that `tensor` stands for: exact in float32, then rounded to `dtype`."""
    q = tensor.packed.to(torch.float32) - OFFSET
    groups = q.reshape(*tensor.scales.shape, -1)
    weights = groups * scales_float32(tensor.scales, tensor.exponents).unsqueeze(-1)
    return weights.reshape(tensor.packed.shape).to(dtype)


def scales_float32(scales: Tensor, exponents: Tensor | None) -> Tensor:
    """Scales as float32 [N, K/G], exactly: codes * 2^exponents for grid8."""
    if exponents is None:
        return scales.float()
    return torch.ldexp(scales.float(), exponents.to(torch.int32).unsqueeze(-1))


def grid8_from_scales(scales: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes uint8 [N, K/G] and exponents int8 [N] that equal float scales [N, K/G] exactly.

    None where any row's scales do not lie on a grid8 grid (or are not positive and finite).
    """
    values = scales.detach().to(torch.bfloat16)
    bits = values.view(torch.int16)
    if bits.device.type == "cpu":  # in one thread: steps so short would wait for torch's threads
        codes, exponents, on_grid = grid8_from_bits(bits.numpy(), np)
    else:
        codes, exponents, on_grid = grid8_from_bits(bits, torch)
    if not bool(on_grid) or not (values.dtype == scales.dtype or bool((values == scales).all())):
        return None
    return torch.as_tensor(codes), torch.as_tensor(exponents)


def check_finite(weight: Tensor, name: str) -> None:
    """Raise CheckpointError naming tensor, first index and count if NaN or Inf is present."""
    finite = torch.isfinite(weight)
    if bool(finite.all()):
        return
    bad = torch.nonzero(~finite)
    index, count = bad[0].tolist(), bad.shape[0]
    value = float(weight[tuple(index)])
    raise CheckpointError(
        f"tensor {name}: {count} of {weight.numel()} weights not finite, first {value} at {index}",
        hint="repair the source checkpoint; a NaN or Inf weight has no INT8 value",
    )


def _quantize_grid8(groups: Tensor, least_squares: bool) -> tuple[Tensor, Tensor, Tensor]:
    """codes uint8 [N, K/G], exponents int8 [N], q float32 like groups [N, K/G, G]."""
    absmax_scale = groups.abs().amax(dim=-1) / QMAX
    exponents = _row_exponents(absmax_scale.amax(dim=-1))
    step = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)[:, None]
    start = (absmax_scale / step).ceil().clamp(1, 255)
    offsets = CODE_OFFSETS if least_squares else (0,)
    candidates = ((start + offset).clamp(1, 255) for offset in offsets)
    codes, q = _best(groups, ((code, code * step) for code in candidates))
    return codes.to(torch.uint8), exponents.to(torch.int8), q


def _row_exponents(largest_scale: Tensor) -> Tensor:
    """int32 [N]: e with largest_scale / 2^e in [128, 256), clamped; 0 for an all-zero row."""
    _, high = torch.frexp(largest_scale)
    exponents = (high.to(torch.int32) - 8).clamp(MIN_EXPONENT, MAX_EXPONENT)
    return torch.where(largest_scale > 0, exponents, torch.zeros_like(exponents))


def _quantize_float(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """scales [N, K/G] in the scheme's float dtype, q float32 like groups."""
    dtype = FLOAT_FORMATS[scheme.scale_format]
    smallest = max(MIN_SCALE, torch.finfo(dtype).smallest_normal)
    absmax_scale = groups.abs().amax(dim=-1) / QMAX
    zero = absmax_scale == 0
    factors = SCALE_FACTORS if scheme.scale_choice == "least_squares" else (1.0,)

    def stored(factor: float) -> Tensor:
        scale = (absmax_scale * factor).clamp(smallest, torch.finfo(dtype).max)
        return torch.where(zero, torch.ones_like(scale), scale).to(dtype)

    return _best(groups, ((s, s.float()) for s in map(stored, factors)))


def _best(groups: Tensor, candidates: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The candidate (stored, float32 scale) of least squared error a group, and its q."""
    best_error = best_stored = best_q = None
    for stored, scale in candidates:
        inverse = 1.0 / scale
        q = (groups * inverse.unsqueeze(-1)).round().clamp(-QMAX, QMAX)
        error = _squared_error(groups, q, scale)
        if best_error is None or best_stored is None or best_q is None:
            best_error, best_stored, best_q = error, stored, q
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_stored = torch.where(better, stored, best_stored)
        best_q = torch.where(better.unsqueeze(-1), q, best_q)
    assert best_stored is not None
    assert best_q is not None
    return best_stored, best_q


def _squared_error(groups: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Sum over a group of (w - q s)^2 in float32, in the fixed order of this file's essay."""
    error = groups - q * scale.unsqueeze(-1)
    squares = error * error
    if squares.shape[-1] > MAX_ORDERED_GROUP:
        return squares.sum(dim=-1, dtype=torch.float64)
    lanes = min(SUM_LANES, squares.shape[-1] & -squares.shape[-1])
    by_lane = squares.reshape(*squares.shape[:-1], -1, lanes)
    total: Tensor = by_lane[..., 0, :]
    for i in range(1, by_lane.shape[-2]):
        total = total + by_lane[..., i, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total.squeeze(-1)
