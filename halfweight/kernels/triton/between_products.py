"""Device code between the products of a decode step or a prefill: norms, rotation, attention, the
gated activation.

A step of a Llama-like layer is four products and what is here: six launches where transformers has
some thirty. Sums are float32; what transformers rounds to 16 bits between layers is rounded here.

Attention reads only tokens that exist: each of a fixed number of programs takes its share of the
cache as it is now (the length comes from memory), so one recorded CUDA graph serves every step. The
program of the first share adds the new token from registers and writes it to the cache.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from halfweight.kernels.triton.numbers import round_half_even


@triton.jit
def rms(value, weight, epsilon, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """RMS norm of a vector, rounded as transformers does: before and after the weight."""
    normal = value * tl.rsqrt(tl.sum(value * value) / SIZE + epsilon)
    return (normal.to(DTYPE).to(tl.float32) * weight).to(DTYPE)


@triton.jit(do_not_specialize=["B"])
def add_norm(
    B, hidden, delta, weight, out, epsilon,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """hidden [B, SIZE] += delta in place, and out = its RMS norm."""
    if PDL:
        cuda.gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < SIZE
    w = tl.load(weight + tl.arange(0, BLOCK), mask=inside, other=0).to(tl.float32)
    if PDL:
        cuda.gdc_wait()
    value = tl.load(hidden + at, mask=inside, other=0)
    if HAS_DELTA:
        value = (value.to(tl.float32) + tl.load(delta + at, mask=inside, other=0)).to(value.dtype)
        tl.store(hidden + at, value, mask=inside)
    tl.store(
        out + at, rms(value.to(tl.float32), w, epsilon, SIZE, out.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["B"])
def gated_silu(B, gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [B, SIZE] = silu(gate) up, of gate_up [B, 2 SIZE]."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sequence = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up + sequence * 2 * SIZE + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + (sequence * 2 + 1) * SIZE + column, mask=inside, other=0)
    activated = (gate / (1 + tl.exp(-gate))).to(up.dtype).to(tl.float32)
    tl.store(out + sequence * SIZE + column, activated * up.to(tl.float32), mask=inside)


@triton.jit
def head_norm(first, second, weight, epsilon, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """RMS norm of heads given as halves [R, HALF]."""
    d = tl.arange(0, HALF)
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    factor = tl.rsqrt(square / (2 * HALF) + epsilon)[:, None]
    w_first = tl.load(weight + d).to(tl.float32)[None, :]
    w_second = tl.load(weight + HALF + d).to(tl.float32)[None, :]
    first = (first * factor).to(DTYPE).to(tl.float32) * w_first
    second = (second * factor).to(DTYPE).to(tl.float32) * w_second
    return first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)


@triton.jit
def rotated(
    heads, rows, weight, cos, sin, epsilon,
    HALF: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Heads at pointers `rows` [R, 1] normed and rotated by angles [1, HALF]: two [R, HALF]."""
    d = tl.arange(0, HALF)[None, :]
    DTYPE: tl.constexpr = heads.dtype.element_ty
    first = tl.load(heads + rows + d).to(tl.float32)
    second = tl.load(heads + rows + HALF + d).to(tl.float32)
    if HAS_NORM:
        first, second = head_norm(first, second, weight, epsilon, HALF, DTYPE)
    return (first * cos - second * sin).to(DTYPE), (second * cos + first * sin).to(DTYPE)


@triton.jit(do_not_specialize=["T", "begin"])
def rotate_into_cache(
    T, qkv, q_norm, k_norm, queries, keys, values, cos_table, sin_table, begin, max_length, epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token of a prefill, of T: qkv [T, (HEADS + 2 KV_HEADS) HEAD_SIZE] -> its queries
    [T, HEADS, HEAD_SIZE], and its keys and values at place begin + t of a cache
    [KV_HEADS, max_length, HEAD_SIZE]. Q_ROWS and KV_ROWS pad the heads.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    HALF: tl.constexpr = HEAD_SIZE // 2
    token = tl.program_id(0).to(tl.int64)
    place = begin + token
    half = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_table + place * HALF + half)
    sin = tl.load(sin_table + place * HALF + half)
    mine = qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    head = tl.minimum(tl.arange(0, Q_ROWS), HEADS - 1)[:, None]
    first, second = rotated(mine, head * HEAD_SIZE, q_norm, cos, sin, epsilon, HALF, HAS_NORM)
    at = queries + (token * HEADS + head) * HEAD_SIZE + half
    tl.store(at, first)
    tl.store(at + HALF, second)
    kv_head = tl.minimum(tl.arange(0, KV_ROWS), KV_HEADS - 1)[:, None]
    row = (HEADS + kv_head) * HEAD_SIZE
    first, second = rotated(mine, row, k_norm, cos, sin, epsilon, HALF, HAS_NORM)
    at = (kv_head * max_length + place) * HEAD_SIZE + half
    tl.store(keys + at, first)
    tl.store(keys + at + HALF, second)
    row += KV_HEADS * HEAD_SIZE + half
    tl.store(values + at, tl.load(mine + row))
    tl.store(values + at + HALF, tl.load(mine + row + HALF))


@triton.jit
def int8_step(largest, DTYPE: tl.constexpr, SMALLEST: tl.constexpr):
    """The scale of a vector, rounded to what the cache stores."""
    return tl.maximum(largest / 127, SMALLEST).to(DTYPE)


@triton.jit
def to_int8(value, step):
    """round(value / step), as a float32 in -127..127."""
    return tl.maximum(tl.minimum(round_half_even(value / step), 127.0), -127.0)


@triton.jit(do_not_specialize=["B"])
def attend(
    B, qkv, q_norm, k_norm, keys, values, key_scales, value_scales,
    cos_table, sin_table, slot_at, starts, out, partials, stats,
    max_length, scaling, epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    INT8: tl.constexpr,
    SMALLEST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Attention of the new token of sequence b, for the query heads of one key head.

    qkv [B, (HEADS + 2 KV_HEADS) HEAD_SIZE] as the projection gives it; keys and values
    [B, KV_HEADS, max_length, HEAD_SIZE], the new token at `slot`, sequence b's first at starts[b].
    SPLITS 1 writes out [B, HEADS, HEAD_SIZE]; else float32 partials [B, HEADS, SPLITS, HEAD_SIZE]
    and stats [B, HEADS, SPLITS, 2] (maximum, sum), for `merge_splits`. ROWS pads the query heads.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF: tl.constexpr = HEAD_SIZE // 2
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    slot = tl.load(slot_at)
    start = tl.load(starts + sequence)
    half = tl.arange(0, HALF)
    whole = tl.arange(0, HEAD_SIZE)
    angle = (slot - start).to(tl.int64) * HALF + half
    cos = tl.load(cos_table + angle)[None, :]
    sin = tl.load(sin_table + angle)[None, :]

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + tl.minimum(row, GROUP - 1)
    mine = qkv + sequence * (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    q_first, q_second = rotated(
        mine, head[:, None] * HEAD_SIZE, q_norm, cos, sin, epsilon, HALF, HAS_NORM
    )

    share = tl.cdiv(tl.cdiv(slot - start, SPLITS), BLOCK) * BLOCK
    begin = start + split * share
    end = tl.minimum(begin + share, slot)
    cache = (sequence * KV_HEADS + kv_head) * max_length

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_SIZE), tl.float32)
    if split == 0:
        one = tl.zeros((1, 1), tl.int32)
        k_first, k_second = rotated(
            mine, one + (HEADS + kv_head) * HEAD_SIZE, k_norm, cos, sin, epsilon, HALF, HAS_NORM
        )
        v = tl.load(mine + (HEADS + KV_HEADS + kv_head) * HEAD_SIZE + whole).to(tl.float32)
        k_first = k_first.to(tl.float32)
        k_second = k_second.to(tl.float32)
        new = cache + slot
        if INT8:
            k_top = tl.maximum(tl.max(tl.abs(k_first), axis=1), tl.max(tl.abs(k_second), axis=1))
            k_step = int8_step(k_top, DTYPE, SMALLEST)[:, None]
            v_step = int8_step(tl.max(tl.abs(v), axis=0), DTYPE, SMALLEST)
            tl.store(key_scales + new + one, k_step)
            tl.store(value_scales + new, v_step)
            k_step = k_step.to(tl.float32)
            v_step = v_step.to(tl.float32)
            k_first = to_int8(k_first, k_step)
            k_second = to_int8(k_second, k_step)
            v = to_int8(v, v_step)
        stored = keys + new * HEAD_SIZE + half[None, :]
        tl.store(stored, k_first.to(keys.dtype.element_ty))
        tl.store(stored + HALF, k_second.to(keys.dtype.element_ty))
        tl.store(values + new * HEAD_SIZE + whole, v.to(values.dtype.element_ty))
        if INT8:
            k_first = (k_first * k_step).to(DTYPE).to(tl.float32)
            k_second = (k_second * k_step).to(DTYPE).to(tl.float32)
            v = (v * v_step).to(DTYPE).to(tl.float32)
        top = tl.sum(q_first.to(tl.float32) * k_first, axis=1)
        top = (top + tl.sum(q_second.to(tl.float32) * k_second, axis=1)) * scaling
        total += 1
        acc += v[None, :]

    for at in range(begin, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        known = token < end
        place = cache + token
        k_at = keys + place[None, :] * HEAD_SIZE + half[:, None]
        k_first = tl.load(k_at, mask=known[None, :], other=0).to(DTYPE)
        k_second = tl.load(k_at + HALF, mask=known[None, :], other=0).to(DTYPE)
        v = tl.load(
            values + place[:, None] * HEAD_SIZE + whole[None, :], mask=known[:, None], other=0
        )
        score = tl.dot(q_first, k_first, input_precision="ieee")
        score += tl.dot(q_second, k_second, input_precision="ieee")
        if INT8:
            score *= tl.load(key_scales + place, mask=known, other=0).to(tl.float32)[None, :]
            v_step = tl.load(value_scales + place, mask=known, other=0).to(tl.float32)
            v = v.to(tl.float32) * v_step[:, None]
        score = tl.where(known[None, :], score * scaling, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        chance = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(chance, axis=1)
        acc = acc * shrink[:, None]
        acc += tl.dot(chance.to(DTYPE), v.to(DTYPE), input_precision="ieee")
        top = higher

    real = (row < GROUP)[:, None]
    first_head = sequence * HEADS + kv_head * GROUP + row
    if SPLITS == 1:
        done = acc / total[:, None]
        tl.store(out + first_head[:, None] * HEAD_SIZE + whole[None, :], done, mask=real)
    else:
        place = first_head * SPLITS + split
        tl.store(partials + place[:, None] * HEAD_SIZE + whole[None, :], acc, mask=real)
        tl.store(stats + place * 2, top, mask=row < GROUP)
        tl.store(stats + place * 2 + 1, total, mask=row < GROUP)


@triton.jit(do_not_specialize=["B"])
def merge_splits(
    B, partials, stats, out,
    HEAD_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [B, HEADS, HEAD_SIZE] from the shares that `attend` wrote; ROWS is SPLITS, padded."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, ROWS)
    d = tl.arange(0, HEAD_SIZE)
    inside = split < SPLITS
    place = head * SPLITS + split
    top = tl.load(stats + place * 2, mask=inside, other=float("-inf"))
    total = tl.load(stats + place * 2 + 1, mask=inside, other=0)
    part = tl.load(
        partials + place[:, None] * HEAD_SIZE + d[None, :], mask=inside[:, None], other=0
    )
    factor = tl.exp(top - tl.max(top, axis=0))
    done = tl.sum(part * factor[:, None], axis=0) / tl.sum(total * factor, axis=0)
    tl.store(out + head * HEAD_SIZE + d, done)
