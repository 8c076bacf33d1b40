"""Device code that adds the parts of queries whose work was cut (paged.py), in their order.

By a kernel of its own, a program a head; or, a launch less, by the program of attention that is the
last to leave a part of its key head, which pays where many sequences are added at once.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

ROW_FIELDS: tl.constexpr = tl.constexpr(3)
"""Of a token that is merged: its first part, how many there are, its place among the queries."""


@triton.jit
def added(
    parts, stats, first, count, kv_head, row,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention [R, HEAD_SIZE] of the rows `row` [R] of `count` parts, BLOCK parts at a time.

    What other programs of the same launch wrote is in the L2 cache: L1 is left out.
    """
    d = tl.arange(0, HEAD_SIZE)
    top = tl.full(row.shape, float("-inf"), tl.float32)
    total = tl.zeros(row.shape, tl.float32)
    acc = tl.zeros((row.shape[0], HEAD_SIZE), tl.float32)
    for begin in range(0, count, BLOCK):
        part = begin + tl.arange(0, BLOCK)[:, None]
        at = ((first + part) * KV_HEADS + kv_head) * ROWS + row[None, :]
        inside = part < count
        tops = tl.load(stats + at * 2, mask=inside, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + at * 2 + 1, mask=inside, other=0, cache_modifier=".cg")
        place = at[:, :, None] * HEAD_SIZE + d[None, None, :]
        sums = tl.load(parts + place, mask=inside[:, :, None], other=0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(tops, axis=0))
        factor = tl.exp2(tops - higher[None, :])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(totals * factor, axis=0)
        acc = acc * shrink[:, None] + tl.sum(sums * factor[:, :, None], axis=0)
        top = higher
    return acc / total[:, None]


@triton.jit
def merge_if_last(
    parts, stats, arrived, first, count, out, kv_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [HEADS, HEAD_SIZE] of the query heads of a key head, by the last of the `count` programs
    that leave a part of the one query.

    `arrived`, int32, counts these programs, and is zero again after the last: the next launch
    counts anew. What the threads of a program stored comes before its count, what the last program
    loads after it.
    """
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == count - 1:
        tl.store(arrived, 0)
        row = tl.arange(0, triton.next_power_of_2(GROUP))
        found = added(
            *(parts, stats, first, count, kv_head, tl.minimum(row, GROUP - 1)),
            *(KV_HEADS, HEAD_SIZE, ROWS, BLOCK),
        )
        head = kv_head * GROUP + row
        d = tl.arange(0, HEAD_SIZE)[None, :]
        tl.store(out + head[:, None] * HEAD_SIZE + d, found, mask=(row < GROUP)[:, None])


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
    row = tl.zeros((1,), tl.int32) + query * GROUP + head % GROUP
    found = added(parts, stats, first, count, head // GROUP, row, KV_HEADS, HEAD_SIZE, ROWS, BLOCK)
    d = tl.arange(0, HEAD_SIZE)[None, :]
    tl.store(out + (token * HEADS + head) * HEAD_SIZE + d, found)
