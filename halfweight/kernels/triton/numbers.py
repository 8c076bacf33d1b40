"""Device functions: numbers from bytes and bytes from numbers, in registers.

A byte becomes a float by placing it in the mantissa of a number whose unit is 1 and subtracting
that number and 128: one byte permute and one subtraction, exact, no conversion instruction. On
NVIDIA this is inline assembly (ASM), elsewhere plain arithmetic.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300
from __future__ import annotations

import triton
import triton.language as tl


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
def power_of_two(exponent):
    """2^exponent as float32 for an exponent in -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_row_ends(exponents, bias, row, N, HAS_EXPONENTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What finishes the sums of rows: int32 exponents, float32 bias; zeros where there is none."""
    inside = row < N
    exponent = tl.zeros_like(row)
    offset = exponent.to(tl.float32)
    if HAS_EXPONENTS:
        exponent = tl.load(exponents + row, mask=inside, other=0).to(tl.int32)
    if HAS_BIAS:
        offset = tl.load(bias + row, mask=inside, other=0).to(tl.float32)
    return exponent, offset


@triton.jit
def finish(sums, exponent, offset):
    """sums [tokens, rows] 2^exponent + offset, in two steps so that no power underflows."""
    half = exponent >> 1
    scaled = sums * power_of_two(half)[None, :] * power_of_two(exponent - half)[None, :]
    return scaled + offset[None, :]


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
    scaled = value * tl.expand_dims(1 / tl.maximum(step, 1e-30), len(value.shape) - 1)
    high = round_half_even(scaled)
    return high, round_half_even((scaled - high) * 254)
