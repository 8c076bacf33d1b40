"""Products of many tokens by a CPU's matrix unit (Intel's AMX), as LLVM.

The unit has eight registers of 16 lines of 64 bytes. A product of two adds, for each pair of a line
of the first and a column of the second, the sum over 64 bytes: bytes four at a time, bfloat16 two.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from halfweight.kernels.cpu.dot_tiles import BLOCK_ROWS
from halfweight.kernels.cpu.llvm_vectors import (
    BYTES64,
    FLOAT,
    FLOATS,
    HALVES,
    I8,
    I32,
    I64,
    INTS,
    LANES,
    LINE,
    SHORTS,
    call,
    constant,
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

MATRIX_RECORDS = 32
"""Rounded tokens that meet 32 rows at once in a matrix unit."""
UNROLLED = 4
"""Tokens whose sums are added without a jump."""


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
    column_bytes = I64(2 if kind == "bfloat16" else 1)

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
        columns, group_bytes = b.mul(num_groups, group), b.mul(num_groups, I64(4))
        x_stride = columns if kind == "bfloat16" else record_stride(b, columns, num_groups)
        both = b.ptrtoint(cgutils.alloca_once(b, I32, 2 * size), I64)
        configure_tiles(b)
        with cgutils.for_range(b, I64(tokens)) as loop:
            for v in range(BLOCK_ROWS // LANES):
                row = b.add(offset(b, out, loop.index, out_stride), I64(4 * LANES * v))
                b.store(ir.Constant(FLOATS, [0.0] * LANES), pointer(b, row, FLOATS), align=4)
        with cgutils.for_range(b, b.add(num_groups, I64(1))) as groups:
            turn = b.mul(b.and_(groups.index, I64(1)), I64(4 * size))
            here, other = b.add(both, turn), b.add(both, b.sub(I64(4 * size), turn))
            with b.if_then(b.icmp_signed("<", groups.index, num_groups)):
                begin = b.mul(groups.index, group)
                product = "tdpbf16ps" if kind == "bfloat16" else "tdpbsud"
                _multiply_tiles(b, product, x, x_stride, weights, begin, group, here)
            with b.if_then(b.icmp_signed(">", groups.index, I64(0))):
                at_group = b.mul(b.sub(groups.index, I64(1)), I64(4))
                scales_at = b.add(scales, b.mul(at_group, I64(BLOCK_ROWS)))
                of_rows = [
                    load(b, b.add(scales_at, I64(4 * LANES * v)), FLOATS)
                    for v in range(BLOCK_ROWS // LANES)
                ]
                with cgutils.for_range(b, I64(tokens // UNROLLED)) as loop:
                    for i in range(UNROLLED):
                        token = b.add(b.mul(loop.index, I64(UNROLLED)), I64(i))
                        record = b.mul(token, I64(parts))
                        sums = offset(b, other, record, I64(4 * BLOCK_ROWS))
                        to = offset(b, out, token, out_stride)
                        if kind == "bfloat16":
                            _add_floats(b, sums, of_rows, to)
                            continue
                        ends = b.add(offset(b, x, record, x_stride), b.add(columns, at_group))
                        join = kind == "pairs"
                        _add_record(b, join, ends, group_bytes, x_stride, sums, of_rows, to)
        tile_call(b, "tilerelease")

    return vector_function(f"matrix_block_{kind}", 7, generate)


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
        tile_call(builder, "tilezero", I8(c))
    with cgutils.for_range(builder, builder.udiv(group, I64(LINE))) as loop:
        k = builder.add(begin, builder.mul(loop.index, I64(LINE)))
        rows_at = builder.add(weights, builder.mul(k, I64(BLOCK_ROWS)))
        for half in range(2):
            records = offset(builder, builder.add(x, k), LANES * half, x_stride)
            load_tile(builder, 4 + half, records, x_stride)
            rows = builder.add(rows_at, I64(LINE * half))
            load_tile(builder, 6 + half, rows, I64(4 * BLOCK_ROWS))
        for c, (m, n) in enumerate(tiles):
            tile_call(builder, product, I8(c), I8(4 + m), I8(6 + n))
    for c, (m, n) in enumerate(tiles):
        at = builder.add(sums, I64(4 * (LANES * BLOCK_ROWS * m + LANES * n)))
        to = builder.inttoptr(at, I8.as_pointer())
        tile_call(builder, "tilestored64", I8(c), to, I64(4 * BLOCK_ROWS))


def _add_floats(b: Any, sums: Any, scales: Any, to: Any) -> None:
    """Add a group's float sums of one token to its row."""
    for v, of_rows in enumerate(scales):
        lane = I64(4 * LANES * v)
        cell = pointer(b, b.add(to, lane), FLOATS)
        part = load(b, b.add(sums, lane), FLOATS)
        b.store(multiply_add(b, part, of_rows, b.load(cell, align=4)), cell, align=4)


def _add_record(
    b: Any, join: bool, ends: Any, group_bytes: Any, x_stride: Any, sums: Any, scales: Any, to: Any
) -> None:
    """Add a group's sums of a token to its row; `ends` are its step and, further on, its start."""
    step = splat(b, load(b, ends, FLOAT))
    start_at = b.add(ends, group_bytes)
    start = load(b, start_at, I32)
    if join:
        high = load(b, b.add(start_at, x_stride), I32)
        start = b.add(start, b.shl(high, I32(8)))
    start = splat_int(b, start)
    for v, of_rows in enumerate(scales):
        lane = I64(4 * LANES * v)
        total = b.add(load(b, b.add(sums, lane), INTS), start)
        if join:
            high = load(b, b.add(b.add(sums, lane), I64(4 * BLOCK_ROWS)), INTS)
            total = b.add(total, b.shl(high, constant(8)))
        cell = pointer(b, b.add(to, lane), FLOATS)
        product, factor = b.sitofp(total, FLOATS), b.fmul(of_rows, step)
        b.store(multiply_add(b, product, factor, b.load(cell, align=4)), cell, align=4)


def half_rows(dtype: str) -> Any:
    """Write float32 [tokens, 32] as bfloat16 or float16, rounded half to even.

    The Numba function takes the addresses of what to read and where to write, the bytes between
    tokens of either, and the number of tokens.
    """

    def generate(
        _features: Any, b: Any, values: Any, out: Any, stride: Any, out_stride: Any, tokens: Any
    ) -> None:
        with cgutils.for_range(b, tokens) as loop:
            of_token = offset(b, values, loop.index, stride)
            to_token = offset(b, out, loop.index, out_stride)
            for v in range(BLOCK_ROWS // LANES):
                value = load(b, b.add(of_token, I64(4 * LANES * v)), FLOATS)
                to = b.add(to_token, I64(2 * LANES * v))
                half = b.fptrunc(value, HALVES) if dtype == "float16" else _bfloat16(b, value)
                b.store(half, pointer(b, to, half.type), align=2)

    return vector_function(f"{dtype}_rows", 5, generate)


def _bfloat16(builder: Any, value: Any) -> Any:
    """Floats as the bits of bfloat16, NaN as NaN."""
    bits = builder.bitcast(value, INTS)
    even = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(builder.add(bits, constant(0x7FFF)), even)
    quiet = builder.or_(bits, constant(0x400000))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(bits, constant(16)), SHORTS)


def spread_row() -> Any:
    """A row of packed weights as bfloat16 numbers q, two of 32 rows in a line: [K/2, 32, 2].

    The Numba function takes the addresses of the row and of its first pair, and K, a multiple of
    16.
    """

    def generate(_features: Any, b: Any, weights: Any, to: Any, columns: Any) -> None:
        pairs = ir.VectorType(I32, LANES // 2)
        with cgutils.for_range(b, b.udiv(columns, I64(LANES))) as loop:
            k = b.mul(loop.index, I64(LANES))
            bits = b.bitcast(signed_weights(b, b.add(weights, k)), INTS)
            halves = b.bitcast(b.trunc(b.lshr(bits, constant(16)), SHORTS), pairs)
            at = b.add(to, b.mul(k, I64(2 * BLOCK_ROWS)))
            for i in range(LANES // 2):
                cell = pointer(b, b.add(at, I64(4 * BLOCK_ROWS * i)), I32)
                b.store(b.extract_element(halves, I32(i)), cell, align=4)

    return vector_function("spread_row", 3, generate)


def configure_tiles(builder: Any) -> None:
    """All eight tile registers as 16 lines of 64 bytes."""
    config = [1, *[0] * 15, *[LINE, 0] * 8, *[0] * 16, *[LANES] * 8, *[0] * 8]
    cell = cgutils.alloca_once_value(builder, ir.Constant(BYTES64, config))
    tile_call(builder, "ldtilecfg", builder.bitcast(cell, I8.as_pointer()))


def tile_call(builder: Any, name: str, *values: Any) -> None:
    """One of the matrix unit's instructions."""
    call(builder, f"llvm.x86.{name}", ir.VoidType(), *values)


def load_tile(builder: Any, tile: int, address: Any, stride: Any) -> None:
    """Fill a tile register with 16 lines, `stride` bytes apart."""
    where = builder.inttoptr(address, I8.as_pointer())
    tile_call(builder, "tileloadd64", I8(tile), where, stride)
