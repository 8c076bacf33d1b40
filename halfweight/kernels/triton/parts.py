"""Device code that adds the parts of queries whose work was cut (paged.py)."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

ROW_FIELDS: tl.constexpr = tl.constexpr(3)
"""Of a token that is merged: its first part, how many there are, its place among the queries."""


@triton.jit(do_not_specialize=["T"])
def merge_parts(
    T, parts, stats, row_parts, out,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [T, HEADS, HEAD_SIZE] of tokens that `attend_pages` left in parts, BLOCK at a time.

    row_parts int32 [T, ROW_FIELDS]; a token of fewer than two parts is left alone.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    first = tl.load(row_parts + token * ROW_FIELDS).to(tl.int64)
    count = tl.load(row_parts + token * ROW_FIELDS + 1)
    query = tl.load(row_parts + token * ROW_FIELDS + 2)
    if PDL:
        cuda.gdc_wait()
    if count < 2:
        return
    row = query * GROUP + head % GROUP
    d = tl.arange(0, HEAD_SIZE)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((HEAD_SIZE,), tl.float32)
    for begin in range(0, count, BLOCK):
        part = begin + tl.arange(0, BLOCK)
        inside = part < count
        at = ((first + part) * KV_HEADS + head // GROUP) * ROWS + row
        tops = tl.load(stats + at * 2, mask=inside, other=float("-inf"))
        totals = tl.load(stats + at * 2 + 1, mask=inside, other=0)
        sums = tl.load(parts + at[:, None] * HEAD_SIZE + d[None, :], mask=inside[:, None], other=0)
        higher = tl.maximum(top, tl.max(tops, axis=0))
        factor = tl.exp2(tops - higher)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(totals * factor, axis=0)
        acc = acc * shrink + tl.sum(sums * factor[:, None], axis=0)
        top = higher
    tl.store(out + (token * HEADS + head) * HEAD_SIZE + d, acc / total)
