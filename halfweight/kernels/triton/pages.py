"""Device code of pages of KV cache: tokens rotated into them, read out of them, asked for ahead;
and the page table.

A page holds PAGE tokens of one layer: keys and values [KV_HEADS, PAGE, HEAD_SIZE], so that a tile
of a key head is one piece of memory. In INT8 they are bytes q + 128, as weights are, with the steps
of key and value of a token beside each other, [KV_HEADS, PAGE, 2] in the model's dtype.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from halfweight.kernels.triton.between_products import int8_step, to_int8

ASKED_BYTES: tl.constexpr = tl.constexpr(128)
"""Of memory, for each request that it be brought to the L2 cache."""


@triton.jit
def angles(cos_table, sin_table, position, HEAD_SIZE: tl.constexpr):
    """cos and sin [R, HEAD_SIZE] of positions [R, 1]; sin is negative in the first half."""
    d = tl.arange(0, HEAD_SIZE)[None, :]
    at = position.to(tl.int64) * (HEAD_SIZE // 2) + d % (HEAD_SIZE // 2)
    sin = tl.load(sin_table + at)
    return tl.load(cos_table + at), tl.where(d < HEAD_SIZE // 2, -sin, sin)


@triton.jit
def rotated_heads(
    heads, rows, weight, cos, sin, epsilon, HEAD_SIZE: tl.constexpr, HAS_NORM: tl.constexpr
):
    """Heads at `rows` [R, 1] after the pointer, normed and rotated: [R, HEAD_SIZE], same dtype."""
    d = tl.arange(0, HEAD_SIZE)[None, :]
    other_d = (d + HEAD_SIZE // 2) % HEAD_SIZE
    DTYPE: tl.constexpr = heads.dtype.element_ty
    value = tl.load(heads + rows + d).to(tl.float32)
    other = tl.load(heads + rows + other_d).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(value * value, axis=1) / HEAD_SIZE
        factor = tl.rsqrt(square + epsilon)[:, None]
        value = (value * factor).to(DTYPE).to(tl.float32) * tl.load(weight + d)
        other = (other * factor).to(DTYPE).to(tl.float32) * tl.load(weight + other_d)
        value = value.to(DTYPE).to(tl.float32)
        other = other.to(DTYPE).to(tl.float32)
    return (value * cos + other * sin).to(DTYPE)


@triton.jit
def to_bytes(value, DTYPE: tl.constexpr, SMALLEST: tl.constexpr):
    """Vectors [R, D] in float32 as integers [R, D], still float32, and steps [R, 1] in DTYPE."""
    step = int8_step(tl.max(tl.abs(value), axis=1), DTYPE, SMALLEST)[:, None]
    return to_int8(value, step.to(tl.float32)), step


@triton.jit
def store_token(
    cache, steps, place, value, IS_VALUE: tl.constexpr,
    HEAD_SIZE: tl.constexpr, INT8: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Put vectors [R, HEAD_SIZE] at tokens `place` [R, 1] of a cache; what it then holds."""
    at = place * HEAD_SIZE + tl.arange(0, HEAD_SIZE)[None, :]
    held = value.to(tl.float32)
    if INT8:
        q, step = to_bytes(held, value.dtype, SMALLEST)
        tl.store(cache + at, (q.to(tl.int32) + 128).to(tl.uint8))
        tl.store(steps + place * 2 + IS_VALUE, step)
        held = q * step.to(tl.float32)
    else:
        tl.store(cache + at, value)
    return held


@triton.jit
def ask_for(to, SIZE: tl.constexpr):
    """Ask for SIZE numbers at a pointer to be in the L2 cache; PTX."""
    NUM_BYTES: tl.constexpr = SIZE * to.dtype.element_ty.primitive_bitwidth // 8
    line = to.to(tl.int64) + tl.arange(0, NUM_BYTES // ASKED_BYTES) * ASKED_BYTES
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [line],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def ask_for_page(
    keys, values, steps, place, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr
):
    """Ask for a key head's page, which begins at token `place`, to be in the L2 cache.

    Nothing is read into the program, so the kernel ahead may still be writing there.
    """
    ask_for(keys + place * HEAD_SIZE, PAGE * HEAD_SIZE)
    ask_for(values + place * HEAD_SIZE, PAGE * HEAD_SIZE)
    if INT8:
        ask_for(steps + place * 2, PAGE * 2)


@triton.jit(do_not_specialize=["T"])
def rotate_into_pages(
    T, qkv, q_norm, k_norm, queries, keys, values, steps, cos_table, sin_table,
    tables, positions, page_table, epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    INT8: tl.constexpr,
    SMALLEST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token of T: qkv [T, (HEADS + 2 KV_HEADS) HEAD_SIZE] -> queries [T, HEADS, HEAD_SIZE], and
    its keys and values into the page of its position; its sequence's pages begin at tables[t] of
    page_table. Q_ROWS and KV_ROWS pad the heads.
    """
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        cuda.gdc_launch_dependents()
    position = tl.load(positions + token)
    page = tl.load(page_table + tl.load(tables + token) + position // PAGE).to(tl.int64)
    cos, sin = angles(cos_table, sin_table, tl.zeros((1, 1), tl.int32) + position, HEAD_SIZE)
    if PDL:
        cuda.gdc_wait()
    mine = qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    d = tl.arange(0, HEAD_SIZE)[None, :]
    head = tl.minimum(tl.arange(0, Q_ROWS), HEADS - 1)[:, None]
    q = rotated_heads(mine, head * HEAD_SIZE, q_norm, cos, sin, epsilon, HEAD_SIZE, HAS_NORM)
    tl.store(queries + (token * HEADS + head) * HEAD_SIZE + d, q)
    kv_head = tl.minimum(tl.arange(0, KV_ROWS), KV_HEADS - 1)[:, None]
    row = (HEADS + kv_head) * HEAD_SIZE
    k = rotated_heads(mine, row, k_norm, cos, sin, epsilon, HEAD_SIZE, HAS_NORM)
    v = tl.load(mine + row + KV_HEADS * HEAD_SIZE + d)
    place = (page * KV_HEADS + kv_head) * PAGE + position % PAGE
    store_token(keys, steps, place, k, 0, HEAD_SIZE, INT8, SMALLEST)
    store_token(values, steps, place, v, 1, HEAD_SIZE, INT8, SMALLEST)


@triton.jit
def store_new_token(
    qkv, row, k_norm, keys, values, steps, place, cos, sin, epsilon,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, INT8: tl.constexpr,
    SMALLEST: tl.constexpr,
):  # fmt: skip
    """Put the key at `row` [1, 1] after qkv, normed and rotated, and its value at token `place`.

    Returns what the cache then holds of them, float32 [1, HEAD_SIZE].
    """
    k = rotated_heads(qkv, row, k_norm, cos, sin, epsilon, HEAD_SIZE, HAS_NORM)
    v = tl.load(qkv + row + KV_HEADS * HEAD_SIZE + tl.arange(0, HEAD_SIZE)[None, :])
    k_held = store_token(keys, steps, place, k, 0, HEAD_SIZE, INT8, SMALLEST)
    return k_held, store_token(values, steps, place, v, 1, HEAD_SIZE, INT8, SMALLEST)


@triton.jit(do_not_specialize=["N"])
def read_pages(
    N, sources, keys, values, steps, to_keys, to_values,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """INT8 pages sources[n] in the dtype of steps, as pages n of to_keys and to_values."""
    if PDL:
        cuda.gdc_launch_dependents()
    page = tl.load(sources + tl.program_id(0)).to(tl.int64)
    token = tl.arange(0, PAGE)[:, None]
    d = tl.arange(0, HEAD_SIZE)[None, :]
    source = (page * KV_HEADS + tl.program_id(1)) * PAGE + token
    target = (tl.program_id(0).to(tl.int64) * KV_HEADS + tl.program_id(1)) * PAGE + token
    if PDL:
        cuda.gdc_wait()
    k = tl.load(keys + source * HEAD_SIZE + d).to(tl.float32) - 128
    v = tl.load(values + source * HEAD_SIZE + d).to(tl.float32) - 128
    k_step = tl.load(steps + source * 2).to(tl.float32)
    v_step = tl.load(steps + source * 2 + 1).to(tl.float32)
    tl.store(to_keys + target * HEAD_SIZE + d, k * k_step)
    tl.store(to_values + target * HEAD_SIZE + d, v * v_step)


@triton.jit(do_not_specialize=["N"])
def write_page_table(N, updates, page_table, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """page_table[updates[n, 0]] = updates[n, 1] for n < N."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(updates + n * 2, mask=n < N)
    tl.store(page_table + at, tl.load(updates + n * 2 + 1, mask=n < N), mask=n < N)
