"""Ways to hold a weight in about one byte: halfweight's own, and those of its peers.

Each is a function of a weight [N, K] that gives what the stored form stands for, in float32, and
the number of bytes it takes in memory. So accuracy can be compared with nothing but the numbers of
the weights being different.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfweight.quantization.fast_pass import quantize_rows
from halfweight.quantization.numerics import QuantizedTensor, dequantize
from halfweight.quantization.scheme import GroupSize, ScaleChoice, Scheme

Q8_0_BLOCK, Q8_0_BYTES = 32, 34


@dataclass(frozen=True)
class Stored:
    """The weights [N, K] that a stored form stands for, and the bytes that form takes."""

    weight: Tensor
    num_bytes: int


@dataclass(frozen=True)
class Variant:
    """One way to store a weight; `store` gives None for a shape it cannot take."""

    name: str
    scales: str
    choice: str
    store: Callable[[Tensor], Stored | None]


def ours(group_size: GroupSize, scale_format: str, choice: ScaleChoice) -> Variant:
    """A scheme of halfweight, with its fallback where the group does not divide K."""
    scheme = Scheme(group_size, scale_format, choice)

    def store(weight: Tensor) -> Stored | None:
        fitting = scheme.for_in_features(weight.shape[1])
        if fitting is None:
            return None
        raw = weight.cpu().contiguous().numpy().view(np.uint8).reshape(-1)
        rows = quantize_rows(raw, "F32", fitting, weight.shape[1])
        packed, scales = torch.from_numpy(rows.packed), torch.from_numpy(rows.scales)
        decoded = dequantize(QuantizedTensor(packed, scales, None)).to(weight.device)
        num_rows, num_columns = weight.shape
        return Stored(decoded, fitting.resident_bytes((num_rows, num_columns)).total)

    return Variant(f"{group_size}-{scale_format}-{choice}", scale_format, choice, store)


def _q8_0(weight: Tensor) -> Stored | None:
    """llama.cpp's Q8_0, by the gguf package: blocks of 32, float16 scale, absmax."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as decode
    from gguf.quants import quantize as encode

    if weight.shape[1] % Q8_0_BLOCK:
        return None
    blocks = encode(weight.cpu().numpy(), GGMLQuantizationType.Q8_0)
    decoded = torch.from_numpy(decode(blocks, GGMLQuantizationType.Q8_0))
    return Stored(decoded.to(weight.device), weight.numel() // Q8_0_BLOCK * Q8_0_BYTES)


def _row_127(weight: Tensor) -> Stored:
    """bitsandbytes' LLM.int8: a float32 absmax a row, steps of absmax / 127."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = torch.where(scale > 0, weight / scale, 0).round().clamp(-127, 127)
    return Stored(rounded * scale, weight.numel() + 4 * weight.shape[0])


def _row_127_5(weight: Tensor) -> Stored:
    """torchao's Int8WeightOnlyConfig a row: bfloat16 scale of absmax / 127.5, values from -128."""
    weight = weight.to(torch.bfloat16).float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127.5).to(torch.bfloat16).float()
    rounded = torch.where(scale > 0, weight / scale, 0).round().clamp(-128, 127)
    return Stored(rounded * scale, weight.numel() + 2 * weight.shape[0])


def _bfloat16(weight: Tensor) -> Stored:
    """No scales, 16 bits: what a checkpoint of a float32 model loses before any quantization."""
    return Stored(weight.to(torch.bfloat16).float(), 2 * weight.numel())


DEFAULT = "128-grid8-least_squares"
FLOAT32_SAME_GROUP = "128-float32-absmax"
SMALLEST_GROUP = "32-grid8-least_squares"
Q8_0 = "llama.cpp Q8_0"
TENSOR = "tensor-float32-absmax"
SIXTEEN_BITS = "bfloat16 weights"
CALIBRATED = "128-grid8-calibrated"
"""Not a function of one weight: made by `quantize --calibrate`."""

VARIANTS = {
    variant.name: variant
    for variant in (
        ours(128, "grid8", "least_squares"),
        Variant(Q8_0, "float16", "absmax", _q8_0),
        ours(32, "grid8", "least_squares"),
        ours(128, "float32", "absmax"),
        ours("tensor", "float32", "absmax"),
        Variant("bitsandbytes row", "float32", "absmax", _row_127),
        Variant("torchao row", "bfloat16", "absmax", _row_127_5),
        Variant(SIXTEEN_BITS, "none", "none", _bfloat16),
        ours("row", "grid8", "least_squares"),
        ours(256, "grid8", "least_squares"),
        ours(64, "grid8", "least_squares"),
        ours(128, "grid8", "absmax"),
        ours(128, "bfloat16", "absmax"),
        ours(128, "bfloat16", "least_squares"),
        ours(128, "float16", "least_squares"),
        ours(128, "float32", "least_squares"),
    )
}
"""In the order of measurement: what the claims rest on comes first."""
