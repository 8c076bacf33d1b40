"""The CPU's products of many tokens: each byte of the weight is shared among all of them.

Rows of the weight are interleaved by 32, so that a lane is a row. With a matrix unit 32 rows meet
32 records at once, else 6. A record is a token rounded to int8, or one digit of it; bfloat16
activations go to a matrix unit as they are.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, int32, int64

from halfweight.kernels.cpu.decode_products import (
    BFLOAT16,
    BIAS,
    FLOAT32,
    GROUP,
    IN,
    OUT,
    PACKED,
    PARTS,
    TICKET,
    TOKENS,
    X_FORMAT,
    X,
    Y,
    float_tokens,
    own_memory,
    round_part,
    row_power,
    row_scales,
    step_block,
    store_number,
    whole_lines,
)
from halfweight.kernels.cpu.dot_tiles import BLOCK_ROWS, int8_block
from halfweight.kernels.cpu.llvm import (
    address_of,
    cell,
    fetch_add,
    inline,
    load,
    pointer_to,
    store,
    store_int,
)
from halfweight.kernels.cpu.llvm_vectors import LANES
from halfweight.kernels.cpu.matrix_unit import MATRIX_RECORDS, half_rows, matrix_block, spread_row

BLOCK_TOKENS = 6
"""Records that meet 32 rows at once: a multiple of 1, 2 and 3 parts."""
block_6 = int8_block(BLOCK_TOKENS)
block_32, block_pairs = matrix_block("bytes"), matrix_block("pairs")
block_bfloat16 = matrix_block("bfloat16")
spread = spread_row()
bfloat16_rows, float16_rows = half_rows("bfloat16"), half_rows("float16")


@inline
def part_bytes(columns: Any, blocks: Any) -> Any:
    """Bytes of a token's part for prefill: digits, steps and starts, in whole lines."""
    return whole_lines(columns + 8 * blocks)


@inline
def write_parts(x: Any, columns: Any, block: Any, parts: Any, record: Any, starts: Any) -> None:
    """Round x float32 [K] to a record a part, as `int8_block` reads them; scratch [parts, 16]."""
    blocks = columns // block
    stride = part_bytes(columns, blocks)
    for b in range(blocks):
        step = record + columns + 4 * b
        round_part(x + 4 * b * block, record + b * block, stride, starts, step, block, parts)
        factor = load(step, float32)
        for part in range(parts):
            store(step + part * stride, factor)
            start = int32(0)
            for lane in range(LANES):
                start += load(starts + 4 * (LANES * part + lane), int32)
            store_int(step + part * stride + 4 * blocks, start)
            factor *= float32(256)


def round_tokens(pointer: Any) -> None:
    """Kernel: x [M, K] to records at Y; threads take tokens by ticket."""
    arguments = address_of(pointer)
    columns, block = cell(arguments, IN), step_block(cell(arguments, GROUP))
    parts = cell(arguments, PARTS)
    x = own_memory(arguments)
    records = parts * part_bytes(columns, columns // block)
    while True:
        token = fetch_add(arguments + 8 * TICKET, 1)
        if token >= cell(arguments, TOKENS):
            break
        float_tokens(arguments, token, 1, x)
        to = cell(arguments, Y) + token * records
        write_parts(x, columns, block, parts, to, x + 4 * columns)


@inline
def interleave_rows(linear: Any, row: Any, rows: Any, block: Any, to: Any, own: Any) -> None:
    """Write 32 rows as packed [K/4, 32, 4], scales float32 [K/block, 32] behind them.

    `own` has room for a row's scales.
    """
    columns = cell(linear, IN)
    weights = cell(linear, PACKED) + row * columns
    for r in range(rows):
        for k in range(0, columns, 4):
            store_int(to + BLOCK_ROWS * k + 4 * r, load(weights + r * columns + k, int32))
    interleave_scales(linear, row, rows, block, to + BLOCK_ROWS * columns, own)


@inline
def spread_rows(linear: Any, row: Any, rows: Any, block: Any, to: Any, own: Any) -> None:
    """`interleave_rows` as numbers q in bfloat16 [K/2, 32, 2]."""
    columns = cell(linear, IN)
    weights = cell(linear, PACKED) + row * columns
    for r in range(rows):
        spread(weights + r * columns, to + 4 * r, columns)
    interleave_scales(linear, row, rows, block, to + 2 * BLOCK_ROWS * columns, own)


@inline
def interleave_scales(linear: Any, row: Any, rows: Any, block: Any, scales: Any, own: Any) -> None:
    """Write scales float32 [K/block, 32], zeros past `rows`, whose weights are then anything."""
    blocks = cell(linear, IN) // block
    for r in range(BLOCK_ROWS):
        if r < rows:
            row_scales(linear, row + r, 1, block, own)
        power = row_power(linear, row + r) if r < rows else float32(0)
        for b in range(blocks):
            scale = load(own + 4 * b, float32) * power if r < rows else float32(0)
            store(scales + 4 * (BLOCK_ROWS * b + r), scale)


@inline
def add_parts(linear: Any, row: Any, rows: Any, sums: Any, parts: Any) -> None:
    """Sums of one token [parts, 32] added into the first 32, and the bias."""
    bias = cell(linear, BIAS)
    values = carray(pointer_to(sums), parts * BLOCK_ROWS, float32)
    for part in range(1, parts):
        for r in range(BLOCK_ROWS):
            values[r] += values[part * BLOCK_ROWS + r]
    if bias:
        for r in range(rows):
            values[r] += load(bias + 4 * (row + r), float32)


def many_bytes(columns: int, block: int, num_blocks: int = 1, width: int = 1) -> int:
    """Bytes of memory that a thread needs for itself in the products of many tokens below.

    `num_blocks` of 32 rows are interleaved at a time, `width` bytes a weight: 2 as bfloat16.
    """
    steps = columns // block
    sums = 4 * BLOCK_ROWS * MATRIX_RECORDS
    return sums + num_blocks * int(rows_bytes.py_func(width * columns, steps)) + 4 * steps


@inline
def rows_bytes(columns: Any, blocks: Any) -> Any:
    """Bytes of 32 rows that are interleaved, and of their scales."""
    return BLOCK_ROWS * (columns + 4 * blocks)


@inline
def write_tokens(
    arguments: Any, row: Any, rows: Any, first: Any, tokens: Any, parts: Any, sums: Any
) -> None:
    """y[first : first + tokens, row : row + rows] from sums [tokens, parts, 32]."""
    y_format, out_features = cell(arguments, X_FORMAT), cell(arguments, OUT)
    stride = 4 * BLOCK_ROWS * parts
    if parts > 1 or cell(arguments, BIAS):
        for m in range(tokens):
            add_parts(arguments, row, rows, sums + stride * m, parts)
    if rows == BLOCK_ROWS and y_format != FLOAT32:
        at = cell(arguments, Y) + 2 * (first * out_features + row)
        if y_format == BFLOAT16:
            bfloat16_rows(sums, at, stride, 2 * out_features, tokens)
        else:
            float16_rows(sums, at, stride, 2 * out_features, tokens)
        return
    for m in range(tokens):
        for r in range(rows):
            value = load(sums + stride * m + 4 * r, float32)
            store_number(cell(arguments, Y), (first + m) * out_features + row + r, y_format, value)


def linear_many(pointer: Any) -> None:
    """Kernel: y [M, N] = tokens in parts at X times a linear; threads take 32 rows by ticket.

    At least BLOCK_TOKENS records: the last ones are computed again where they do not come out even.
    """
    arguments = address_of(pointer)
    columns, parts = cell(arguments, IN), cell(arguments, PARTS)
    block = step_block(cell(arguments, GROUP))
    blocks, tokens = columns // block, BLOCK_TOKENS // parts
    sums = own_memory(arguments)
    weights = sums + 4 * BLOCK_ROWS * MATRIX_RECORDS
    scales = weights + BLOCK_ROWS * columns
    while True:
        row = fetch_add(arguments + 8 * TICKET, BLOCK_ROWS)
        if row >= cell(arguments, OUT):
            break
        rows = min(int64(BLOCK_ROWS), cell(arguments, OUT) - row)
        own = weights + rows_bytes(columns, blocks)
        interleave_rows(arguments, row, rows, block, weights, own)
        for wanted in range(0, cell(arguments, TOKENS), tokens):
            first = min(wanted, cell(arguments, TOKENS) - tokens)
            x = cell(arguments, X) + first * parts * part_bytes(columns, blocks)
            block_6(x, weights, scales, blocks, block, sums, 4 * BLOCK_ROWS)
            write_tokens(arguments, row, rows, first, tokens, parts, sums)


@inline
def matrix_tokens(
    arguments: Any, row: Any, weights: Any, first: Any, tokens: Any, sums: Any
) -> None:
    """y[first : first + tokens] of 32 interleaved rows."""
    columns, parts = cell(arguments, IN), cell(arguments, PARTS)
    block = step_block(cell(arguments, GROUP))
    blocks = columns // block
    rows = min(int64(BLOCK_ROWS), cell(arguments, OUT) - row)
    scales = weights + BLOCK_ROWS * columns
    x = cell(arguments, X) + first * parts * part_bytes(columns, blocks)
    if parts == 2:
        block_pairs(x, weights, scales, blocks, block, sums, 4 * BLOCK_ROWS)
        write_tokens(arguments, row, rows, first, tokens, 1, sums)
    else:
        block_32(x, weights, scales, blocks, block, sums, 4 * BLOCK_ROWS)
        write_tokens(arguments, row, rows, first, tokens, parts, sums)


@inline
def blocks_at_once(columns: Any) -> Any:
    """Blocks of 32 rows that `linear_matrix` interleaves before it multiplies.

    Tokens that a cache does not hold are then read once for all of them; the rows themselves shall
    take no more than half of a usual L2 cache.
    """
    return max(int64(1), min(int64(4), columns // 1024, (1 << 20) // (BLOCK_ROWS * columns)))


def linear_matrix(pointer: Any) -> None:
    """Kernel: `linear_many` by a matrix unit; at least MATRIX_RECORDS records, and two to spare.

    Where three parts leave two of 32 records over, those are multiplied and forgotten.
    """
    arguments = address_of(pointer)
    columns, block = cell(arguments, IN), step_block(cell(arguments, GROUP))
    tokens = MATRIX_RECORDS // cell(arguments, PARTS)
    out_features, at_once = cell(arguments, OUT), blocks_at_once(columns)
    size = rows_bytes(columns, columns // block)
    sums = own_memory(arguments)
    weights = sums + 4 * BLOCK_ROWS * MATRIX_RECORDS
    own = weights + at_once * size
    while True:
        begin = fetch_add(arguments + 8 * TICKET, BLOCK_ROWS * at_once)
        if begin >= out_features:
            break
        end = min(begin + BLOCK_ROWS * at_once, out_features)
        for row in range(begin, end, BLOCK_ROWS):
            to = weights + (row - begin) // BLOCK_ROWS * size
            interleave_rows(arguments, row, min(int64(BLOCK_ROWS), end - row), block, to, own)
        for wanted in range(0, cell(arguments, TOKENS), tokens):
            first = min(wanted, cell(arguments, TOKENS) - tokens)
            for row in range(begin, end, BLOCK_ROWS):
                at = weights + (row - begin) // BLOCK_ROWS * size
                matrix_tokens(arguments, row, at, first, tokens, sums)


def linear_bfloat16(pointer: Any) -> None:
    """Kernel: y [M, N] = x bfloat16 [M, K] times a linear by a matrix unit; M at least 32.

    Groups of a multiple of 32. Nothing is rounded but sums: q is exact in bfloat16, and scales
    multiply the float32 sums of a group.
    """
    arguments = address_of(pointer)
    columns, group_size = cell(arguments, IN), cell(arguments, GROUP)
    groups, num_tokens = columns // group_size, cell(arguments, TOKENS)
    out_features, at_once = cell(arguments, OUT), blocks_at_once(2 * columns)
    size = rows_bytes(2 * columns, groups)
    sums = own_memory(arguments)
    weights = sums + 4 * BLOCK_ROWS * MATRIX_RECORDS
    own = weights + at_once * size
    while True:
        begin = fetch_add(arguments + 8 * TICKET, BLOCK_ROWS * at_once)
        if begin >= out_features:
            break
        end = min(begin + BLOCK_ROWS * at_once, out_features)
        for row in range(begin, end, BLOCK_ROWS):
            to = weights + (row - begin) // BLOCK_ROWS * size
            spread_rows(arguments, row, min(int64(BLOCK_ROWS), end - row), group_size, to, own)
        for wanted in range(0, num_tokens, MATRIX_RECORDS):
            first = min(wanted, num_tokens - MATRIX_RECORDS)
            x = cell(arguments, X) + 2 * first * columns
            for row in range(begin, end, BLOCK_ROWS):
                at = weights + (row - begin) // BLOCK_ROWS * size
                scales = at + 2 * BLOCK_ROWS * columns
                block_bfloat16(x, at, scales, groups, group_size, sums, 4 * BLOCK_ROWS)
                rows = min(int64(BLOCK_ROWS), end - row)
                write_tokens(arguments, row, rows, first, MATRIX_RECORDS, 1, sums)
