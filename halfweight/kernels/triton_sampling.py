"""Device code that chooses the next token: one program a row, whatever the row asks for.

A greedy row is read once. A drawn one is read twice more, to add its weights up and to walk to the
token. The floors of top_k and top_p are searched, not sorted for: a floor is the largest value such
that what lies at or above it has a count (or a weight) that is wanted. Floats in order are integers
in order, so WAYS pivots a pass cut the range of bit patterns by WAYS + 1 until one value of the
scores' own type is left: exact in 6 passes for float16, in 5 for bfloat16, in 10 for float32 with 8
ways, where a sort of 128,000 entries reads and writes them eight times and more.

Every sum is taken in one order, given by the row's length, so equal rows get equal tokens in any
batch.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GRAINS = {torch.float32: 1, torch.float16: 1 << 13, torch.bfloat16: 1 << 16}
"""Bit patterns of float32 from one number of a type to the next."""
BLOCK, WAYS, NUM_WARPS = 4096, 8, 16


def choose(scores: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """engine/choice.py's `choose` with `rows` on the device."""
    out = torch.empty(len(scores), 2, dtype=torch.int32, device=scores.device)
    _choose[(len(scores),)](
        scores, scores.stride(0), rows, table, table.stride(0), out, scores.shape[1],
        GRAIN=GRAINS[scores.dtype], BLOCK=BLOCK, WAYS=WAYS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _choose(
    scores, scores_stride, rows, table, table_stride, out, V,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """Write out[r] = (token, equals the draft) and the token to the table."""
    r = tl.program_id(0).to(tl.int64)
    row = rows + r * 7
    scores += r * scores_stride
    top, token = _largest(scores, V, BLOCK)
    temperature = tl.load(row + 3).to(tl.float32, bitcast=True)
    if (temperature > 0) & (token >= 0):
        rate = 1.4426950408889634 / temperature
        floor = _floor(scores, V, row, top, rate, GRAIN, BLOCK, WAYS)
        uniform = tl.load(row + 6).to(tl.float32, bitcast=True)
        token = _draw(scores, V, top, rate, floor, uniform, BLOCK)
    place = table + tl.load(row).to(tl.int64) * table_stride + tl.load(row + 1) + 1
    tl.store(out + r * 2, token)
    tl.store(out + r * 2 + 1, (tl.load(place) == token).to(tl.int32))
    tl.store(place, tl.maximum(token, 0))


@triton.jit
def _largest(scores, V, BLOCK: tl.constexpr):
    """The largest score and its first id, or -1 if there is a NaN or no finite largest."""
    offsets = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, V, BLOCK):
        x = _load(scores, begin + offsets, V)
        bad |= (x != x).to(tl.int32)
        larger = x > best
        best = tl.where(larger, x, best)
        at = tl.where(larger, begin + offsets, at)
    top = tl.max(best)
    token = tl.min(tl.where(best == top, at, V))
    fails = (tl.max(bad) > 0) | (tl.abs(top) == float("inf"))
    return top, tl.where(fails, -1, token)


@triton.jit
def _floor(
    scores, V, row, top, rate,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """The least score that top_k, then top_p, then min_p keep."""
    top_k = tl.load(row + 2)
    top_p = tl.load(row + 4).to(tl.float32, bitcast=True)
    min_p = tl.load(row + 5).to(tl.float32, bitcast=True)
    floor = tl.full([], float("-inf"), tl.float32)
    if (top_k > 0) & (top_k < V):
        floor = _search(scores, V, top, 0.0, floor, top_k.to(tl.float32), GRAIN, BLOCK, WAYS)
    if top_p < 1:
        total = _total(scores, V, top, rate, floor, BLOCK)
        wanted = tl.maximum(total * top_p, 1e-30)
        floor = _search(scores, V, top, rate, floor, wanted, GRAIN, BLOCK, WAYS)
    if min_p > 0:
        floor = tl.maximum(floor, top + tl.log2(min_p) / rate)
    return floor


@triton.jit
def _search(
    scores, V, top, rate, floor, wanted,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """The largest value >= floor such that what is at or above it weighs `wanted`.

    A score weighs 2^((score - top) rate): with rate 0 each weighs 1 and they are counted.
    """
    low = _order(floor).to(tl.int64)
    high = _order(top).to(tl.int64)
    ways = tl.arange(0, WAYS)
    while high - low >= GRAIN:
        step = (high - low) // (WAYS + 1) + 1
        pivots = _number((low + (ways + 1) * step).to(tl.int32))
        sums = _sums(scores, V, top, rate, pivots, BLOCK, WAYS)
        low += tl.sum((sums >= wanted).to(tl.int64)) * step
        high = tl.minimum(high, low + step - 1)
    return _number(low.to(tl.int32))


@triton.jit
def _sums(scores, V, top, rate, pivots, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    """The weight [WAYS] of what is at or above each pivot."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK, WAYS], tl.float32)
    for begin in range(0, V, BLOCK):
        x = _load(scores, begin + offsets, V)
        weight = tl.exp2((x - top) * rate)
        sums += tl.where(x[:, None] >= pivots[None, :], weight[:, None], 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _total(scores, V, top, rate, floor, BLOCK: tl.constexpr):
    """The weight of what is at or above the floor."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        sums += _weights(_load(scores, begin + offsets, V), top, rate, floor)
    return tl.sum(sums)


@triton.jit
def _draw(scores, V, top, rate, floor, uniform, BLOCK: tl.constexpr):
    """The first token at which the sum of weights exceeds `uniform` of the whole."""
    offsets = tl.arange(0, BLOCK)
    target = _total(scores, V, top, rate, floor, BLOCK) * uniform
    begin = 0
    before = 0.0
    token = V
    last = 0
    while (begin < V) & (token == V):
        weight = _weights(_load(scores, begin + offsets, V), top, rate, floor)
        sums = before + tl.cumsum(weight)
        token = tl.min(tl.where((sums > target) & (weight > 0), begin + offsets, V))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, begin + offsets, 0)))
        before += tl.sum(weight)
        begin += BLOCK
    return tl.where(token == V, last, token)  # rounding may leave the sum just short of target


@triton.jit
def _weights(x, top, rate, floor):
    return tl.where(x >= floor, tl.exp2((x - top) * rate), 0.0)


@triton.jit
def _load(scores, at, V):
    return tl.load(scores + at, mask=at < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _order(x):
    """An integer for a float32, in the same order."""
    bits = tl.cast(x, tl.float32).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(order):
    """The float32 that has this `_order`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
