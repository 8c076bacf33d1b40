"""Device code that chooses the next token of each row, whatever the row asks for, in one launch.

A greedy row is read once. A drawn one is read twice more, to add its weights up and to walk to the
token. The floors of top_k and top_p are searched, not sorted for: a floor is the largest value such
that what lies at or above it has a count (or a weight) that is wanted. Floats in order are integers
in order, so WAYS pivots a pass cut the range of bit patterns by WAYS + 1 until one value of the
scores' own type is left: exact, in at most 8 passes for float16 and 14 for float32.

Where there are fewer rows than multiprocessors, a row is read by several programs (its parts) that
exchange their sums through memory and wait for each other: all of them run at the same time, since
there are no more than multiprocessors. Weights are rounded to multiples of 2^-36 of the largest, so
that float64 sums of them are exact in any order: a row gets the same token however many parts it
has, which depends on what runs beside it.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfweight.kernels.triton.launch import ALIGNMENT, device_info

GRAINS = {torch.float32: 1, torch.float16: 1 << 13, torch.bfloat16: 1 << 16}
"""Bit patterns of float32 from one number of a type to the next."""
MOST_PARTS = tl.constexpr(32)
OPTIONS = {"BLOCK": 4096, "WAYS": 4, "num_warps": 16}


class Chooser:
    """engine/choice.py's `choose` on one device, with `rows` there too."""

    def __init__(self, device: torch.device) -> None:
        self._most = max(1, device_info(device).num_processors) if device.type == "cuda" else 1
        size = 2 * MOST_PARTS.value * OPTIONS["WAYS"]
        self._exchange = torch.empty(self._most, size, dtype=torch.float64, device=device)
        self._arrived = torch.zeros(self._most, 2, dtype=torch.int32, device=device)
        self._compiled = {}

    def __call__(self, scores: Tensor, rows: Tensor, table: Tensor, out: Tensor) -> None:
        """Write out [R, 2]: token and whether it equals its draft."""
        num_rows, vocab_size = scores.shape
        parts = max(1, min(self._most // num_rows, MOST_PARTS.value))
        operands = scores, rows, table, out, self._exchange, self._arrived, parts
        numbers = vocab_size, scores.stride(0), table.stride(0), GRAINS[scores.dtype]
        key = numbers, scores.data_ptr() % ALIGNMENT
        grid = num_rows, parts, 1
        if key in self._compiled:
            constants = *numbers, OPTIONS["BLOCK"], OPTIONS["WAYS"]
            self._compiled[key][grid](*operands, *constants)
        else:
            compiled = _choose[grid](*operands, *numbers, **OPTIONS)
            if scores.is_cuda:
                self._compiled[key] = compiled


@triton.jit(do_not_specialize=["parts"])
def _choose(
    scores, rows, table, out, exchange, arrived, parts,
    V: tl.constexpr,
    SCORES_STRIDE: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """Write out[r] = (token, whether it equals the draft), and the token to the table."""
    r = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = rows + r * 7
    scores += r * SCORES_STRIDE
    width = tl.cdiv(tl.cdiv(V, parts), BLOCK) * BLOCK
    begin = part * width
    end = tl.minimum(begin + width, V)
    exchange += r * 2 * MOST_PARTS * WAYS
    arrived += r * 2

    top, token, turn = _largest(scores, begin, end, exchange, arrived, part, parts, V, BLOCK, WAYS)
    temperature = tl.load(row + 3).to(tl.float32, bitcast=True)
    mine = part == 0
    if (temperature > 0) & (token >= 0):
        rate = 1.4426950408889634 / temperature
        floor, turn = _floor(
            scores, begin, end, row, top, rate, exchange, arrived, part, parts, turn,
            V, GRAIN, BLOCK, WAYS,
        )  # fmt: skip
        weight = _total(scores, begin, end, top, rate, floor, BLOCK)
        before, total, turn = _place(weight, exchange, arrived, part, parts, turn, WAYS)
        target = tl.load(row + 6).to(tl.float32, bitcast=True).to(tl.float64) * total
        mine = (before <= target) & (target < before + weight)
        if mine:
            token = _walk(scores, begin, end, top, rate, floor, target - before, V, BLOCK)
    if mine:
        place = table + tl.load(row).to(tl.int64) * TABLE_STRIDE + tl.load(row + 1) + 1
        tl.store(out + r * 2, token)
        tl.store(out + r * 2 + 1, (tl.load(place) == token).to(tl.int32))
        tl.store(place, tl.maximum(token, 0))
    if parts > 1:
        _leave(arrived, parts)


@triton.jit
def _largest(
    scores, begin, end, exchange, arrived, part, parts,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """The largest score, its first id, or -1 if there is a NaN or no finite largest; a turn."""
    offsets = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        x = _load(scores, first + offsets, end)
        bad |= (x != x).to(tl.int32)
        larger = x > best
        best = tl.where(larger, x, best)
        at = tl.where(larger, first + offsets, at)
    top = tl.max(best)
    token = tl.min(tl.where(best == top, at, V))
    is_bad = tl.max(bad)
    turn = 0
    if parts > 1:
        column = tl.arange(0, WAYS)
        values = tl.where(column == 0, top, tl.where(column == 1, token, is_bad)).to(tl.float64)
        found, turn = _exchanged(values, exchange, arrived, part, parts, turn, WAYS)
        here = tl.arange(0, MOST_PARTS) < parts
        column = column[None, :]
        tops = tl.sum(tl.where(column == 0, found, 0.0), axis=1)
        tops = tl.where(here, tops, float("-inf"))
        tokens = tl.sum(tl.where(column == 1, found, 0.0), axis=1)
        top = tl.max(tops).to(tl.float32)
        token = tl.min(tl.where(tops == tl.max(tops), tokens, V * 1.0)).to(tl.int32)
        is_bad = tl.max(tl.max(tl.where(column == 2, found, 0.0), axis=1)).to(tl.int32)
    fails = (is_bad > 0) | (tl.abs(top) == float("inf"))
    return top, tl.where(fails, -1, token), turn


@triton.jit
def _floor(
    scores, begin, end, row, top, rate, exchange, arrived, part, parts, turn,
    V: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """The least score that top_k, then top_p, then min_p keep; the next turn."""
    top_k = tl.load(row + 2)
    top_p = tl.load(row + 4).to(tl.float32, bitcast=True)
    min_p = tl.load(row + 5).to(tl.float32, bitcast=True)
    floor = tl.full([], float("-inf"), tl.float32)
    if (top_k > 0) & (top_k < V):
        floor, turn = _search(
            scores, begin, end, top, rate, floor, top_k.to(tl.float64),
            exchange, arrived, part, parts, turn, GRAIN, BLOCK, WAYS, True,
        )  # fmt: skip
    if top_p < 1:
        weight = _total(scores, begin, end, top, rate, floor, BLOCK)
        _, total, turn = _place(weight, exchange, arrived, part, parts, turn, WAYS)
        # what is below this weighs less than (1 - top_p) of all, were it the whole vocabulary
        deepest = tl.log2(V / (tl.maximum(1 - top_p, 1e-7) * total.to(tl.float32))) + 1
        floor = tl.maximum(floor, top - deepest / rate)
        floor, turn = _search(
            scores, begin, end, top, rate, floor, tl.maximum(total * top_p, 1e-9),
            exchange, arrived, part, parts, turn, GRAIN, BLOCK, WAYS, False,
        )  # fmt: skip
    if min_p > 0:
        floor = tl.maximum(floor, top + tl.log2(min_p) / rate)
    return floor, turn


@triton.jit
def _search(
    scores, begin, end, top, rate, floor, wanted, exchange, arrived, part, parts, turn,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """The largest value >= floor such that what is at or above it weighs `wanted`; the next turn.

    A score weighs 2^((score - top) rate), or 1 if COUNTS.
    """
    low = _order(floor).to(tl.int64)
    high = _order(top).to(tl.int64)
    ways = tl.arange(0, WAYS)
    while high - low >= GRAIN:
        step = (high - low) // (WAYS + 1) + 1
        pivots = _number((low + (ways + 1) * step).to(tl.int32))
        if COUNTS:
            sums = _counts(scores, begin, end, pivots, BLOCK, WAYS)
        else:
            sums = _sums(scores, begin, end, top, rate, pivots, BLOCK, WAYS)
        if parts > 1:
            found, turn = _exchanged(sums, exchange, arrived, part, parts, turn, WAYS)
            sums = tl.sum(found, axis=0)
        low += tl.sum((sums >= wanted).to(tl.int64)) * step
        high = tl.minimum(high, low + step - 1)
    return _number(low.to(tl.int32)), turn


@triton.jit
def _sums(scores, begin, end, top, rate, pivots, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    """The weight [WAYS] of a part's scores at or above each pivot."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK, WAYS], tl.float64)
    for first in range(begin, end, BLOCK):
        x = _load(scores, first + offsets, end)
        weight = _rounded(tl.exp2((x - top) * rate))
        sums += tl.where(x[:, None] >= pivots[None, :], weight[:, None], 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _counts(scores, begin, end, pivots, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    """How many [WAYS] of a part's scores are at or above each pivot."""
    offsets = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK, WAYS], tl.int32)
    for first in range(begin, end, BLOCK):
        x = _load(scores, first + offsets, end)
        counts += (x[:, None] >= pivots[None, :]).to(tl.int32)
    return tl.sum(counts, axis=0).to(tl.float64)


@triton.jit
def _total(scores, begin, end, top, rate, floor, BLOCK: tl.constexpr):
    """The weight of a part's scores at or above the floor."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        sums += _weights(_load(scores, first + offsets, end), top, rate, floor)
    return tl.sum(sums)


@triton.jit
def _place(weight, exchange, arrived, part, parts, turn, WAYS: tl.constexpr):
    """The weight of the parts before this one, and of all; the next turn."""
    before = tl.zeros([], tl.float64)
    total = weight
    if parts > 1:
        column = tl.arange(0, WAYS)
        values = tl.where(column == 0, weight, 0.0)
        found, turn = _exchanged(values, exchange, arrived, part, parts, turn, WAYS)
        weights = tl.sum(found, axis=1)
        before = tl.sum(tl.where(tl.arange(0, MOST_PARTS) < part, weights, 0.0))
        total = tl.sum(weights)
    return before, total, turn


@triton.jit
def _walk(scores, begin, end, top, rate, floor, target, V, BLOCK: tl.constexpr):
    """The first id of a part at which the sum of weights exceeds the target."""
    offsets = tl.arange(0, BLOCK)
    token = V
    sums = tl.zeros([], tl.float64)
    while (begin < end) & (token == V):
        weight = _weights(_load(scores, begin + offsets, end), top, rate, floor)
        token = tl.min(tl.where(sums + tl.cumsum(weight) > target, begin + offsets, V))
        sums += tl.sum(weight)
        begin += BLOCK
    return token


@triton.jit
def _exchanged(values, exchange, arrived, part, parts, turn, WAYS: tl.constexpr):
    """What every part of the row gives at this turn [MOST_PARTS, WAYS]; the next turn.

    Two buffers are enough: nobody comes to a turn before all have read that of the last but one.
    """
    column = tl.arange(0, WAYS)
    exchange += turn % 2 * MOST_PARTS * WAYS
    tl.store(exchange + part * WAYS + column, values)
    turn += 1
    tl.debug_barrier()
    present = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
    while present < parts * turn:
        present = tl.atomic_add(arrived, 0, sem="acq_rel")
    tl.debug_barrier()
    index = tl.arange(0, MOST_PARTS)[:, None]
    at = exchange + index * WAYS + column[None, :]
    return tl.load(at, mask=index < parts, other=0.0, volatile=True), turn


@triton.jit
def _leave(arrived, parts):
    """The last part of a row leaves the counters as it found them."""
    if tl.atomic_add(arrived + 1, 1, sem="acq_rel") == parts - 1:
        tl.store(arrived, 0)
        tl.store(arrived + 1, 0)


@triton.jit
def _weights(x, top, rate, floor):
    return tl.where(x >= floor, _rounded(tl.exp2((x - top) * rate)), 0.0)


@triton.jit
def _rounded(weight):
    """float64 of a float32 weight <= 1, rounded to 2^-36: the unit of 1.5 * 2^16."""
    return (weight.to(tl.float64) + 98304.0) - 98304.0


@triton.jit
def _load(scores, at, end):
    return tl.load(scores + at, mask=at < end, other=float("-inf")).to(tl.float32)


@triton.jit
def _order(x):
    """An integer for a float32, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(order):
    """The float32 that has this `_order`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
