"""Device code of attention over pages (pages.py says how they lie).

Attention is a list of work, int32 [items, FIELDS], which the host writes for each step:

    0  row of the first query in the step's tokens      4, 5  pages to read: begin, end
    1  queries, 0 for an item without work                 6  part that the item writes, -1 when it
    2  position of the first query                            writes the result itself
    3  where the sequence's pages begin in page_table

A program takes one item and one key head, with the query heads of that key head and the queries of
the item as the rows of its products. Long sequences are several items, so a recorded CUDA graph has
a fixed grid and yet balanced work: the host cuts to measure, and items that are left over end at
once. Parts are added by parts.py, always in the same order.

Bytes become numbers without conversion instructions, which a GPU has few units for (they were the
limit of an earlier INT8 kernel), and without single bytes crossing threads: a tile is loaded as
pairs of bytes, which move to the tensor cores' layout as 16-bit numbers do, and there the even and
the odd columns are taken out of them (`from_pair`): two products of half the width. Steps multiply
scores and chances, which are few, not keys and values. The largest score is looked for after adding
the logarithm of the value's step: so what is rounded to 16 bits is about 1 where it counts most,
however small the steps, and keeps its precision.

What lies in a page beyond a sequence's tokens may be anything, NaN included.
"""

# mypy: ignore-errors
# ruff: noqa: SIM108, SIM300
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from halfweight.kernels.triton.pages import angles, ask_for_page, rotated_heads, store_new_token
from halfweight.kernels.triton.parts import ROW_FIELDS, merge_if_last

FIELDS: tl.constexpr = tl.constexpr(7)
"""Numbers of a work item."""
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def from_pair(pair, ODD: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The low byte, or the high one, of int16 pairs of bytes q + 128, as q in DTYPE."""
    BYTE: tl.constexpr = "shr.u32 w, $1, 8;" if ODD else "mov.b32 w, $1;"
    if ASM and DTYPE == tl.float16:
        # 0x64uu is 1024 + u. (A byte permute takes two constants, and ptxas moves one of them to a
        # register again for each.)
        q = tl.inline_asm_elementwise(
            "{.reg .b32 w, m; mov.b32 m, 0x64806480;" + BYTE + "lop3.b32 w, w, 0x00ff00ff,"
            " 0x64006400, 0xea; sub.f16x2 $0, w, m;}",
            "=r,r",
            [pair],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    elif ASM and DTYPE == tl.bfloat16:
        # 0x43uu is 128 + u for u < 128: from that 128 is taken if bit 7 is set, else 256.
        q = tl.inline_asm_elementwise(
            "{.reg .b32 w, a, c, m; mov.b32 m, 0xbf80bf80;" + BYTE + "lop3.b32 a, w, 0x007f007f,"
            " 0x43004300, 0xea; lop3.b32 c, w, 0x00800080, 0x43804380, 0x6a;"
            "fma.rn.bf16x2 $0, c, m, a;}",
            "=r,r",
            [pair],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        q = (((pair.to(tl.int32) >> (8 if ODD else 0)) & 255) - 128).to(DTYPE)
    return q


@triton.jit
def rough_log2(value):
    """log2 of positive float32, 0 to 0.09 too small: the bits read as an integer."""
    return value.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920929e-07 - 127


@triton.jit
def steps_of_page(steps, place, PAGE: tl.constexpr, DTYPE: tl.constexpr):
    """Steps of the keys and of the values [PAGE] in float32; a word of both is loaded at once."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    WORD: tl.constexpr = tl.int32 if BITS == 16 else tl.int64
    PART: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    words = steps.to(tl.pointer_type(WORD), bitcast=True)
    word = tl.load(words + place + tl.arange(0, PAGE))
    k_step = word.to(PART).to(DTYPE, bitcast=True).to(tl.float32)
    return k_step, (word >> BITS).to(PART).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def scores_of_page(
    q, q_odd, keys, place, k_step, scale,
    HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """q keys^T [ROWS, PAGE], for INT8 of the even and the odd columns of q and times `scale`."""
    token = tl.arange(0, PAGE)[:, None]
    if INT8:
        at = place * (HEAD_SIZE // 2) + token * (HEAD_SIZE // 2)
        pair = tl.trans(tl.load(keys + at + tl.arange(0, HEAD_SIZE // 2)[None, :]))
        score = tl.dot(q, from_pair(pair, False, q.dtype, ASM), input_precision="ieee")
        score += tl.dot(q_odd, from_pair(pair, True, q.dtype, ASM), input_precision="ieee")
        score *= (k_step.to(tl.float32) * scale)[None, :]
    else:
        at = place * HEAD_SIZE + token * HEAD_SIZE + tl.arange(0, HEAD_SIZE)[None, :]
        score = tl.dot(q, tl.trans(tl.load(keys + at)), input_precision="ieee")
    return score


@triton.jit
def add_values(
    acc, acc_odd, chance, values, place, known, DTYPE: tl.constexpr,
    HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr, MASKED: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """acc += chance [ROWS, PAGE] times the values of a page; INT8 has odd columns apart."""
    token = tl.arange(0, PAGE)[:, None]
    if INT8:
        at = place * (HEAD_SIZE // 2) + token * (HEAD_SIZE // 2)
        pair = tl.load(values + at + tl.arange(0, HEAD_SIZE // 2)[None, :])
        acc += tl.dot(chance, from_pair(pair, False, DTYPE, ASM), input_precision="ieee")
        acc_odd += tl.dot(chance, from_pair(pair, True, DTYPE, ASM), input_precision="ieee")
    else:
        at = place * HEAD_SIZE + token * HEAD_SIZE + tl.arange(0, HEAD_SIZE)[None, :]
        if MASKED:
            v = tl.load(values + at, mask=known[:, None], other=0)
        else:
            v = tl.load(values + at)
        acc += tl.dot(chance, v, input_precision="ieee")
    return acc, acc_odd


@triton.jit
def add_pages(
    top, total, acc, acc_odd, q, q_odd, keys, values, steps, table,
    begin, end, limit, most, kv_head, scale,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr,
    MASKED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add the tokens of pages begin to end to running softmax sums.

    A row sees tokens before its `limit` [ROWS], of which `most` is the largest; unmasked, all.
    `total` is [ROWS], or [ROWS, PAGE], to be added up at the end: rows that lie in several warps
    are slow to add. Scores times `unit` are powers of two.
    """
    UNSUMMED: tl.constexpr = len(total.shape) == 2
    unit = 1.0 if INT8 else scale
    in_page = tl.arange(0, PAGE)
    page = tl.load(table + begin, mask=begin < end, other=0)
    for index in range(begin, end):
        place = (page.to(tl.int64) * KV_HEADS + kv_head) * PAGE
        page = tl.load(table + index + 1, mask=index + 1 < end, other=0)
        token = index * PAGE + in_page
        known = token < most
        k_step = tl.full((PAGE,), 1, tl.float32)
        v_step = k_step
        if INT8:
            k_step, v_step = steps_of_page(steps, place, PAGE, q.dtype)
            if MASKED:
                v_step = tl.where(known, v_step, 1)
        score = scores_of_page(q, q_odd, keys, place, k_step, scale, HEAD_SIZE, PAGE, INT8, ASM)
        if MASKED:
            score = tl.where(token[None, :] < limit[:, None], score, float("-inf"))
        if INT8:
            highest = tl.max(score + rough_log2(v_step)[None, :], axis=1)
        else:
            highest = tl.max(score, axis=1)
        higher = tl.maximum(top, highest)
        base = higher
        if MASKED:
            base = tl.where(higher == float("-inf"), 0, higher)
        chance = tl.exp2(score * unit - (base * unit)[:, None])
        shrink = tl.exp2((top - base) * unit)
        if UNSUMMED:
            total = total * shrink[:, None] + chance
        else:
            total = total * shrink + tl.sum(chance, axis=1)
        if INT8:
            chance *= v_step[None, :]
            acc_odd *= shrink[:, None]
        acc, acc_odd = add_values(
            *(acc * shrink[:, None], acc_odd, chance.to(q.dtype), values, place, known, q.dtype),
            *(HEAD_SIZE, PAGE, INT8, MASKED, ASM),
        )
        top = higher
    return top, total, acc, acc_odd


@triton.jit
def halves(rows, INT8: tl.constexpr):
    """Even and odd columns of rows [R, D]: two [R, D / 2]; without INT8 the rows, twice."""
    even = rows
    odd = rows
    if INT8:
        even, odd = tl.split(rows.reshape(rows.shape[0], rows.shape[1] // 2, 2))
    return even, odd


@triton.jit
def store_rows(to, place, rows, real):
    """Rows [R, D] at rows `place` [R] of a matrix, those that are real."""
    d = tl.arange(0, rows.shape[1])[None, :]
    tl.store(to + place[:, None] * rows.shape[1] + d, rows, mask=real[:, None])


@triton.jit(do_not_specialize=["B"])
def attend_pages(
    B, qkv, q_norm, k_norm, keys, values, steps, cos_table, sin_table, page_table, work,
    out, parts, stats, row_parts, arrived, scaling, epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    IS_NEW: tl.constexpr,
    IS_LONG: tl.constexpr,
    MERGED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    INT8: tl.constexpr,
    SMALLEST: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Causal attention of an item of `work` for one key head; ROWS pads its queries times heads.

    IS_NEW: the only query is a token that is not in its page yet, and qkv [T, (HEADS + 2 KV_HEADS)
    HEAD_SIZE] is what the projection gives; the program of the first pages norms and rotates the
    key, writes it to its page and adds it. Else the queries are rotated, qkv [T, HEADS, HEAD_SIZE],
    and their keys and values in pages. IS_LONG: most pages are seen by all queries of an item.

    Results go to out [T, HEADS, HEAD_SIZE], or to float32 parts [part, KV_HEADS, ROWS, HEAD_SIZE]
    and stats [part, KV_HEADS, ROWS, 2] (maximum as a power of two, sum). With MERGED > 0, of new
    tokens alone, the last program of a token adds its parts, so many at a time (parts.py);
    `arrived` int32 [T, KV_HEADS] is zero before and after.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(1)
    item = work + tl.program_id(0) * FIELDS
    first = tl.load(item).to(tl.int64)
    queries = tl.load(item + 1)
    if queries == 0:
        return
    position = tl.load(item + 2)
    table = page_table + tl.load(item + 3)
    begin = tl.load(item + 4)
    end = tl.load(item + 5)
    part = tl.load(item + 6).to(tl.int64)
    d = tl.arange(0, HEAD_SIZE)
    row = tl.arange(0, ROWS)
    query = tl.minimum(row // GROUP, queries - 1)
    head = kv_head * GROUP + row % GROUP
    scale = scaling * LOG2_E
    unit = 1.0 if INT8 else scale

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    acc = tl.zeros((ROWS, HEAD_SIZE), tl.float32)
    if IS_LONG:
        total = tl.zeros((ROWS,), tl.float32)
    else:
        total = tl.zeros((ROWS, PAGE), tl.float32)
    if IS_NEW:
        one = tl.zeros((1, 1), tl.int32)
        cos, sin = angles(cos_table, sin_table, one + position, HEAD_SIZE)
        page = tl.load(table + position // PAGE).to(tl.int64)
        if PDL:
            ahead = tl.load(table + begin).to(tl.int64) * KV_HEADS + kv_head
            ask_for_page(keys, values, steps, ahead * PAGE, HEAD_SIZE, PAGE, INT8)
            cuda.gdc_wait()
        mine = qkv + first * (HEADS + 2 * KV_HEADS) * HEAD_SIZE
        q = rotated_heads(
            mine, head[:, None] * HEAD_SIZE, q_norm, cos, sin, epsilon, HEAD_SIZE, HAS_NORM
        )
        if begin == 0:
            k, v = store_new_token(
                *(mine, (one + HEADS + kv_head) * HEAD_SIZE, k_norm, keys, values, steps),
                *((page * KV_HEADS + kv_head) * PAGE + position % PAGE + one, cos, sin, epsilon),
                *(KV_HEADS, HEAD_SIZE, HAS_NORM, INT8, SMALLEST),
            )
            top = tl.sum(q.to(tl.float32) * k, axis=1) * (scale if INT8 else 1.0)
            total += tl.where(tl.arange(0, PAGE) == 0, 1.0, 0.0)[None, :]
            acc += v
        limit = position + tl.zeros_like(row)
        most = position
    else:
        if PDL:
            cuda.gdc_wait()
        q = tl.load(qkv + ((first + query) * HEADS + head)[:, None] * HEAD_SIZE + d[None, :])
        limit = position + query + 1
        most = position + queries

    q, q_odd = halves(q, INT8)
    acc, acc_odd = halves(acc, INT8)
    if INT8:
        keys = keys.to(tl.pointer_type(tl.int16), bitcast=True)
        values = values.to(tl.pointer_type(tl.int16), bitcast=True)
    masked_from = begin
    if IS_LONG:
        masked_from = tl.maximum(begin, tl.minimum(end, (position + 1) // PAGE))
        top, total, acc, acc_odd = add_pages(
            *(top, total, acc, acc_odd, q, q_odd, keys, values, steps, table),
            *(begin, masked_from, limit, most, kv_head, scale),
            *(KV_HEADS, HEAD_SIZE, PAGE, INT8, False, ASM),
        )
    top, total, acc, acc_odd = add_pages(
        *(top, total, acc, acc_odd, q, q_odd, keys, values, steps, table),
        *(masked_from, end, limit, most, kv_head, scale),
        *(KV_HEADS, HEAD_SIZE, PAGE, INT8, True, ASM),
    )
    done = acc
    if INT8:
        done = tl.join(acc, acc_odd).reshape(ROWS, HEAD_SIZE)
    if not IS_LONG:
        total = tl.sum(total, axis=1)
    real = row < queries * GROUP
    if part < 0:
        store_rows(out, (first + query) * HEADS + head, done / total[:, None], real)
    else:
        at_part = (part * KV_HEADS + kv_head) * ROWS + row
        store_rows(parts, at_part, done, real)
        tl.store(stats + at_part * 2, top * unit, mask=real)
        tl.store(stats + at_part * 2 + 1, total, mask=real)
        if MERGED > 0:
            own = row_parts + first * ROW_FIELDS
            merge_if_last(
                *(parts, stats, arrived + first * KV_HEADS + kv_head, tl.load(own).to(tl.int64)),
                *(tl.load(own + 1), out + first * HEADS * HEAD_SIZE, kv_head),
                *(GROUP, KV_HEADS, HEAD_SIZE, ROWS, MERGED),
            )
