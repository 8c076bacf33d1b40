"""Numba backend for CPUs: compiled at run time, no build step, cached on disk.

Decode (a few tokens) reads the packed bytes once, in a loop that LLVM vectorizes. Prefill
dequantizes a block of rows at a time, small enough to stay in cache, and gives it to the vendor's
matrix product.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from halfweight.kernels import Backend
from halfweight.numerics import QuantizedTensor, dequantize, scales_float32

MAX_DIRECT_TOKENS = 8
"""Larger batches go through dequantized blocks and the vendor's matrix product."""
BLOCK_WEIGHTS = 1 << 18


def _compiled(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True, fastmath=True)(function)


@_compiled
def _gemv(x: Any, packed: Any, scales: Any, y: Any) -> None:
    num_tokens, in_features = x.shape
    group_size = in_features // scales.shape[1]
    for n in range(packed.shape[0]):
        for m in range(num_tokens):
            total = np.float32(0)
            for g in range(scales.shape[1]):
                part = np.float32(0)
                for k in range(g * group_size, (g + 1) * group_size):
                    part += x[m, k] * np.float32(np.int32(packed[n, k]) - 128)
                total += part * scales[n, g]
            y[m, n] = total


def linear(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [..., K] times the dequantized weights [N, K], in x's dtype, float32 accumulation."""
    rows = x.reshape(-1, x.shape[-1]).float()
    y = torch.empty(rows.shape[0], packed.shape[0])
    if rows.shape[0] <= MAX_DIRECT_TOKENS:
        row_scales = scales_float32(scales, exponents).expand(packed.shape[0], -1)
        _gemv(rows.numpy(), packed.numpy(), row_scales.numpy(), y.numpy())
    else:
        _product_by_blocks(rows, QuantizedTensor(packed, scales, exponents), y)
    if bias is not None:
        y += bias
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.shape[0])


def _product_by_blocks(x: Tensor, weight: QuantizedTensor, y: Tensor) -> None:
    out_features, in_features = weight.shape
    step = max(16, BLOCK_WEIGHTS // in_features)
    for n in range(0, out_features, step):
        block = dequantize(_rows(weight, slice(n, n + step)))
        torch.mm(x, block.T, out=y[:, n : n + step])


def _rows(weight: QuantizedTensor, rows: slice | Tensor) -> QuantizedTensor:
    one_scale = weight.scales.shape[0] == 1
    return QuantizedTensor(
        weight.packed[rows],
        weight.scales if one_scale else weight.scales[rows],
        None if weight.exponents is None else weight.exponents[rows],
    )


def embedding(
    ids: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Dequantized rows `ids` [...] as [..., K] in `dtype`."""
    if ids.numel() == 0:
        return torch.empty(*ids.shape, packed.shape[1], dtype=dtype)
    rows = _rows(QuantizedTensor(packed, scales, exponents), ids.reshape(-1))
    return dequantize(rows, dtype).reshape(*ids.shape, packed.shape[1])


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    return None if device.type == "cpu" else "needs the CPU"


BACKEND = Backend("cpu", unavailable, linear, embedding)
