"""Device code of the tiled products, of rounding activations, and of the gather.

The weight arrives as the file's bytes, uint8 q + 128 in rows of K. Three ideas carry this file:

1. A byte becomes a 16-bit number in registers (`exact_float`), or int8 by flipping one bit.
2. Scales multiply float32 sums of one group, never a weight: q is exact in every 16-bit type, so
   the products are those of W8A16 in float32. The row's power of two comes once, at the end.
3. Products compute y^T = W x^T, so that converted weights are the operand that lives in registers
   and only x goes through shared memory.

Where K is not a multiple of a tile, x is loaded as zeros; the weight there is anything finite.
Offsets inside a tile are 32-bit, the tile's first row is 64-bit: weights may pass 2^31 bytes.
With PDL (sm_90 and later) a kernel starts before the one before it in the stream has ended, and
waits for that end before it touches anything but weights.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from halfweight.kernels.triton.numbers import (
    exact_float,
    finish,
    largest,
    load_row_ends,
    power_of_two,
    two_bytes,
)


@triton.jit
def store_tile(
    acc, exponents, bias, y, partials, part, token, row, M, N,
    SPLIT: tl.constexpr, HAS_EXPONENTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Finish a tile acc [rows, tokens]: to y, or as it is to partials [SPLIT, M, N]."""
    mask = (token < M)[:, None] & (row < N)[None, :]
    position = token.to(tl.int64)[:, None] * N + row[None, :]
    out = tl.trans(acc)
    if SPLIT > 1:
        tl.store(partials + part.to(tl.int64) * M * N + position, out, mask=mask)
    else:
        exponent, offset = load_row_ends(exponents, bias, row, N, HAS_EXPONENTS, HAS_BIAS)
        tl.store(y + position, finish(out, exponent, offset), mask=mask)


@triton.jit
def group_of(block, GROUP_BLOCKS: tl.constexpr):
    """The scale group of a block of K."""
    return 0 if GROUP_BLOCKS == 0 else block // GROUP_BLOCKS


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(token tile, row tile) of this program: columns of 8 token tiles share W and x in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    column = program // (8 * tiles_n)
    height = min(8, tiles_m - column * 8)
    inside = program - column * 8 * tiles_n
    return column * 8 + inside % height, inside // height


@triton.jit(do_not_specialize=["M"])
def matmul(
    M, x, stride_x, packed, scales, exponents, bias, y, partials,
    N, K, stride_w, stride_s,
    GROUP_BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_EXPONENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N], or its partial sums over 1/SPLIT of K.

    GROUP_BLOCKS tiles of BLOCK_K share a scale; 0 where a whole row does.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N)
    part = tl.program_id(1)
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_in_block = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(K, BLOCK_K)
    begin = blocks * part // SPLIT
    end = blocks * (part + 1) // SPLIT

    safe_row = tl.minimum(row, N - 1)
    x_tile = x + tl.minimum(token, M - 1).to(tl.int64)[:, None] * stride_x + k_in_block[None, :]
    w_tile = packed + safe_row.to(tl.int64)[:, None] * stride_w + k_in_block[None, :]
    s_tile = scales + safe_row.to(tl.int64) * stride_s

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    scale = tl.load(s_tile + group_of(begin, GROUP_BLOCKS))
    for block in range(begin, end):
        k = block * BLOCK_K
        inside = k_in_block[None, :] < K - k
        w = tl.load(w_tile + k, mask=inside, other=0)
        x_part = tl.load(x_tile + k, mask=inside, other=0)
        following = tl.minimum(block + 1, blocks - 1)
        next_scale = tl.load(s_tile + group_of(following, GROUP_BLOCKS))
        q = exact_float(w, x.dtype.element_ty, ASM)
        acc += tl.dot(q, tl.trans(x_part), input_precision="ieee") * scale.to(tl.float32)[:, None]
        scale = next_scale
    store_tile(
        acc, exponents, bias, y, partials, part, token, row, M, N, SPLIT, HAS_EXPONENTS, HAS_BIAS
    )


@triton.jit(do_not_specialize=["M"])
def matmul_int8(
    M, rounded, steps, stride_steps, packed, scales, exponents, bias, y, partials,
    N, K, stride_w, stride_s,
    PARTS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_EXPONENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The product with activations from `round_activations`: int32 sums a block, then float32.

    PARTS 1 is W8A8. PARTS 2 is W8A16 as two int8 products that share the weight tile: exact to
    the 16 bits of x; the two sums meet as integers, |254 h.w + l.w| < 2^30 for 128 products.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N)
    part = tl.program_id(1)
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_in_block = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(K, BLOCK_K)
    begin = blocks * part // SPLIT
    end = blocks * (part + 1) // SPLIT

    safe_token = tl.minimum(token, M - 1).to(tl.int64)
    safe_row = tl.minimum(row, N - 1)
    x_tile = rounded + safe_token[:, None] * K + k_in_block[None, :]
    x_low = x_tile + tl.cast(M, tl.int64) * K
    w_tile = packed + safe_row.to(tl.int64)[:, None] * stride_w + k_in_block[None, :]
    s_tile = scales + safe_row.to(tl.int64) * stride_s
    step_tile = steps + token

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(begin, end):
        k = block * BLOCK_K
        inside = k_in_block[None, :] < K - k
        w = tl.load(w_tile + k, mask=inside, other=0)
        high = tl.load(x_tile + k, mask=inside, other=0)
        scale = tl.load(s_tile + group_of(block, GROUP_BLOCKS))
        step = tl.load(step_tile + block * stride_steps)
        q = (w ^ 128).to(tl.int8, bitcast=True)
        total = tl.dot(q, tl.trans(high), out_dtype=tl.int32)
        if PARTS == 2:
            low = tl.load(x_low + k, mask=inside, other=0)
            total = total * 254 + tl.dot(q, tl.trans(low), out_dtype=tl.int32)
        acc += total.to(tl.float32) * scale.to(tl.float32)[:, None] * step[None, :]
    store_tile(
        acc, exponents, bias, y, partials, part, token, row, M, N, SPLIT, HAS_EXPONENTS, HAS_BIAS
    )


@triton.jit(do_not_specialize=["M"])
def round_activations(
    M, x, stride_x, rounded, steps, stride_steps, K,
    PARTS: tl.constexpr,
    WITH_RATIOS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> int8 [PARTS, M, K] and float32 steps [K/BLOCK_K, M].

    By `two_bytes`: x = steps h, or with PARTS 2 x = steps (254 h + l). The steps lie
    [blocks, tokens], padded to whole tiles of tokens. WITH_RATIOS a program has all BLOCKS of its
    token and writes [2, blocks, tokens]: the step of the block before over that of the block, and
    then the steps, none below 2^-24 of the token's largest. That is for hopper_int8.cu, whose lanes
    read four ratios at once: of 16 tokens, t, t + 1, t + 8 and t + 9 lie together.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    in_program = tl.arange(0, BLOCKS)
    block = tl.program_id(1) * BLOCKS + in_program
    k = block[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = k < K
    value = tl.load(x + token * stride_x + k, mask=inside, other=0).to(tl.float32)
    step = largest(value) / 127
    place = block * stride_steps + token
    exists = block * BLOCK_K < K
    if WITH_RATIOS:
        least = tl.maximum(tl.max(step, axis=0) * 5.9604645e-08, 1e-30)
        step = tl.where(step < least, least, step)
        before = tl.gather(step, tl.maximum(in_program - 1, 0), axis=0)
        inside_16 = token // 2 % 4 * 4 + token // 8 % 2 * 2 + token % 2
        turned = block * stride_steps + token // 16 * 16 + inside_16
        tl.store(steps + turned, before / step, mask=exists)
        steps += tl.cdiv(K, BLOCK_K) * stride_steps
    high, low = two_bytes(value, step)
    tl.store(rounded + token * K + k, high.to(tl.int8), mask=inside)
    if PARTS == 2:
        tl.store(rounded + (M + token) * K + k, low.to(tl.int8), mask=inside)
        step = step / 254
    tl.store(steps + place, step, mask=exists)


@triton.jit(do_not_specialize=["M"])
def add_partials(
    M, partials, exponents, bias, y, N,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_EXPONENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] from partial sums [SPLIT, M, N], added in order."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(partials + (part * M + token) * N + row, mask=inside, other=0)
    exponent, offset = load_row_ends(exponents, bias, row, N, HAS_EXPONENTS, HAS_BIAS)
    out = finish(total[None, :], exponent, offset)
    tl.store(y + token * N + row[None, :], out, mask=inside[None, :])


@triton.jit(do_not_specialize=["M"])
def gather(
    M, out, ids, packed, scales, exponents,
    N, K, GROUP, stride_w, stride_s,
    BLOCK_K: tl.constexpr,
    HAS_EXPONENTS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[i < M] = dequantized row ids[i], or row i without ids; NaN for an id outside 0..N-1."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    position = tl.program_id(0).to(tl.int64)
    row = position
    if HAS_IDS:
        row = tl.load(ids + position).to(tl.int64)
    known = tl.minimum(tl.maximum(row, 0), N - 1)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    q = tl.load(packed + known * stride_w + k, mask=inside, other=128).to(tl.float32) - 128
    scale = tl.load(scales + known * stride_s + k // GROUP, mask=inside, other=0).to(tl.float32)
    value = tl.where(row == known, q * scale, float("nan"))
    if HAS_EXPONENTS:
        exponent = tl.load(exponents + known).to(tl.int32)
        half = exponent >> 1
        value = value * power_of_two(half) * power_of_two(exponent - half)
    tl.store(out + position * K + k, value, mask=inside)


@triton.jit
def read(words, sums, BLOCK: tl.constexpr):
    """One sum of BLOCK words a program: nothing but reading, to measure the memory."""
    program = tl.program_id(0)
    offset = tl.arange(0, BLOCK)
    tl.store(sums + program, tl.sum(tl.load(words + program.to(tl.int64) * BLOCK + offset)))
