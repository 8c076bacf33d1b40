"""The gradient of y = x W^T + b to x: dx = dy W, with W frozen in INT8, on any device.

W is made floats a block of columns at a time, of whole groups: at most BLOCK_BYTES, or one group of
each row. Where dy is made float32 too, that goes by blocks of tokens. So the memory beside dy and
dx is bounded, however large the matrix and the batch. By columns each element of dx is one product
with its whole sum inside; blocks of rows of W would add up rounded parts.

The product is of dy's dtype on a device that has one of 16 bits, as QLoRA's is, and of float32 on a
CPU. Nothing of the forward pass is kept for it but the weight itself: a frozen linear stores no x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfweight.quantization.numerics import QuantizedTensor, dequantize

BLOCK_BYTES = 16 << 20
"""Of W in float32 while a block of it is made, and of dy in float32."""


def input_gradient(dy: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None) -> Tensor:
    """dy [..., N], packed [N, K] -> dx [..., K] in dy's dtype."""
    (out_features, in_features), num_groups = packed.shape, scales.shape[1]
    group_size = in_features // num_groups
    dtype = torch.float32 if dy.device.type == "cpu" else dy.dtype
    rows = dy.reshape(-1, out_features)
    dx = dy.new_empty(len(rows), in_features)
    tokens_at_once = max(1, len(rows) if dtype == dy.dtype else BLOCK_BYTES // (4 * out_features))
    groups_at_once = max(1, BLOCK_BYTES // (4 * out_features * group_size))
    for first in range(0, num_groups, groups_at_once):
        groups = slice(first, first + groups_at_once)
        columns = slice(group_size * groups.start, group_size * groups.stop)
        block = QuantizedTensor(packed[:, columns], scales[:, groups], exponents)
        weight = dequantize(block, dtype)
        for begin in range(0, len(rows), tokens_at_once):
            tokens = slice(begin, begin + tokens_at_once)
            dx[tokens, columns] = rows[tokens].to(dtype) @ weight
    return dx.reshape(*dy.shape[:-1], in_features)
