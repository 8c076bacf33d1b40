"""The inner loops of the CPU's products, in LLVM vectors of 16 lanes.

LLVM's auto-vectorizer meets bytes, groups and sums and makes poor loops of them. So the loops are
spelled out by Python that repeats a line for each row, token and part of a tile; LLVM gives each
vector the registers the CPU has: one of AVX-512, two of AVX2, four of NEON. To Numba a tile is one
function of addresses (int64).

What 64 weights of a row cost one token:

    floats    vpmovzxbd, vpaddd, vcvtdq2ps and vfmadd for each 16: 16 instructions, 3 a group
    digits    a vpdpbusd for each part of x, where the CPU has VNNI: 2 or 3, and 5 or 7 a group

So with VNNI x becomes an integer for each block of a group, written in 1 to 3 digits of base 256
(8, 16 or 24 bits), and meets the weights in integers, exactly. The stored byte q + 128 is unsigned
and a digit is signed, as vpdpbusd wants them; each lane starts at what takes its 128s off again.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from halfweight.kernels.cpu.llvm_vectors import (
    BYTES16,
    BYTES64,
    FLOAT,
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    LANES,
    LINE,
    OFFSET,
    accumulators,
    call,
    constant,
    dot_bytes,
    load,
    multiply_add,
    offset,
    pointer,
    record_stride,
    signed_weights,
    splat,
    splat_int,
    vector_function,
)

ROWS = 4
"""Rows of weights that meet a few tokens at once."""
BLOCK_ROWS = 32
"""Rows of weights that meet many tokens at once."""
SMALLEST = 2.0**-100
"""A block of x with nothing larger counts as zeros: its inverse would overflow."""


def float_tile(num_tokens: int) -> Any:
    """The product of four rows of weights with some tokens, in registers.

    The Numba function takes the addresses of x float32 [num_tokens, K], packed [4, K] and scales
    float32 [4, K/G], then K/G, G, the address of float32 [4, num_tokens] to write, the bytes
    between rows (0: one row four times), and the address past which nothing is fetched ahead.
    Weights past the last 16 of a group are left out. One token is cheaper if its groups are scaled,
    several if the weights are.
    """

    def generate(
        _features: Any,
        b: Any,
        x: Any,
        weights: Any,
        scales: Any,
        num_groups: Any,
        group_size: Any,
        out: Any,
        row_stride: Any,
        limit: Any,
    ) -> None:
        token_bytes = b.mul(b.mul(num_groups, group_size), I64(4))
        scale_stride = _stride_of_scales(b, row_stride, num_groups)
        sums = accumulators(b, ROWS * num_tokens, FLOATS)
        parts = accumulators(b, ROWS, FLOATS) if num_tokens == 1 else sums
        with cgutils.for_range(b, num_groups) as groups:
            scale_at = b.add(scales, b.mul(groups.index, I64(4)))
            steps = [
                splat(b, load(b, offset(b, scale_at, r, scale_stride), FLOAT)) for r in range(ROWS)
            ]
            begin = b.mul(groups.index, group_size)
            lines = b.udiv(group_size, I64(LINE))
            _prefetch(b, b.add(weights, begin), lines, row_stride, limit)
            if num_tokens == 1:
                for part in parts:
                    b.store(ir.Constant(FLOATS, [0.0] * LANES), part)
            with cgutils.for_range(b, b.udiv(group_size, I64(LANES))) as loop:
                k = b.add(begin, b.mul(loop.index, I64(LANES)))
                x_at, weights_at = b.add(x, b.mul(k, I64(4))), b.add(weights, k)
                tokens = [
                    load(b, offset(b, x_at, m, token_bytes), FLOATS) for m in range(num_tokens)
                ]
                for r in range(ROWS):
                    row = signed_weights(b, offset(b, weights_at, r, row_stride))
                    if num_tokens > 1:
                        row = b.fmul(row, steps[r])
                    for m, token in enumerate(tokens):
                        cell = parts[r * num_tokens + m]
                        b.store(multiply_add(b, row, token, b.load(cell)), cell)
            if num_tokens == 1:
                for part, step, cell in zip(parts, steps, sums, strict=True):
                    b.store(multiply_add(b, b.load(part), step, b.load(cell)), cell)
        store_sums(b, sums, out)

    return vector_function(f"float_tile_{num_tokens}", 8, generate)


def digit_tile(num_parts: int) -> Any:
    """The product of four rows of weights with one token in digits.

    The Numba function takes the address of a record (see `round_block`): int32 starts
    [K/B, num_parts, 16], int8 digits [num_parts, K], float32 steps [K/B]; else as `float_tile`,
    with blocks of B, a multiple of 64, in the place of groups.
    """

    def generate(
        features: Any,
        b: Any,
        record: Any,
        weights: Any,
        scales: Any,
        num_blocks: Any,
        block: Any,
        out: Any,
        row_stride: Any,
        limit: Any,
    ) -> None:
        columns = b.mul(num_blocks, block)
        scale_stride = _stride_of_scales(b, row_stride, num_blocks)
        digits = b.add(record, b.mul(num_blocks, I64(4 * LANES * num_parts)))
        steps = offset(b, digits, num_parts, columns)
        sums = accumulators(b, ROWS, FLOATS)
        cells = [accumulators(b, num_parts, INTS) for _ in range(ROWS)]
        with cgutils.for_range(b, num_blocks) as blocks:
            starts_at = b.add(record, b.mul(blocks.index, I64(4 * LANES * num_parts)))
            for part in range(num_parts):
                start = load(b, b.add(starts_at, I64(4 * LANES * part)), INTS)
                for row in cells:
                    b.store(start, row[part])
            begin = b.mul(blocks.index, block)
            with cgutils.for_range(b, b.udiv(block, I64(LINE))) as lines:
                k = b.add(begin, b.mul(lines.index, I64(LINE)))
                x = [
                    load(b, offset(b, b.add(digits, k), part, columns), BYTES64)
                    for part in range(num_parts)
                ]
                at = b.add(weights, k)
                _prefetch(b, at, I64(1), row_stride, limit)
                for r, row in enumerate(cells):
                    packed = load(b, offset(b, at, r, row_stride), BYTES64)
                    for part, cell in zip(x, row, strict=True):
                        b.store(dot_bytes(features, b, b.load(cell), packed, part), cell)
            at_block = b.mul(blocks.index, I64(4))
            step = splat(b, load(b, b.add(steps, at_block), FLOAT))
            for r, row in enumerate(cells):
                scale_at = b.add(offset(b, scales, r, scale_stride), at_block)
                factor = splat(b, load(b, scale_at, FLOAT))
                total = b.fmul(_join_digits(b, [b.load(cell) for cell in row]), step)
                b.store(multiply_add(b, total, factor, b.load(sums[r])), sums[r])
        store_sums(b, sums, out)

    return vector_function(f"digit_tile_{num_parts}", 8, generate)


def round_block(num_parts: int) -> Any:
    """Write a block of x as integers in digits of base 256, lowest first.

    The Numba function takes the addresses of x float32 [B], of int8 digits and the bytes between
    parts, then those of int32 starts [num_parts, 16] (a lane's digits times -128) and of one
    float32 step, then B. A step is the lowest digit's; NaN and infinities make it one of them.
    """
    largest_number = sum(127 * 256**part for part in range(num_parts))

    def generate(
        features: Any,
        b: Any,
        x: Any,
        digits: Any,
        digits_stride: Any,
        starts: Any,
        step: Any,
        block: Any,
    ) -> None:
        most = splat(b, ir.Constant(FLOAT, float(largest_number)))
        least = b.fneg(most)
        largest_at = cgutils.alloca_once_value(b, ir.Constant(FLOATS, [0.0] * LANES))
        with cgutils.for_range(b, b.udiv(block, I64(LANES))) as loop:
            values = load(b, b.add(x, b.mul(loop.index, I64(4 * LANES))), FLOATS)
            values = call(b, f"llvm.fabs.v{LANES}f32", FLOATS, values)
            found = call(b, f"llvm.maximum.v{LANES}f32", FLOATS, b.load(largest_at), values)
            b.store(found, largest_at)
        name = f"llvm.vector.reduce.fmaximum.v{LANES}f32"
        largest = call(b, name, FLOAT, b.load(largest_at))
        number = ir.Constant(FLOAT, float(largest_number))
        usable = b.fcmp_ordered(">", largest, ir.Constant(FLOAT, SMALLEST))
        zero = ir.Constant(FLOAT, 0.0)
        inverse = splat(b, b.select(usable, b.fdiv(number, largest), zero))
        b.store(b.fdiv(largest, number), pointer(b, step, FLOAT), align=4)
        with cgutils.for_range(b, b.udiv(block, I64(LANES))) as loop:
            k = b.mul(loop.index, I64(LANES))
            value = b.fmul(load(b, b.add(x, b.mul(k, I64(4))), FLOATS), inverse)
            value = call(b, f"llvm.rint.v{LANES}f32", FLOATS, value)
            value = call(b, f"llvm.maxnum.v{LANES}f32", FLOATS, value, least)
            value = call(b, f"llvm.minnum.v{LANES}f32", FLOATS, value, most)
            rest = b.fptosi(value, INTS)
            for part in range(num_parts):
                digit = b.trunc(rest, BYTES16)
                to = b.add(offset(b, digits, part, digits_stride), k)
                b.store(digit, pointer(b, to, BYTES16), align=1)
                rest = b.ashr(b.sub(rest, b.sext(digit, INTS)), constant(8))
        offsets = ir.Constant(BYTES64, [OFFSET - 256] * LINE)
        for part in range(num_parts):
            total = cgutils.alloca_once_value(b, constant(0))
            b.store(constant(0), total)
            with cgutils.for_range(b, b.udiv(block, I64(LINE))) as loop:
                at = b.add(offset(b, digits, part, digits_stride), b.mul(loop.index, I64(LINE)))
                product = dot_bytes(features, b, b.load(total), offsets, load(b, at, BYTES64))
                b.store(product, total)
            to = pointer(b, b.add(starts, I64(4 * LANES * part)), INTS)
            b.store(b.sub(constant(0), b.load(total)), to, align=4)

    return vector_function(f"round_block_{num_parts}", 6, generate)


def int8_block(num_tokens: int) -> Any:
    """32 rows of weights, interleaved, times some tokens rounded to int8: for many tokens.

    A lane is a row here, so nothing is folded and four bytes of a token meet all rows at once.
    The Numba function takes the addresses of the tokens' records (int8 [K], float32 steps [K/B] and
    int32 starts [K/B], -128 sum(x), in whole lines), of packed [K/4, 32, 4] and scales float32
    [K/B, 32], then K/B, B, and the address of float32 [num_tokens, 32] to write with the bytes
    between its rows.
    """

    def generate(
        features: Any,
        b: Any,
        x: Any,
        weights: Any,
        scales: Any,
        num_groups: Any,
        group_size: Any,
        out: Any,
        out_stride: Any,
    ) -> None:
        columns, group_bytes = b.mul(num_groups, group_size), b.mul(num_groups, I64(4))
        x_stride = record_stride(b, columns, num_groups)
        steps_at = b.add(x, columns)
        starts_at = b.add(steps_at, group_bytes)
        pairs = [(m, v) for m in range(num_tokens) for v in range(BLOCK_ROWS // LANES)]
        sums = accumulators(b, len(pairs), FLOATS)
        parts = accumulators(b, len(pairs), INTS)
        with cgutils.for_range(b, num_groups) as groups:
            at_group = b.mul(groups.index, I64(4))
            for (m, _), cell in zip(pairs, parts, strict=True):
                start = load(b, b.add(offset(b, starts_at, m, x_stride), at_group), I32)
                b.store(splat_int(b, start), cell)
            begin = b.mul(groups.index, group_size)
            with cgutils.for_range(b, b.udiv(group_size, I64(4))) as loop:
                k = b.add(begin, b.mul(loop.index, I64(4)))
                rows_at = b.add(weights, b.mul(k, I64(BLOCK_ROWS)))
                rows = [
                    load(b, b.add(rows_at, I64(4 * LANES * v)), BYTES64)
                    for v in range(BLOCK_ROWS // LANES)
                ]
                tokens = [
                    splat_int(b, load(b, offset(b, b.add(x, k), m, x_stride), I32))
                    for m in range(num_tokens)
                ]
                for (m, v), cell in zip(pairs, parts, strict=True):
                    token = b.bitcast(tokens[m], BYTES64)
                    b.store(dot_bytes(features, b, b.load(cell), rows[v], token), cell)
            scales_at = b.add(scales, b.mul(at_group, I64(BLOCK_ROWS)))
            for (m, v), part, cell in zip(pairs, parts, sums, strict=True):
                scale = load(b, b.add(scales_at, I64(4 * LANES * v)), FLOATS)
                step = load(b, b.add(offset(b, steps_at, m, x_stride), at_group), FLOAT)
                factor = b.fmul(scale, splat(b, step))
                product = b.sitofp(b.load(part), FLOATS)
                b.store(multiply_add(b, product, factor, b.load(cell)), cell)
        for (m, v), cell in zip(pairs, sums, strict=True):
            address = b.add(offset(b, out, m, out_stride), I64(4 * LANES * v))
            b.store(b.load(cell), pointer(b, address, FLOATS), align=4)

    return vector_function(f"int8_block_{num_tokens}", 7, generate)


def _join_digits(builder: Any, sums: list[Any]) -> Any:
    """Sums of products with one to three digits as one float vector; two fit an int32."""
    joined = sums[0]
    if len(sums) > 1:
        joined = builder.add(joined, builder.shl(sums[1], constant(8)))
    total = builder.sitofp(joined, FLOATS)
    if len(sums) > 2:
        weight = ir.Constant(FLOATS, [65536.0] * LANES)
        total = multiply_add(builder, builder.sitofp(sums[2], FLOATS), weight, total)
    return total


def _stride_of_scales(builder: Any, row_stride: Any, num_groups: Any) -> Any:
    """Bytes between the scales of two rows; 0 where the rows are one."""
    same = builder.icmp_signed("==", row_stride, I64(0))
    return builder.select(same, I64(0), builder.mul(num_groups, I64(4)))


def _prefetch(builder: Any, at: Any, lines: Any, row_stride: Any, limit: Any) -> None:
    """Ask for lines of the next four rows: four streams are too many for a CPU to guess."""
    with cgutils.for_range(builder, lines) as loop:
        ahead = builder.add(builder.mul(row_stride, I64(ROWS)), at)
        first = builder.add(ahead, builder.mul(loop.index, I64(LINE)))
        for r in range(ROWS):
            wanted = offset(builder, first, r, row_stride)
            near = builder.icmp_unsigned("<", wanted, limit)
            address = pointer(builder, builder.select(near, wanted, limit), I8)
            call(builder, "llvm.prefetch.p0", ir.VoidType(), address, I32(0), I32(3), I32(1))


def store_sums(builder: Any, sums: list[Any], out: Any) -> None:
    """Write the sums of the vectors' lanes one after the other."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    zero = ir.Constant(FLOAT, 0.0)
    for i, cell in enumerate(sums):
        total = call(builder, name, FLOAT, zero, builder.load(cell), fastmath=("reassoc",))
        to = pointer(builder, builder.add(out, I64(4 * i)), FLOAT)
        builder.store(total, to, align=4)
