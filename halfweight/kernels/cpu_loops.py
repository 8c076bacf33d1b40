"""The CPU's products: a few tokens times rows of weights that are read once from memory.

A decode product reads each weight once, so it is as fast as memory if the arithmetic keeps up.
Four rows at a time meet up to four tokens (the tiles of simd.py), so that neither weights nor
tokens are loaded from far more than once. The order of a sum is the same for any number of threads.

A kernel's arguments are int64 cells (sizes and addresses) under the names below. A linear is the
first nine of them, so that a kernel can be handed several.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, float32, int8, int32, int64, uint8, uint16, uint32

from halfweight.kernels.simd import (
    BLOCK_ROWS,
    LANES,
    address_of,
    bits_of,
    fetch_add,
    float_from_bits,
    float_tile,
    from_float16,
    inline,
    int8_block,
    int8_tile,
    load,
    pointer_to,
    store,
    store_byte,
    store_half,
    store_int,
    to_float16,
)

FLOAT32, BFLOAT16, FLOAT16, GRID8 = range(4)
"""How numbers in memory are read: float formats of activations and scales, and grid8 codes."""

OUT, IN, GROUP, PACKED, SCALES, FORMAT, SCALE_STRIDE, EXPONENTS, BIAS = range(9)
LINEAR_CELLS = 9
TICKET, TOKENS, X, X_FORMAT, Y, CHUNK, BLOCK, PARTS = range(LINEAR_CELLS, LINEAR_CELLS + 8)

ROWS = 4
"""Rows that meet the tokens at once."""
TILES = ((4, 4), (4, 2), (4, 1), (1, 1))
TOKEN_BYTES = 1 << 18
"""Rounded tokens that meet a chunk of rows before the next do: what an L2 cache holds."""


@inline
def cell(arguments: Any, index: Any) -> Any:
    """An int64 argument."""
    return load(arguments + 8 * index, int64)


@inline
def load_number(address: Any, index: Any, number_format: Any) -> Any:
    """Number `index` of an array of float32, bfloat16, float16 or codes."""
    if number_format == GRID8:
        return float32(load(address + index, uint8))
    if number_format == BFLOAT16:
        return float_from_bits(uint32(load(address + 2 * index, uint16)) << uint32(16))
    if number_format == FLOAT16:
        return from_float16(load(address + 2 * index, uint16))
    return load(address + 4 * index, float32)


@inline
def store_number(address: Any, index: Any, number_format: Any, value: Any) -> None:
    """Write a number as float32, bfloat16 or float16, rounded half to even."""
    if number_format == BFLOAT16:
        bits = bits_of(value)
        rounded = bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))
        if (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000):
            rounded = bits | uint32(0x400000)
        store_half(address + 2 * index, uint16(rounded >> uint32(16)))
    elif number_format == FLOAT16:
        store_half(address + 2 * index, to_float16(value))
    else:
        store(address + 4 * index, value)


@inline
def load_tokens(arguments: Any, first: Any, count: Any, to: Any) -> None:
    """Write tokens [count, K] from `first` on as float32."""
    columns, x_format = cell(arguments, IN), cell(arguments, X_FORMAT)
    x = cell(arguments, X)
    for i in range(count * columns):
        store(to + 4 * i, load_number(x, first * columns + i, x_format))


@inline
def row_scales(linear: Any, row: Any, block: Any, scales: Any) -> None:
    """Write the float32 scale of each `block` weights of a row to `scales`."""
    blocks_a_group = cell(linear, GROUP) // block
    begin = row * cell(linear, SCALE_STRIDE)
    stored = cell(linear, SCALES)
    number_format = cell(linear, FORMAT)
    step = float32(1)
    if number_format == GRID8:
        step = float32(math.ldexp(1.0, int64(load(cell(linear, EXPONENTS) + row, int8))))
    for b in range(cell(linear, IN) // block):
        scale = load_number(stored, begin + b // blocks_a_group, number_format)
        store(scales + 4 * b, scale * step)


@inline
def weight_at(weights: Any, k: Any) -> Any:
    """One packed weight as the number q."""
    return float32(int32(load(weights + k, uint8)) - int32(128))


@inline
def add_ends_of_groups(
    x: Any, tokens: Any, weights: Any, rows: Any, scales: Any, groups: Any, size: Any, sums: Any
) -> None:
    """Add what the tiles leave out: the weights past the last 16 of each group."""
    columns = groups * size
    for i in range(rows * tokens):
        row, token = weights + (i // tokens) * columns, x + 4 * (i % tokens) * columns
        rest = float32(0)
        for g in range(groups):
            scale = load(scales + 4 * ((i // tokens) * groups + g), float32)
            for k in range((g + 1) * size - size % LANES, (g + 1) * size):
                rest += scale * weight_at(row, k) * load(token + 4 * k, float32)
        store(sums + 4 * i, load(sums + 4 * i, float32) + rest)


def _multiplier(tiles: Any) -> Any:
    """A Numba function: tokens times `rows` (4 or 1) rows, float32 [rows, M] to `out`."""
    tile_4x4, tile_4x2, tile_4x1, tile_1x1 = tiles

    @inline
    def multiply(
        x: Any,
        record: Any,
        tokens: Any,
        weights: Any,
        rows: Any,
        scales: Any,
        groups: Any,
        size: Any,
        out: Any,
    ) -> None:
        m = int64(0)
        while m < tokens:
            at, to, stride = x + m * record, out + 4 * m, 4 * tokens
            if rows == 1:
                tile_1x1(at, weights, scales, groups, size, to, stride)
                m += 1
            elif tokens - m >= 4:
                tile_4x4(at, weights, scales, groups, size, to, stride)
                m += 4
            elif tokens - m >= 2:
                tile_4x2(at, weights, scales, groups, size, to, stride)
                m += 2
            else:
                tile_4x1(at, weights, scales, groups, size, to, stride)
                m += 1

    return multiply


_float_tiles = [float_tile(*tile) for tile in TILES]
float_4x1, float_1x1 = _float_tiles[2:]
multiply_floats = _multiplier(_float_tiles)
block_6, block_1 = int8_block(6), int8_block(1)
BLOCK_TOKENS = 6
"""Records that meet 32 rows at once: a multiple of 1, 2 and 3 parts."""
multiply_int8 = _multiplier([int8_tile(*tile) for tile in TILES])


@inline
def multiply_token(
    x: Any, weights: Any, rows: Any, scales: Any, groups: Any, size: Any, out: Any
) -> None:
    """`multiply_floats` for one token, with the usual group sizes unrolled."""
    if rows == 1:
        float_1x1(x, weights, scales, groups, size, out, 4)
    elif size == 128:
        float_4x1(x, weights, scales, groups, 128, out, 4)
    elif size == 64:
        float_4x1(x, weights, scales, groups, 64, out, 4)
    else:
        float_4x1(x, weights, scales, groups, size, out, 4)


@inline
def write_rows(
    linear: Any, row: Any, rows: Any, sums: Any, tokens: Any, first: Any, y: Any, y_format: Any
) -> None:
    """Add the bias to sums [rows, M]; write them as y[first : first + M, row : row + rows]."""
    bias, out_features = cell(linear, BIAS), cell(linear, OUT)
    for r in range(rows):
        added = load(bias + 4 * (row + r), float32) if bias else float32(0)
        for m in range(tokens):
            value = load(sums + 4 * (r * tokens + m), float32) + added
            store_number(y, (first + m) * out_features + row + r, y_format, value)


@inline
def next_rows(row: Any, end: Any) -> Any:
    """How many rows to take at once."""
    return int64(ROWS) if end - row >= ROWS else int64(1)


@inline
def row_block(linear: Any, row: Any, end: Any, block: Any, scratch: Any) -> Any:
    """The number of rows to take at once, with their scales in `scratch`."""
    rows = int64(ROWS) if end - row >= ROWS else int64(1)
    blocks = cell(linear, IN) // block
    for r in range(rows):
        row_scales(linear, row + r, block, scratch + 4 * r * blocks)
    return rows


@inline
def float_rows(
    linear: Any, begin: Any, end: Any, x: Any, tokens: Any, scratch: Any, y: Any, y_format: Any
) -> None:
    """y[:, begin:end] of x float32 [M, K]; scratch for float32 [4, K/G + M]."""
    columns, size = cell(linear, IN), cell(linear, GROUP)
    groups = columns // size
    sums = scratch + 4 * ROWS * groups
    row = begin
    while row < end:
        rows = row_block(linear, row, end, size, scratch)
        weights = cell(linear, PACKED) + row * columns
        multiply_floats(x, 4 * columns, tokens, weights, rows, scratch, groups, size, sums)
        if size % LANES:
            add_ends_of_groups(x, tokens, weights, rows, scratch, groups, size, sums)
        write_rows(linear, row, rows, sums, tokens, 0, y, y_format)
        row += rows


@inline
def token_rows(
    linear: Any, begin: Any, end: Any, x: Any, scratch: Any, y: Any, y_format: Any
) -> None:
    """`float_rows` for one token."""
    columns, size = cell(linear, IN), cell(linear, GROUP)
    groups = columns // size
    sums = scratch + 4 * ROWS * groups
    row = begin
    while row < end:
        rows = row_block(linear, row, end, size, scratch)
        weights = cell(linear, PACKED) + row * columns
        multiply_token(x, weights, rows, scratch, groups, size, sums)
        if size % LANES:
            add_ends_of_groups(x, 1, weights, rows, scratch, groups, size, sums)
        write_rows(linear, row, rows, sums, 1, 0, y, y_format)
        row += rows


def linear_floats(pointer: Any) -> None:
    """Kernel: y [M, N] = x [M, K] times a linear; threads take chunks of rows by ticket."""
    arguments = address_of(pointer)
    out_features, columns = cell(arguments, OUT), cell(arguments, IN)
    tokens, chunk = cell(arguments, TOKENS), cell(arguments, CHUNK)
    groups = columns // cell(arguments, GROUP)
    buffer = np.empty(tokens * columns + ROWS * (groups + tokens), np.float32)
    x = int64(buffer.ctypes.data)
    load_tokens(arguments, 0, tokens, x)
    scratch = x + 4 * tokens * columns
    y, y_format = cell(arguments, Y), cell(arguments, X_FORMAT)
    while True:
        begin = fetch_add(arguments + 8 * TICKET, chunk)
        if begin >= out_features:
            break
        end = min(begin + chunk, out_features)
        if tokens == 1:
            token_rows(arguments, begin, end, x, scratch, y, y_format)
        else:
            float_rows(arguments, begin, end, x, tokens, scratch, y, y_format)


@inline
def round_token(x: Any, columns: Any, block: Any, parts: Any, record: Any) -> None:
    """Round x float32 [K] to `parts` records: int8 [K], float32 step and int32 -128 sum a block.

    The parts are the digits of a number of 8 parts bits, base 256, lowest first, each with a step
    256 times that of the one before: their products add up to the product with x.
    """
    blocks = columns // block
    stride = columns + 8 * blocks
    digits = int32(127)
    for _ in range(1, parts):
        digits = digits * int32(256) + int32(127)
    most = float32(digits)
    for b in range(blocks):
        largest = float32(0)
        for k in range(b * block, (b + 1) * block):
            largest = max(largest, abs(load(x + 4 * k, float32)))
        inverse = most / largest if largest > 0 else float32(0)
        step = largest / most
        for part in range(parts):
            store(record + part * stride + columns + 4 * b, step)
            store_int(record + part * stride + columns + 4 * (blocks + b), int32(0))
            step *= float32(256)
        for k in range(b * block, (b + 1) * block):
            rest = int32(np.rint(load(x + 4 * k, float32) * inverse))
            rest = min(max(rest, -digits), digits)
            for part in range(parts):
                digit = int8(rest)
                rest = (rest - int32(digit)) >> int32(8)
                at = record + part * stride
                store_byte(at + k, digit)
                sum_at = at + columns + 4 * (blocks + b)
                store_int(sum_at, load(sum_at, int32) - int32(128) * int32(digit))


@inline
def int8_rows(
    linear: Any,
    begin: Any,
    end: Any,
    block: Any,
    x: Any,
    tokens: Any,
    scratch: Any,
    first: Any,
    y: Any,
    y_format: Any,
) -> None:
    """y[first : first + M, begin:end] of M records at `x`; scratch for float32 [4, K/block + M]."""
    columns = cell(linear, IN)
    blocks = columns // block
    sums = scratch + 4 * ROWS * blocks
    row = begin
    while row < end:
        rows = row_block(linear, row, end, block, scratch)
        weights = cell(linear, PACKED) + row * columns
        multiply_int8(x, columns + 8 * blocks, tokens, weights, rows, scratch, blocks, block, sums)
        write_rows(linear, row, rows, sums, tokens, first, y, y_format)
        row += rows


def round_tokens(pointer: Any) -> None:
    """Kernel: x [M, K] to records at Y; threads take tokens by ticket."""
    arguments = address_of(pointer)
    columns, block = cell(arguments, IN), cell(arguments, BLOCK)
    buffer = np.empty(columns, np.float32)
    x = int64(buffer.ctypes.data)
    while True:
        token = fetch_add(arguments + 8 * TICKET, 1)
        if token >= cell(arguments, TOKENS):
            break
        load_tokens(arguments, token, 1, x)
        parts = cell(arguments, PARTS)
        records = parts * (columns + 8 * (columns // block))
        round_token(x, columns, block, parts, cell(arguments, Y) + token * records)


def linear_int8(pointer: Any) -> None:
    """Kernel: y [M, N] = records of rounded tokens at X times a linear, by chunks of rows."""
    arguments = address_of(pointer)
    out_features, columns = cell(arguments, OUT), cell(arguments, IN)
    chunk, block = cell(arguments, CHUNK), cell(arguments, BLOCK)
    record = columns + 8 * (columns // block)
    at_once = max(int64(4), TOKEN_BYTES // record // 4 * 4)
    buffer = np.empty(ROWS * (columns // block + at_once), np.float32)
    scratch = int64(buffer.ctypes.data)
    y, y_format = cell(arguments, Y), cell(arguments, X_FORMAT)
    while True:
        begin = fetch_add(arguments + 8 * TICKET, chunk)
        if begin >= out_features:
            break
        end = min(begin + chunk, out_features)
        for first in range(0, cell(arguments, TOKENS), at_once):
            tokens = min(at_once, cell(arguments, TOKENS) - first)
            x = cell(arguments, X) + first * record
            int8_rows(arguments, begin, end, block, x, tokens, scratch, first, y, y_format)


@inline
def interleave_rows(linear: Any, row: Any, rows: Any, block: Any, to: Any, scales: Any) -> None:
    """Write 32 rows (zeros past `rows`) as packed [K/4, 32, 4] and scales float32 [K/block, 32]."""
    columns = cell(linear, IN)
    blocks = columns // block
    weights = cell(linear, PACKED) + row * columns
    own = scales + 4 * BLOCK_ROWS * blocks
    for r in range(BLOCK_ROWS):
        if r < rows:
            row_scales(linear, row + r, block, own)
            for k in range(0, columns, 4):
                store_int(to + BLOCK_ROWS * k + 4 * r, load(weights + r * columns + k, int32))
        for b in range(blocks):
            scale = load(own + 4 * b, float32) if r < rows else float32(0)
            store(scales + 4 * (BLOCK_ROWS * b + r), scale)


@inline
def write_token(
    linear: Any, row: Any, rows: Any, sums: Any, parts: Any, y: Any, y_format: Any
) -> None:
    """y[row : row + rows] of one token: its parts' sums [parts, 32] added, and the bias."""
    bias = cell(linear, BIAS)
    values = carray(pointer_to(sums), (parts, BLOCK_ROWS), float32)
    for part in range(1, parts):
        for r in range(BLOCK_ROWS):
            values[0, r] += values[part, r]
    if bias:
        for r in range(rows):
            values[0, r] += load(bias + 4 * (row + r), float32)
    if y_format == FLOAT32:
        out = carray(pointer_to(y + 4 * row), rows, float32)
        for r in range(rows):
            out[r] = values[0, r]
    else:
        for r in range(rows):
            store_number(y, row + r, y_format, values[0, r])


def linear_many(pointer: Any) -> None:
    """Kernel: y [M, N] = tokens in parts at X times a linear; threads take 32 rows by ticket."""
    arguments = address_of(pointer)
    out_features, columns = cell(arguments, OUT), cell(arguments, IN)
    block, parts = cell(arguments, BLOCK), cell(arguments, PARTS)
    blocks = columns // block
    record = columns + 8 * blocks
    buffer = np.zeros(
        (BLOCK_ROWS + 1) * blocks + BLOCK_TOKENS * BLOCK_ROWS + BLOCK_ROWS * columns // 4,
        np.float32,
    )
    scales = int64(buffer.ctypes.data)
    sums = scales + 4 * (BLOCK_ROWS + 1) * blocks
    weights = sums + 4 * BLOCK_TOKENS * BLOCK_ROWS
    stride, records = 4 * BLOCK_ROWS, cell(arguments, TOKENS) * parts
    y, y_format = cell(arguments, Y), cell(arguments, X_FORMAT)
    item = int64(4) if y_format == FLOAT32 else int64(2)
    while True:
        row = fetch_add(arguments + 8 * TICKET, BLOCK_ROWS)
        if row >= out_features:
            break
        rows = min(int64(BLOCK_ROWS), out_features - row)
        interleave_rows(arguments, row, rows, block, weights, scales)
        for first in range(0, records, BLOCK_TOKENS):
            count = min(int64(BLOCK_TOKENS), records - first)
            x = cell(arguments, X) + first * record
            if count == BLOCK_TOKENS:
                block_6(x, weights, scales, blocks, block, sums, stride)
            else:
                for m in range(count):
                    to = sums + m * stride
                    block_1(x + m * record, weights, scales, blocks, block, to, stride)
            for m in range(0, count, parts):
                at = y + item * ((first + m) // parts) * out_features
                write_token(arguments, row, rows, sums + m * stride, parts, at, y_format)
