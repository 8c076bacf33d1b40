"""Device code of the GEMV: a few tokens times a weight that is read once.

What limits this product besides memory is arithmetic, a conversion and a multiply-add for every
weight and token. So a thread rounds its activations, 16 at a time, to two int8 parts
(`two_bytes`), which keeps 16 bits of them, and multiplies bytes by bytes: four products an
instruction, exact in integers. One conversion and one scale for 16 weights remain.

Tensors are loaded in shapes that make the compiler give one segment of 16 weights, its scale and
its activations to one thread, so that nothing crosses threads before the sum over a row.

With PDL (sm_90 and later) the first bytes of the weight are asked for while the kernel before this
one still runs. The weight must therefore not be what that kernel wrote; x may be.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from halfweight.kernels.triton.numbers import finish, largest, load_row_ends, two_bytes


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
def gemv_load_x(x, M, K, stride_x, eight, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr):
    """x [SEGMENTS, TOKENS, 8] as float32: the first eight of each segment, or the last."""
    segment = tl.arange(0, SEGMENTS)[:, None, None]
    token = tl.arange(0, TOKENS)[None, :, None]
    offset = segment * 16 + eight + tl.arange(0, 8)[None, None, :]
    mask = (token < M) & (segment < K // 16)
    return tl.load(x + token * stride_x + offset, mask=mask, other=0).to(tl.float32)


@triton.jit
def load_words(words, block, N, K, stride_w, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Words [ROWS, 1, SEGMENTS, 4] of four bytes of a row block: a segment for a thread."""
    first = tl.cast(block, tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    k_word = tl.arange(0, SEGMENTS * 4)
    word = tl.load(
        words + first * (stride_w // 4) + row[:, None] * (stride_w // 4) + k_word[None, :],
        mask=(first + row < N)[:, None] & (k_word < K // 4)[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    return word.reshape(ROWS, 1, SEGMENTS, 4)


@triton.jit
def load_scales(scales, block, N, K, GROUP, stride_s, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Scales [ROWS, 1, SEGMENTS], loaded transposed to fall to the threads of their segments."""
    first = tl.cast(block, tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    segment = tl.arange(0, SEGMENTS)
    scale = tl.load(
        scales + first * stride_s + row[None, :] * stride_s + (segment * 16 // GROUP)[:, None],
        mask=(first + row < N)[None, :] & (segment * 16 < K)[:, None],
        other=0,
    )
    return tl.trans(scale)[:, None, :]


@triton.jit(do_not_specialize=["M"])
def gemv(
    M, x, words, scales, exponents, bias, y,
    N, K, GROUP, stride_x, stride_w, stride_s,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_EXPONENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [M <= TOKENS, N]: x stays in registers, whole rows of W stream past it as int32 words.

    A thread takes segments of 16 weights, and rounds its 16 activations to two int8 parts: the
    products are exact in integers, four at a time, and x keeps 16 bits. A program takes every
    num_programs-th block of ROWS rows; a row spans all its threads. The bytes of the next block
    are on their way while this block is multiplied: to registers with STAGES 1, else those of the
    next STAGES - 1 blocks to shared memory.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    first = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if STAGES == 1:
        word = load_words(words, first, N, K, stride_w, ROWS, SEGMENTS)
    scale = load_scales(scales, first, N, K, GROUP, stride_s, ROWS, SEGMENTS)
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
    byte_offset = tl.trans(x_total)[None, :, :].to(tl.int32) * -128
    step = tl.trans(step / 254)[None, :, :]
    token = tl.arange(0, TOKENS)
    for block in tl.range(first, tl.cdiv(N, ROWS), num_programs, num_stages=STAGES):
        following = block + num_programs
        if STAGES == 1:
            next_word = load_words(words, following, N, K, stride_w, ROWS, SEGMENTS)
        else:
            word = load_words(words, block, N, K, stride_w, ROWS, SEGMENTS)
        next_scale = load_scales(scales, following, N, K, GROUP, stride_s, ROWS, SEGMENTS)
        row = block * ROWS + tl.arange(0, ROWS)
        exponent, offset = load_row_ends(exponents, bias, row, N, HAS_EXPONENTS, HAS_BIAS)
        w0, w1, w2, w3 = four_words(word)
        total = dot_segment(w0, w1, w2, w3, h0, h1, h2, h3, l0, l1, l2, l3, byte_offset, ASM)
        parts = total.to(tl.float32) * (scale.to(tl.float32) * step)
        sums = tl.trans(tl.sum(parts, axis=2))
        out = y + token[:, None] * N + row[None, :]
        tl.store(
            out, finish(sums, exponent, offset), mask=(token < M)[:, None] & (row < N)[None, :]
        )
        scale = next_scale
        if STAGES == 1:
            word = next_word
