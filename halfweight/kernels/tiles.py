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

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
OFFSET = 128
ROWS = 4
"""Rows of weights that meet a few tokens at once."""
BLOCK_ROWS = 32
"""Rows of weights that meet many tokens at once."""
MATRIX_RECORDS = 32
"""Rounded tokens that meet them at once in a matrix unit."""
UNROLLED = 4
"""Tokens whose sums are added without a jump."""
LINE = 64
"""Bytes of a cache line, and bytes that one integer product takes of a row."""
SMALLEST = 2.0**-100
"""A block of x with nothing larger counts as zeros: its inverse would overflow."""

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_BYTES16 = ir.VectorType(_I8, LANES)
_BYTES64 = ir.VectorType(_I8, LINE)
_INTS64 = ir.VectorType(_I32, LINE)


def _tile(name: str, num_arguments: int, generate: Callable[..., None]) -> Any:
    """A Numba function of int64 that writes LLVM by `generate(features, builder, *values)`."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        features = frozenset(context.codegen().magic_tuple()[2].split(","))
        generate(features, builder, *values)
        return context.get_dummy_value()

    typed = types.void(*[types.int64] * num_arguments), codegen

    def of_3(typing: Any, a: Any, b: Any, c: Any) -> Any:
        return typed

    def of_5(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        return typed

    def of_6(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        return typed

    def of_7(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
        return typed

    def of_8(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
        return typed

    definition = {3: of_3, 5: of_5, 6: of_6, 7: of_7, 8: of_8}[num_arguments]
    definition.__name__ = name
    return intrinsic(definition)


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
        token_bytes = b.mul(b.mul(num_groups, group_size), _I64(4))
        scale_stride = _stride_of_scales(b, row_stride, num_groups)
        sums = _accumulators(b, ROWS * num_tokens, _FLOATS)
        parts = _accumulators(b, ROWS, _FLOATS) if num_tokens == 1 else sums
        with cgutils.for_range(b, num_groups) as groups:
            scale_at = b.add(scales, b.mul(groups.index, _I64(4)))
            steps = [
                _splat(b, _load(b, _offset(b, scale_at, r, scale_stride), _FLOAT))
                for r in range(ROWS)
            ]
            begin = b.mul(groups.index, group_size)
            lines = b.udiv(group_size, _I64(LINE))
            _prefetch(b, b.add(weights, begin), lines, row_stride, limit)
            if num_tokens == 1:
                for part in parts:
                    b.store(ir.Constant(_FLOATS, [0.0] * LANES), part)
            with cgutils.for_range(b, b.udiv(group_size, _I64(LANES))) as loop:
                k = b.add(begin, b.mul(loop.index, _I64(LANES)))
                x_at, weights_at = b.add(x, b.mul(k, _I64(4))), b.add(weights, k)
                tokens = [
                    _load(b, _offset(b, x_at, m, token_bytes), _FLOATS) for m in range(num_tokens)
                ]
                for r in range(ROWS):
                    row = _weights(b, _offset(b, weights_at, r, row_stride))
                    if num_tokens > 1:
                        row = b.fmul(row, steps[r])
                    for m, token in enumerate(tokens):
                        cell = parts[r * num_tokens + m]
                        b.store(_multiply_add(b, row, token, b.load(cell)), cell)
            if num_tokens == 1:
                for part, step, cell in zip(parts, steps, sums, strict=True):
                    b.store(_multiply_add(b, b.load(part), step, b.load(cell)), cell)
        _store_sums(b, sums, out)

    return _tile(f"float_tile_{num_tokens}", 8, generate)


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
        digits = b.add(record, b.mul(num_blocks, _I64(4 * LANES * num_parts)))
        steps = _offset(b, digits, num_parts, columns)
        sums = _accumulators(b, ROWS, _FLOATS)
        cells = [_accumulators(b, num_parts, _INTS) for _ in range(ROWS)]
        with cgutils.for_range(b, num_blocks) as blocks:
            starts_at = b.add(record, b.mul(blocks.index, _I64(4 * LANES * num_parts)))
            for part in range(num_parts):
                start = _load(b, b.add(starts_at, _I64(4 * LANES * part)), _INTS)
                for row in cells:
                    b.store(start, row[part])
            begin = b.mul(blocks.index, block)
            with cgutils.for_range(b, b.udiv(block, _I64(LINE))) as lines:
                k = b.add(begin, b.mul(lines.index, _I64(LINE)))
                x = [
                    _load(b, _offset(b, b.add(digits, k), part, columns), _BYTES64)
                    for part in range(num_parts)
                ]
                at = b.add(weights, k)
                _prefetch(b, at, _I64(1), row_stride, limit)
                for r, row in enumerate(cells):
                    packed = _load(b, _offset(b, at, r, row_stride), _BYTES64)
                    for part, cell in zip(x, row, strict=True):
                        b.store(_dot_bytes(features, b, b.load(cell), packed, part), cell)
            at_block = b.mul(blocks.index, _I64(4))
            step = _splat(b, _load(b, b.add(steps, at_block), _FLOAT))
            for r, row in enumerate(cells):
                scale_at = b.add(_offset(b, scales, r, scale_stride), at_block)
                factor = _splat(b, _load(b, scale_at, _FLOAT))
                total = b.fmul(_join_digits(b, [b.load(cell) for cell in row]), step)
                b.store(_multiply_add(b, total, factor, b.load(sums[r])), sums[r])
        _store_sums(b, sums, out)

    return _tile(f"digit_tile_{num_parts}", 8, generate)


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
        most = _splat(b, ir.Constant(_FLOAT, float(largest_number)))
        least = b.fneg(most)
        largest_at = cgutils.alloca_once_value(b, ir.Constant(_FLOATS, [0.0] * LANES))
        with cgutils.for_range(b, b.udiv(block, _I64(LANES))) as loop:
            values = _load(b, b.add(x, b.mul(loop.index, _I64(4 * LANES))), _FLOATS)
            values = _call(b, f"llvm.fabs.v{LANES}f32", _FLOATS, values)
            found = _call(b, f"llvm.maximum.v{LANES}f32", _FLOATS, b.load(largest_at), values)
            b.store(found, largest_at)
        name = f"llvm.vector.reduce.fmaximum.v{LANES}f32"
        largest = _call(b, name, _FLOAT, b.load(largest_at))
        number = ir.Constant(_FLOAT, float(largest_number))
        usable = b.fcmp_ordered(">", largest, ir.Constant(_FLOAT, SMALLEST))
        zero = ir.Constant(_FLOAT, 0.0)
        inverse = _splat(b, b.select(usable, b.fdiv(number, largest), zero))
        b.store(b.fdiv(largest, number), _pointer(b, step, _FLOAT), align=4)
        with cgutils.for_range(b, b.udiv(block, _I64(LANES))) as loop:
            k = b.mul(loop.index, _I64(LANES))
            value = b.fmul(_load(b, b.add(x, b.mul(k, _I64(4))), _FLOATS), inverse)
            value = _call(b, f"llvm.rint.v{LANES}f32", _FLOATS, value)
            value = _call(b, f"llvm.maxnum.v{LANES}f32", _FLOATS, value, least)
            value = _call(b, f"llvm.minnum.v{LANES}f32", _FLOATS, value, most)
            rest = b.fptosi(value, _INTS)
            for part in range(num_parts):
                digit = b.trunc(rest, _BYTES16)
                to = b.add(_offset(b, digits, part, digits_stride), k)
                b.store(digit, _pointer(b, to, _BYTES16), align=1)
                rest = b.ashr(b.sub(rest, b.sext(digit, _INTS)), _constant(8))
        offsets = ir.Constant(_BYTES64, [OFFSET - 256] * LINE)
        for part in range(num_parts):
            total = cgutils.alloca_once_value(b, _constant(0))
            b.store(_constant(0), total)
            with cgutils.for_range(b, b.udiv(block, _I64(LINE))) as loop:
                at = b.add(_offset(b, digits, part, digits_stride), b.mul(loop.index, _I64(LINE)))
                product = _dot_bytes(features, b, b.load(total), offsets, _load(b, at, _BYTES64))
                b.store(product, total)
            to = _pointer(b, b.add(starts, _I64(4 * LANES * part)), _INTS)
            b.store(b.sub(_constant(0), b.load(total)), to, align=4)

    return _tile(f"round_block_{num_parts}", 6, generate)


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
        columns, group_bytes = b.mul(num_groups, group_size), b.mul(num_groups, _I64(4))
        x_stride = _part_bytes(b, columns, num_groups)
        steps_at = b.add(x, columns)
        starts_at = b.add(steps_at, group_bytes)
        pairs = [(m, v) for m in range(num_tokens) for v in range(BLOCK_ROWS // LANES)]
        sums = _accumulators(b, len(pairs), _FLOATS)
        parts = _accumulators(b, len(pairs), _INTS)
        with cgutils.for_range(b, num_groups) as groups:
            at_group = b.mul(groups.index, _I64(4))
            for (m, _), cell in zip(pairs, parts, strict=True):
                start = _load(b, b.add(_offset(b, starts_at, m, x_stride), at_group), _I32)
                b.store(_splat_int(b, start), cell)
            begin = b.mul(groups.index, group_size)
            with cgutils.for_range(b, b.udiv(group_size, _I64(4))) as loop:
                k = b.add(begin, b.mul(loop.index, _I64(4)))
                rows_at = b.add(weights, b.mul(k, _I64(BLOCK_ROWS)))
                rows = [
                    _load(b, b.add(rows_at, _I64(4 * LANES * v)), _BYTES64)
                    for v in range(BLOCK_ROWS // LANES)
                ]
                tokens = [
                    _splat_int(b, _load(b, _offset(b, b.add(x, k), m, x_stride), _I32))
                    for m in range(num_tokens)
                ]
                for (m, v), cell in zip(pairs, parts, strict=True):
                    token = b.bitcast(tokens[m], _BYTES64)
                    b.store(_dot_bytes(features, b, b.load(cell), rows[v], token), cell)
            scales_at = b.add(scales, b.mul(at_group, _I64(BLOCK_ROWS)))
            for (m, v), part, cell in zip(pairs, parts, sums, strict=True):
                scale = _load(b, b.add(scales_at, _I64(4 * LANES * v)), _FLOATS)
                step = _load(b, b.add(_offset(b, steps_at, m, x_stride), at_group), _FLOAT)
                factor = b.fmul(scale, _splat(b, step))
                product = b.sitofp(b.load(part), _FLOATS)
                b.store(_multiply_add(b, product, factor, b.load(cell)), cell)
        for (m, v), cell in zip(pairs, sums, strict=True):
            address = b.add(_offset(b, out, m, out_stride), _I64(4 * LANES * v))
            b.store(b.load(cell), _pointer(b, address, _FLOATS), align=4)

    return _tile(f"int8_block_{num_tokens}", 7, generate)


def matrix_block(kind: str) -> Any:
    """32 rows of weights, interleaved, times 32 records by a CPU's matrix unit (AMX).

    Four tiles of 16 by 16 sums; a line of 16 records, as they lie, meets 16 rows, four bytes of
    each in a line. While the unit multiplies a group, the one before it is scaled and added. Kinds:

        bytes     records and arguments as of `int8_block`
        pairs     two records are a token, its low and its high digit, and 16 tokens come out: 255
                  127 256 sums of bytes, 256 times, and as many again still fit an int32
        bfloat16  a record is a token in bfloat16 as it is, packed is [K/2, 32, 2] in bfloat16,
                  where every weight is exact
    """
    size, parts = MATRIX_RECORDS * BLOCK_ROWS, 2 if kind == "pairs" else 1
    tokens = MATRIX_RECORDS // parts
    column_bytes = _I64(2 if kind == "bfloat16" else 1)

    def generate(
        _features: Any,
        b: Any,
        x: Any,
        weights: Any,
        scales: Any,
        num_groups: Any,
        group_size: Any,
        out: Any,
        out_stride: Any,
    ) -> None:
        group = b.mul(group_size, column_bytes)
        columns, group_bytes = b.mul(num_groups, group), b.mul(num_groups, _I64(4))
        x_stride = columns if kind == "bfloat16" else _part_bytes(b, columns, num_groups)
        both = b.ptrtoint(cgutils.alloca_once(b, _I32, 2 * size), _I64)
        _configure_tiles(b)
        with cgutils.for_range(b, _I64(tokens)) as loop:
            for v in range(BLOCK_ROWS // LANES):
                row = b.add(_offset(b, out, loop.index, out_stride), _I64(4 * LANES * v))
                b.store(ir.Constant(_FLOATS, [0.0] * LANES), _pointer(b, row, _FLOATS), align=4)
        with cgutils.for_range(b, b.add(num_groups, _I64(1))) as groups:
            turn = b.mul(b.and_(groups.index, _I64(1)), _I64(4 * size))
            here, other = b.add(both, turn), b.add(both, b.sub(_I64(4 * size), turn))
            with b.if_then(b.icmp_signed("<", groups.index, num_groups)):
                begin = b.mul(groups.index, group)
                product = "tdpbf16ps" if kind == "bfloat16" else "tdpbsud"
                _multiply_tiles(b, product, x, x_stride, weights, begin, group, here)
            with b.if_then(b.icmp_signed(">", groups.index, _I64(0))):
                at_group = b.mul(b.sub(groups.index, _I64(1)), _I64(4))
                scales_at = b.add(scales, b.mul(at_group, _I64(BLOCK_ROWS)))
                of_rows = [
                    _load(b, b.add(scales_at, _I64(4 * LANES * v)), _FLOATS)
                    for v in range(BLOCK_ROWS // LANES)
                ]
                with cgutils.for_range(b, _I64(tokens // UNROLLED)) as loop:
                    for i in range(UNROLLED):
                        token = b.add(b.mul(loop.index, _I64(UNROLLED)), _I64(i))
                        record = b.mul(token, _I64(parts))
                        sums = _offset(b, other, record, _I64(4 * BLOCK_ROWS))
                        to = _offset(b, out, token, out_stride)
                        if kind == "bfloat16":
                            _add_floats(b, sums, of_rows, to)
                            continue
                        ends = b.add(_offset(b, x, record, x_stride), b.add(columns, at_group))
                        join = kind == "pairs"
                        _add_record(b, join, ends, group_bytes, x_stride, sums, of_rows, to)
        _tile_call(b, "tilerelease")

    return _tile(f"matrix_block_{kind}", 7, generate)


def _multiply_tiles(
    builder: Any,
    product: str,
    x: Any,
    x_stride: Any,
    weights: Any,
    begin: Any,
    group: Any,
    sums: Any,
) -> None:
    """sums [32, 32] of a group: the bytes [begin, begin + group) of each record."""
    tiles = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for c in range(len(tiles)):
        _tile_call(builder, "tilezero", _I8(c))
    with cgutils.for_range(builder, builder.udiv(group, _I64(LINE))) as loop:
        k = builder.add(begin, builder.mul(loop.index, _I64(LINE)))
        rows_at = builder.add(weights, builder.mul(k, _I64(BLOCK_ROWS)))
        for half in range(2):
            records = _offset(builder, builder.add(x, k), LANES * half, x_stride)
            _load_tile(builder, 4 + half, records, x_stride)
            rows = builder.add(rows_at, _I64(LINE * half))
            _load_tile(builder, 6 + half, rows, _I64(4 * BLOCK_ROWS))
        for c, (m, n) in enumerate(tiles):
            _tile_call(builder, product, _I8(c), _I8(4 + m), _I8(6 + n))
    for c, (m, n) in enumerate(tiles):
        at = builder.add(sums, _I64(4 * (LANES * BLOCK_ROWS * m + LANES * n)))
        to = builder.inttoptr(at, _I8.as_pointer())
        _tile_call(builder, "tilestored64", _I8(c), to, _I64(4 * BLOCK_ROWS))


def _add_floats(b: Any, sums: Any, scales: Any, to: Any) -> None:
    """Add a group's float sums of one token to its row."""
    for v, of_rows in enumerate(scales):
        lane = _I64(4 * LANES * v)
        cell = _pointer(b, b.add(to, lane), _FLOATS)
        part = _load(b, b.add(sums, lane), _FLOATS)
        b.store(_multiply_add(b, part, of_rows, b.load(cell, align=4)), cell, align=4)


def _add_record(
    b: Any, join: bool, ends: Any, group_bytes: Any, x_stride: Any, sums: Any, scales: Any, to: Any
) -> None:
    """Add a group's sums of a token to its row; `ends` are its step and, further on, its start."""
    step = _splat(b, _load(b, ends, _FLOAT))
    start_at = b.add(ends, group_bytes)
    start = _load(b, start_at, _I32)
    if join:
        high = _load(b, b.add(start_at, x_stride), _I32)
        start = b.add(start, b.shl(high, _I32(8)))
    start = _splat_int(b, start)
    for v, of_rows in enumerate(scales):
        lane = _I64(4 * LANES * v)
        total = b.add(_load(b, b.add(sums, lane), _INTS), start)
        if join:
            high = _load(b, b.add(b.add(sums, lane), _I64(4 * BLOCK_ROWS)), _INTS)
            total = b.add(total, b.shl(high, _constant(8)))
        cell = _pointer(b, b.add(to, lane), _FLOATS)
        product, factor = b.sitofp(total, _FLOATS), b.fmul(of_rows, step)
        b.store(_multiply_add(b, product, factor, b.load(cell, align=4)), cell, align=4)


def half_rows(dtype: str) -> Any:
    """Write float32 [tokens, 32] as bfloat16 or float16, rounded half to even.

    The Numba function takes the addresses of what to read and where to write, the bytes between
    tokens of either, and the number of tokens.
    """

    def generate(
        _features: Any, b: Any, values: Any, out: Any, stride: Any, out_stride: Any, tokens: Any
    ) -> None:
        with cgutils.for_range(b, tokens) as loop:
            of_token = _offset(b, values, loop.index, stride)
            to_token = _offset(b, out, loop.index, out_stride)
            for v in range(BLOCK_ROWS // LANES):
                value = _load(b, b.add(of_token, _I64(4 * LANES * v)), _FLOATS)
                to = b.add(to_token, _I64(2 * LANES * v))
                half = b.fptrunc(value, _HALVES) if dtype == "float16" else _bfloat16(b, value)
                b.store(half, _pointer(b, to, half.type), align=2)

    return _tile(f"{dtype}_rows", 5, generate)


def _bfloat16(builder: Any, value: Any) -> Any:
    """Floats as the bits of bfloat16, NaN as NaN."""
    bits = builder.bitcast(value, _INTS)
    even = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
    rounded = builder.add(builder.add(bits, _constant(0x7FFF)), even)
    quiet = builder.or_(bits, _constant(0x400000))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(bits, _constant(16)), _SHORTS)


def spread_row() -> Any:
    """A row of packed weights as bfloat16 numbers q, two of 32 rows in a line: [K/2, 32, 2].

    The Numba function takes the addresses of the row and of its first pair, and K, a multiple of
    16.
    """

    def generate(_features: Any, b: Any, weights: Any, to: Any, columns: Any) -> None:
        pairs = ir.VectorType(_I32, LANES // 2)
        with cgutils.for_range(b, b.udiv(columns, _I64(LANES))) as loop:
            k = b.mul(loop.index, _I64(LANES))
            bits = b.bitcast(_weights(b, b.add(weights, k)), _INTS)
            halves = b.bitcast(b.trunc(b.lshr(bits, _constant(16)), _SHORTS), pairs)
            at = b.add(to, b.mul(k, _I64(2 * BLOCK_ROWS)))
            for i in range(LANES // 2):
                cell = _pointer(b, b.add(at, _I64(4 * BLOCK_ROWS * i)), _I32)
                b.store(b.extract_element(halves, _I32(i)), cell, align=4)

    return _tile("spread_row", 3, generate)


def _configure_tiles(builder: Any) -> None:
    """All eight tile registers as 16 lines of 64 bytes."""
    config = [1, *[0] * 15, *[LINE, 0] * 8, *[0] * 16, *[LANES] * 8, *[0] * 8]
    cell = cgutils.alloca_once_value(builder, ir.Constant(_BYTES64, config))
    _tile_call(builder, "ldtilecfg", builder.bitcast(cell, _I8.as_pointer()))


def _tile_call(builder: Any, name: str, *values: Any) -> None:
    _call(builder, f"llvm.x86.{name}", ir.VoidType(), *values)


def _load_tile(builder: Any, tile: int, address: Any, stride: Any) -> None:
    pointer = builder.inttoptr(address, _I8.as_pointer())
    _tile_call(builder, "tileloadd64", _I8(tile), pointer, stride)


def _part_bytes(builder: Any, columns: Any, num_groups: Any) -> Any:
    """Bytes of a record: digits, steps and starts, in whole lines (cpu_loops.part_bytes)."""
    used = builder.add(columns, builder.mul(num_groups, _I64(8)))
    return builder.and_(builder.add(used, _I64(LINE - 1)), _I64(-LINE))


def _pointer(builder: Any, address: Any, machine_type: Any) -> Any:
    return builder.inttoptr(address, machine_type.as_pointer())


def _load(builder: Any, address: Any, machine_type: Any) -> Any:
    return builder.load(_pointer(builder, address, machine_type), align=1)


def _offset(builder: Any, base: Any, index: Any, stride: Any) -> Any:
    index = _I64(index) if isinstance(index, int) else index
    return builder.add(base, builder.mul(index, stride))


def _call(builder: Any, name: str, result: Any, *values: Any, **flags: Any) -> Any:
    """Call LLVM's intrinsic `name`."""
    signature = ir.FunctionType(result, [value.type for value in values])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, signature, name), values, **flags
    )


def _constant(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, _constant(0))


def _weights(builder: Any, address: Any) -> Any:
    """16 packed bytes q + 128 as the float32 numbers q."""
    packed = _load(builder, address, _BYTES16)
    return builder.sitofp(builder.sub(builder.zext(packed, _INTS), _constant(OFFSET)), _FLOATS)


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, x, y, z)


def _accumulators(builder: Any, count: int, machine_type: Any) -> list[Any]:
    zero = ir.Constant(machine_type, [0] * LANES)
    return [cgutils.alloca_once_value(builder, zero) for _ in range(count)]


def _join_digits(builder: Any, sums: list[Any]) -> Any:
    """Sums of products with one to three digits as one float vector; two fit an int32."""
    joined = sums[0]
    if len(sums) > 1:
        joined = builder.add(joined, builder.shl(sums[1], _constant(8)))
    total = builder.sitofp(joined, _FLOATS)
    if len(sums) > 2:
        weight = ir.Constant(_FLOATS, [65536.0] * LANES)
        total = _multiply_add(builder, builder.sitofp(sums[2], _FLOATS), weight, total)
    return total


def _stride_of_scales(builder: Any, row_stride: Any, num_groups: Any) -> Any:
    """Bytes between the scales of two rows; 0 where the rows are one."""
    same = builder.icmp_signed("==", row_stride, _I64(0))
    return builder.select(same, _I64(0), builder.mul(num_groups, _I64(4)))


def _prefetch(builder: Any, at: Any, lines: Any, row_stride: Any, limit: Any) -> None:
    """Ask for lines of the next four rows: four streams are too many for a CPU to guess."""
    with cgutils.for_range(builder, lines) as loop:
        ahead = builder.add(builder.mul(row_stride, _I64(ROWS)), at)
        first = builder.add(ahead, builder.mul(loop.index, _I64(LINE)))
        for r in range(ROWS):
            wanted = _offset(builder, first, r, row_stride)
            near = builder.icmp_unsigned("<", wanted, limit)
            address = _pointer(builder, builder.select(near, wanted, limit), _I8)
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), address, _I32(0), _I32(3), _I32(1))


def _store_sums(builder: Any, sums: list[Any], out: Any) -> None:
    """Write the sums of the vectors' lanes one after the other."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    zero = ir.Constant(_FLOAT, 0.0)
    for i, cell in enumerate(sums):
        total = _call(builder, name, _FLOAT, zero, builder.load(cell), fastmath=("reassoc",))
        to = _pointer(builder, builder.add(out, _I64(4 * i)), _FLOAT)
        builder.store(total, to, align=4)


def _splat_int(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_INTS, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, _constant(0))


def _dot_bytes(features: Any, builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Lane j of `sums` plus four products of bytes 4 j .. 4 j + 3, unsigned times signed."""
    if "+avx512vnni" in features:
        quads = (builder.bitcast(v, _INTS) for v in (unsigned, signed))
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, sums, *quads)
    products = builder.mul(builder.zext(unsigned, _INTS64), builder.sext(signed, _INTS64))
    for part in range(4):
        lanes = ir.Constant(_INTS, [4 * lane + part for lane in range(LANES)])
        sums = builder.add(sums, builder.shuffle_vector(products, products, lanes))
    return sums
