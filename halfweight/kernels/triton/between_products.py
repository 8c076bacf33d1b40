"""Device code between the products of a layer: sums with the norm after them, gated activation.

A Llama-like layer is four products, attention (paged.py) and what is here. Sums are float32; what
transformers rounds to 16 bits between layers is rounded here.
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
def int8_step(largest, DTYPE: tl.constexpr, SMALLEST: tl.constexpr):
    """The scale of a vector, rounded to what the cache stores."""
    return tl.maximum(largest / 127, SMALLEST).to(DTYPE)


@triton.jit
def to_int8(value, step):
    """round(value / step), as a float32 in -127..127."""
    return tl.maximum(tl.minimum(round_half_even(value / step), 127.0), -127.0)
