"""Attention over pages for any layer: window or blocks, softcap, grouped heads, K and V widths.

What the torch form in `engine/runners/paged_attention.py` defines, without its copies: a program
takes a block of queries of one sequence with all query heads of one key head as the rows of its
products, and walks the pages that they see. For decoding, a program has one query, and a sequence
is cut into `splits` parts of equal length, so that few sequences still fill the GPU; each part
gives its result and the logarithm of its softmax's sum, by which they are weighed together, sinks
included. All shapes follow from the page table's, so a CUDA graph can hold a launch.

The pages are [pages, PAGE, heads, D], in 16 or 32 bits, or int8 with a scale a token and head.
Tokens beyond the last query are never read: pages may hold anything there, NaN included.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _states(pages, scales, place, head, column, seen, HEADS, WIDTH, INT8: tl.constexpr, dtype):
    """[N, D] keys or values of a key head at places [N] of the pool."""
    row = place * HEADS + head
    mask = seen[:, None] & (column < WIDTH)[None, :]
    x = tl.load(pages + row[:, None] * WIDTH + column[None, :], mask=mask, other=0)
    if INT8:
        x = x.to(tl.float32) * tl.load(scales + row, mask=seen, other=0).to(tl.float32)[:, None]
    return x.to(dtype)


@triton.jit
def _attend(
    out,
    sums,
    q,
    keys,
    values,
    key_scales,
    value_scales,
    page_table,
    positions,
    num_queries,
    table_width,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    SPAN_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INT8: tl.constexpr,
    DECODES: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    V_D: tl.constexpr,
):
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    rows = tl.arange(0, QUERIES * GROUP_ROWS)
    query, member = block * QUERIES + rows // GROUP_ROWS, rows % GROUP_ROWS
    real = (query < num_queries) & (member < GROUP)
    column, v_column, step = tl.arange(0, D), tl.arange(0, V_D), tl.arange(0, N)
    at_row = (query * HEADS + head) * GROUP + member
    q_mask = real[:, None] & (column < WIDTH)[None, :]
    q_tile = tl.load(q + at_row[:, None] * WIDTH + column[None, :], mask=q_mask, other=0)
    position = tl.load(positions + query, mask=query < num_queries, other=-1)
    if SPAN == "window":
        first = position - (SPAN_SIZE - 1)
    elif SPAN == "block":
        first = position - position % SPAN_SIZE
    else:
        first = position * 0
    begin = tl.maximum(tl.min(tl.where(position >= 0, first, 1 << 40)), 0)
    end = tl.max(position) + 1
    part = tl.cdiv(end - begin, num_splits * N) * N
    begin += split * part
    end = tl.minimum(end, begin + part)
    table = page_table + (block * table_width if DECODES else 0)

    top = tl.full([QUERIES * GROUP_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * GROUP_ROWS], tl.float32)
    found = tl.zeros([QUERIES * GROUP_ROWS, V_D], tl.float32)
    for start in range(begin, end, N):
        token = start + step
        inside = token < end
        page = tl.load(table + token // PAGE, mask=inside, other=0)
        place = page * PAGE + token % PAGE
        k = _states(keys, key_scales, place, head, column, inside, HEADS, WIDTH, INT8, q_tile.dtype)
        score = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        seen = (token[None, :] <= position[:, None]) & (token[None, :] >= first[:, None])
        score = tl.where(seen & inside[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp(score - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(weight, axis=1)
        v = _states(
            values, value_scales, place, head, v_column, inside, HEADS, V_WIDTH, INT8, q_tile.dtype
        )
        found = found * shrink[:, None]
        found += tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = new_top
    total = tl.where(total == 0, 1.0, total)
    found = found / total[:, None]
    at_row += split * num_queries * HEADS * GROUP
    mask = real[:, None] & (v_column < V_WIDTH)[None, :]
    tl.store(out + at_row[:, None] * V_WIDTH + v_column[None, :], found, mask=mask)
    tl.store(sums + at_row, top + tl.log(total), mask=real)


def attend_span(
    q: Tensor,
    tensors: list[Tensor],
    page_table: Tensor,
    positions: Tensor,
    *,
    span: tuple[str, int],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    decodes: bool,
) -> Tensor:
    """Attention of queries q [T, H, D] at `positions` [T]; [T, H, Dv].

    `tensors` are pages of keys and values, then their scales if int8. With `decodes` query i is
    that of the sequence in row i of `page_table` [T, P]; else all are of the one sequence whose
    pages [P] it is.
    """
    keys, values, *scales = tensors
    num_queries, num_heads, width = q.shape
    _, page_tokens, num_groups, v_width = values.shape
    group = num_heads // num_groups
    widest = triton.next_power_of_2(max(16, width, v_width))
    group_rows = triton.next_power_of_2(group)
    num_rows = 16 if decodes or widest > 256 else 64
    queries = 1 if decodes else max(1, num_rows // group_rows)
    group_rows = max(group_rows, 16 // queries)
    tokens = 16 if widest > 256 else 32 if widest > 128 or q.dtype == torch.float32 else 64
    num_blocks = num_queries if decodes else triton.cdiv(num_queries, queries)
    splits = _splits(num_blocks * num_groups, page_table.shape[-1] * page_tokens) if decodes else 1
    out = q.new_empty(splits, num_queries, num_heads, v_width, dtype=torch.float32)
    sums = q.new_empty(splits, num_queries, num_heads, 1, dtype=torch.float32)
    _attend[(num_blocks, num_groups, splits)](
        *(out, sums, q.contiguous(), keys, values, *(scales or (keys, values))),
        *(page_table, positions, num_queries, page_table.shape[-1], scale, softcap or 1.0),
        HEADS=num_groups,
        GROUP=group,
        WIDTH=width,
        V_WIDTH=v_width,
        SPAN=span[0],
        SPAN_SIZE=span[1],
        SOFTCAP=softcap is not None,
        INT8=bool(scales),
        DECODES=decodes,
        PAGE=page_tokens,
        QUERIES=queries,
        GROUP_ROWS=group_rows,
        N=tokens,
        D=triton.next_power_of_2(max(16, width)),
        V_D=triton.next_power_of_2(max(16, v_width)),
    )
    return _merge(out, sums, sinks).to(q.dtype)


def _splits(num_programs: int, most_tokens: int) -> int:
    """Parts of a sequence: enough programs for a large GPU, none of fewer than 256 tokens."""
    return max(1, min(512 // num_programs, most_tokens // 256))


def _merge(out: Tensor, sums: Tensor, sinks: Tensor | None) -> Tensor:
    """The results of the parts [S, T, H, Dv], weighed by exp(sums) [S, T, H, 1] beside sinks."""
    if sinks is not None:
        sink = sinks.float().view(1, 1, -1, 1).expand(1, *sums.shape[1:])
        sums = torch.cat([sums, sink])
    elif len(out) == 1:
        return out[0]
    weights = sums.softmax(dim=0)[: len(out)]
    return (out * weights).sum(dim=0)
