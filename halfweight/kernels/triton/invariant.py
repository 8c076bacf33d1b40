"""Triton with one fixed tile and one fixed split of K: a row's bits do not depend on its batch.

For tests, comparisons and caches that need the same answer alone and in a batch. Chosen by name
only; slower than the `triton` backend where that would have taken another tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfweight.errors import UsageError
from halfweight.kernels.operations import Backend
from halfweight.kernels.triton import backend as triton
from halfweight.kernels.triton.tables import Config

TOKENS, ROWS = 64, 64
PROGRAMS = 264
"""K is split until about this many programs share a product; fixed, so that GPUs agree."""
MAX_SPLIT = 8


def config_for(tokens: int, shape: tuple[int, int]) -> Config:
    """The configuration of a weight [N, K], whatever the number of tokens."""
    split = max(1, min(MAX_SPLIT, PROGRAMS // -(-shape[0] // ROWS)))
    return Config("matmul", tokens=TOKENS, rows=ROWS, split=split, warps=4, stages=3)


def linear(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Like `triton.linear`, bit for bit the same for a row in any batch.

    Raises UsageError for groups that only the vendor's product takes.
    """
    if not triton.takes_groups(Config("matmul"), packed, scales):
        raise UsageError(
            f"backend 'triton-invariant' needs groups of a multiple of 16, found group size "
            f"{packed.shape[1] // scales.shape[1]}",
            hint="choose backend 'triton'",
        )
    return triton.product(x, packed, scales, exponents, bias, config_for)


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    return triton.unavailable(device)


BACKEND = Backend("triton-invariant", unavailable, linear, triton.embedding, is_invariant=True)
