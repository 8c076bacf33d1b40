"""Device code of the Triton backend: GEMV, tiled products, activation rounding, gather.

The weight arrives as the file's bytes, uint8 q + 128 in rows of K. Three ideas carry this file:

1. A byte becomes a float by placing it in the mantissa of a number whose unit is 1 and subtracting
   that number and 128: one byte permute and one subtraction, exact, no conversion instruction.
   `exact_float` does it by inline assembly on NVIDIA (ASM), by plain arithmetic elsewhere.
2. Scales multiply float32 sums of one group, never a weight: q is exact in every 16-bit type, so
   the products are those of W8A16 in float32. The row's power of two comes once, at the end.
3. Tiled products compute y^T = W x^T, so that converted weights are the operand that lives in
   registers and only x goes through shared memory.

Offsets inside a tile are 32-bit, the tile's first row is 64-bit: weights may pass 2^31 bytes.
With PDL (sm_90 and later) a kernel begins to read weights, which nothing writes, while the kernel
before it in the stream still runs, and waits before it touches anything else.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def exact_float(w, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """uint8 q + 128 -> q in DTYPE, exactly."""
    if ASM and DTYPE == tl.float16:
        q = tl.inline_asm_elementwise(
            "{.reg .b32 a, b, m; mov.b32 m, 0x64806480; prmt.b32 a, $2, 0x64646464, 0x4140;"
            "prmt.b32 b, $2, 0x64646464, 0x4342;"
            "sub.f16x2 $0, a, m; sub.f16x2 $1, b, m;}",
            "=r,=r,r",
            [w],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    elif ASM and DTYPE == tl.bfloat16:
        # 0x43uu is 128 + (u & 127) with bit 7 in the exponent's last place: take it out of one
        # operand and put its complement in the other, and the difference is u - 128.
        q = tl.inline_asm_elementwise(
            "{.reg .b32 a, b, c, d, m; mov.b32 m, 0xbf80bf80;"
            "prmt.b32 a, $2, 0x43434343, 0x4140; prmt.b32 b, $2, 0x43434343, 0x4342;"
            "lop3.b32 c, a, 0x00800080, 0xff80ff80, 0x28;"
            "lop3.b32 d, b, 0x00800080, 0xff80ff80, 0x28;"
            "and.b32 a, a, 0xff7fff7f; and.b32 b, b, 0xff7fff7f;"
            "fma.rn.bf16x2 $0, c, m, a; fma.rn.bf16x2 $1, d, m, b;}",
            "=r,=r,r",
            [w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        q = (w.to(tl.int32) - 128).to(DTYPE)
    return q


@triton.jit
def dot_four(word, other):
    """Sum of four products, bytes of `word` less 128 times signed bytes of `other`."""
    total = (((word & 255) - 128) * ((other << 24) >> 24)) + (
        (((word >> 8) & 255) - 128) * ((other << 16) >> 24)
    )
    total += (((word >> 16) & 255) - 128) * ((other << 8) >> 24)
    return total + (((word >> 24) & 255) - 128) * (other >> 24)


@triton.jit
def dot_segment(w0, w1, w2, w3, h0, h1, h2, h3, l0, l1, l2, l3, offset, ASM: tl.constexpr):
    """254 h.q + l.q over 16 weights in four words; `offset` is -128 (254 sum h + sum l)."""
    if ASM:
        total = tl.inline_asm_elementwise(
            "{.reg .s32 a, b; mov.b32 a, 0;"
            "dp4a.u32.s32 a, $1, $5, a; dp4a.u32.s32 b, $1, $9, $13;"
            "dp4a.u32.s32 a, $2, $6, a; dp4a.u32.s32 b, $2, $10, b;"
            "dp4a.u32.s32 a, $3, $7, a; dp4a.u32.s32 b, $3, $11, b;"
            "dp4a.u32.s32 a, $4, $8, a; dp4a.u32.s32 b, $4, $12, b;"
            "mad.lo.s32 $0, a, 254, b;}",
            "=r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [w0, w1, w2, w3, h0, h1, h2, h3, l0, l1, l2, l3, offset],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        high = dot_four(w0, h0) + dot_four(w1, h1) + dot_four(w2, h2) + dot_four(w3, h3)
        low = dot_four(w0, l0) + dot_four(w1, l1) + dot_four(w2, l2) + dot_four(w3, l3)
        total = high * 254 + low
    return total


@triton.jit
def four_words(words):
    """[..., 4] -> four tensors [...]."""
    even, odd = tl.split(words.reshape(words.shape[0], words.shape[1], words.shape[2], 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def two_words(values):
    """Integers -128..127 as float32 [S, T, 8] -> two tensors [1, T, S] of words of four bytes."""
    shape: tl.constexpr = values.shape
    parts = (values.to(tl.int32) & 255).reshape(shape[0], shape[1], 2, 4)
    shift = tl.arange(0, 4) * 8
    first, second = tl.split(tl.sum(parts << shift[None, None, None, :], axis=3))
    return tl.trans(first)[None, :, :], tl.trans(second)[None, :, :]


@triton.jit
def round_half_even(value):
    """Nearest integer of |value| < 2^22 as float32, ties to even."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def largest(value):
    """Largest |value| along the last axis; NaN where a value is not finite."""
    axis: tl.constexpr = len(value.shape) - 1
    return tl.max(tl.abs(value), axis=axis) + tl.sum(value * 0, axis=axis)


@triton.jit
def two_bytes(value, step):
    """x [..., L] float32 and step = absmax / 127 [...] -> (h, l): x = step (h + l / 254).

    h and l are integers in -127..127, so x keeps 16 bits.
    """
    scaled = value / tl.expand_dims(tl.maximum(step, 1e-30), len(value.shape) - 1)
    high = round_half_even(scaled)
    return high, round_half_even((scaled - high) * 254)


@triton.jit
def gemv_load_x(x, M, K, stride_x, eight, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr):
    """x [SEGMENTS, TOKENS, 8] as float32: the first eight of each segment, or the last."""
    segment = tl.arange(0, SEGMENTS)[:, None, None]
    token = tl.arange(0, TOKENS)[None, :, None]
    offset = segment * 16 + eight + tl.arange(0, 8)[None, None, :]
    mask = (token < M) & (segment < K // 16)
    return tl.load(x + token * stride_x + offset, mask=mask, other=0).to(tl.float32)


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32 for an exponent in -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def times_power_of_two(value, exponents, row, inside, HAS_EXPONENTS: tl.constexpr):
    """value [..., rows] times 2^exponents[row], in two steps so that neither factor underflows."""
    if HAS_EXPONENTS:
        exponent = tl.load(exponents + row, mask=inside, other=0).to(tl.int32)
        half = exponent >> 1
        value = value * power_of_two(half)[None, :] * power_of_two(exponent - half)[None, :]
    return value


@triton.jit
def gemv_load(
    words, scales, block, N, K, GROUP, stride_w, stride_s,
    ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Words [ROWS, 1, SEGMENTS, 4] of four bytes and scales [ROWS, 1, SEGMENTS] of a row block.

    Both are loaded in the shape that makes the compiler give one segment to one thread.
    """
    first = block.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    k_word = tl.arange(0, SEGMENTS * 4)
    segment = tl.arange(0, SEGMENTS)
    inside = first + row < N
    word = tl.load(
        words + first * (stride_w // 4) + row[:, None] * (stride_w // 4) + k_word[None, :],
        mask=inside[:, None] & (k_word < K // 4)[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    scale = tl.load(
        scales + first * stride_s + row[None, :] * stride_s + (segment * 16 // GROUP)[:, None],
        mask=inside[None, :] & (segment * 16 < K)[:, None],
        other=0,
    )
    return word.reshape(ROWS, 1, SEGMENTS, 4), tl.trans(scale)[:, None, :]


@triton.jit(do_not_specialize=["M"])
def gemv(
    M, x, words, scales, exponents, bias, y,
    N, K, GROUP, stride_x, stride_w, stride_s,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_EXPONENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [M <= TOKENS, N]: x stays in registers, whole rows of W stream past it as int32 words.

    A thread takes segments of 16 weights, and rounds its 16 activations to two int8 parts: the
    products are exact in integers, four at a time, and x keeps 16 bits. A program takes every
    num_programs-th block of ROWS rows; a row spans all its threads. The bytes of the next block
    are on their way while this block is multiplied.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    first = tl.program_id(0)
    num_programs = tl.num_programs(0)
    word, scale = gemv_load(words, scales, first, N, K, GROUP, stride_w, stride_s, ROWS, SEGMENTS)
    if PDL:
        cuda.gdc_wait()
    x_a = gemv_load_x(x, M, K, stride_x, 0, SEGMENTS, TOKENS)
    x_b = gemv_load_x(x, M, K, stride_x, 8, SEGMENTS, TOKENS)
    step = tl.maximum(largest(x_a), largest(x_b), propagate_nan=tl.PropagateNan.ALL) / 127
    high_a, low_a = two_bytes(x_a, step)
    high_b, low_b = two_bytes(x_b, step)
    h0, h1 = two_words(high_a)
    h2, h3 = two_words(high_b)
    l0, l1 = two_words(low_a)
    l2, l3 = two_words(low_b)
    x_total = tl.sum((high_a + high_b) * 254 + low_a + low_b, axis=2)
    offset = tl.trans(x_total)[None, :, :].to(tl.int32) * -128
    step = tl.trans(step / 254)[None, :, :]
    token = tl.arange(0, TOKENS)
    for block in range(first, tl.cdiv(N, ROWS), num_programs):
        next_word, next_scale = gemv_load(
            words, scales, block + num_programs, N, K, GROUP, stride_w, stride_s, ROWS, SEGMENTS
        )
        w0, w1, w2, w3 = four_words(word)
        total = dot_segment(w0, w1, w2, w3, h0, h1, h2, h3, l0, l1, l2, l3, offset, ASM)
        parts = total.to(tl.float32) * (scale.to(tl.float32) * step)
        sums = tl.trans(tl.sum(parts, axis=2))
        row = block * ROWS + tl.arange(0, ROWS)
        inside = row < N
        sums = times_power_of_two(sums, exponents, row, inside, HAS_EXPONENTS)
        if HAS_BIAS:
            sums += tl.load(bias + row, mask=inside, other=0).to(tl.float32)[None, :]
        out = y + token[:, None] * N + row[None, :]
        tl.store(out, sums, mask=(token < M)[:, None] & inside[None, :])
        word, scale = next_word, next_scale


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
        out = times_power_of_two(out, exponents, row, row < N, HAS_EXPONENTS)
        if HAS_BIAS:
            out += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)[None, :]
        tl.store(y + position, out, mask=mask)


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
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> int8 [PARTS, M, K] and float32 steps [K/BLOCK_K, M].

    By `two_bytes`: x = steps h, or with PARTS 2 x = steps (254 h + l). The steps lie
    [blocks, tokens], padded to whole tiles of tokens.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    k = block[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = k < K
    value = tl.load(x + token * stride_x + k, mask=inside, other=0).to(tl.float32)
    step = largest(value) / 127
    high, low = two_bytes(value, step)
    tl.store(rounded + token * K + k, high.to(tl.int8), mask=inside)
    if PARTS == 2:
        tl.store(rounded + (M + token) * K + k, low.to(tl.int8), mask=inside)
        step = step / 254
    tl.store(steps + block * stride_steps + token, step, mask=block * BLOCK_K < K)


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
    out = times_power_of_two(total[None, :], exponents, row, inside, HAS_EXPONENTS)
    if HAS_BIAS:
        out += tl.load(bias + row, mask=inside, other=0).to(tl.float32)[None, :]
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
