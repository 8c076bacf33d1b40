"""Plain torch on any device: dequantize, then multiply. Slow, right, and what the others equal."""

from __future__ import annotations

import torch
from torch import Tensor

from halfweight.kernels.operations import Backend
from halfweight.quantization.numerics import QuantizedTensor, dequantize


def linear(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Float32 product of x [..., K] with the dequantized weights, rounded once to x's dtype."""
    weight = dequantize(QuantizedTensor(packed, scales, exponents))
    y = x.float() @ weight.T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def embedding(
    ids: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Dequantized rows `ids`."""
    rows = ids.reshape(-1)
    row_exponents = None if exponents is None else exponents[rows]
    table = dequantize(QuantizedTensor(packed[rows], scales[rows], row_exponents), dtype)
    return table.reshape(*ids.shape, packed.shape[1])


BACKEND = Backend("reference", lambda device: None, linear, embedding)
