"""The CPU's products: a few tokens times rows of weights that are read once from memory.

A decode product reads each weight once, so it is as fast as memory if the arithmetic keeps up.
Four rows at a time meet a token (the tiles of dot_tiles.py), as floats or in integer digits, while
the rows to come are fetched. The order of a sum is the same for any number of threads.

A kernel's arguments are int64 cells (sizes and addresses) under the names below. A linear is the
first nine of them, so that a kernel can be handed several.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, int8, int32, int64, uint8, uint16, uint32

from halfweight.kernels.cpu.dot_tiles import ROWS, digit_tile, float_tile, round_block
from halfweight.kernels.cpu.llvm import (
    address_of,
    bits_of,
    call_at,
    cell,
    fetch_add,
    float_from_bits,
    from_float16,
    inline,
    load,
    pointer_to,
    prefetch,
    store,
    store_half,
    to_float16,
)
from halfweight.kernels.cpu.llvm_vectors import LANES, LINE

FLOAT32, BFLOAT16, FLOAT16, GRID8 = range(4)
"""How numbers in memory are read: float formats of activations and scales, and grid8 codes."""

OUT, IN, GROUP, PACKED, SCALES, FORMAT, SCALE_STRIDE, EXPONENTS, BIAS, PARTS, PRODUCT = range(11)
LINEAR_CELLS = 11
"""Cells of a linear. PARTS: digits that x is rounded to, 0 where it stays in floats.

PRODUCT: the address of `float_product` or `digit_product`.
"""
TICKET, TOKENS, X, X_FORMAT, Y, THREADS, THREAD, WORK, WORK_BYTES = range(
    LINEAR_CELLS, LINEAR_CELLS + 9
)
"""THREAD counts threads as they come; each has WORK_BYTES of its own, from WORK on."""
MIN_SHARE_BYTES, MAX_SHARE_ROWS = 1 << 14, 4096
"""Weights a thread takes at a time: not too few."""
FIRST_BYTES = 4096
"""Bytes asked for when rows are taken, before they are multiplied."""

MAX_PARTS = 3

float_1, float_4 = float_tile(1), float_tile(4)
digits_1, digits_2, digits_3 = (digit_tile(parts) for parts in range(1, MAX_PARTS + 1))
round_1, round_2, round_3 = (round_block(parts) for parts in range(1, MAX_PARTS + 1))


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
def step_block(group_size: Any) -> Any:
    """Activations that share a step beside weights in groups of `group_size`; 0: none can."""
    for block in (256, 128, 64):
        if group_size % block == 0:
            return block
    return 0


@inline
def whole_lines(num_bytes: Any) -> Any:
    """Rounded up to cache lines."""
    return (num_bytes + (LINE - 1)) // LINE * LINE


@inline
def own_memory(arguments: Any) -> Any:
    """Where this thread's memory begins."""
    thread = fetch_add(arguments + 8 * THREAD, 1)
    return cell(arguments, WORK) + thread * cell(arguments, WORK_BYTES)


@inline
def power_of_two(exponent: Any) -> Any:
    """2^e for an int8 e, the smallest of which are below float32's normal numbers."""
    if exponent > 0:
        return float_from_bits(uint32(exponent + 127) << uint32(23))
    return float_from_bits(uint32(exponent + 191) << uint32(23)) * float32(2.0**-64)


@inline
def float_tokens(arguments: Any, first: Any, count: Any, to: Any) -> None:
    """Write tokens [count, K] from `first` on as float32."""
    size, x_format = count * cell(arguments, IN), cell(arguments, X_FORMAT)
    begin, out = first * cell(arguments, IN), carray(pointer_to(to), size, float32)
    x = cell(arguments, X)
    if x_format == FLOAT32:
        for i in range(size):
            out[i] = load(x + 4 * (begin + i), float32)
        return
    for i in range(size):
        out[i] = load_number(x, begin + i, x_format)


@inline
def row_scales(linear: Any, row: Any, rows: Any, block: Any, scales: Any) -> None:
    """Write float32 scales [rows, K/block], without the rows' powers of two."""
    size = cell(linear, GROUP)
    groups, blocks = cell(linear, IN) // size, cell(linear, IN) // block
    stored, number_format = cell(linear, SCALES), cell(linear, FORMAT)
    begin = row * cell(linear, SCALE_STRIDE)
    if blocks == groups and cell(linear, SCALE_STRIDE) == groups:
        out = carray(pointer_to(scales), rows * groups, float32)
        if number_format == GRID8:
            codes = carray(pointer_to(stored + begin), rows * groups, uint8)
            for i in range(rows * groups):
                out[i] = float32(codes[i])
        else:
            for i in range(rows * groups):
                out[i] = load_number(stored, begin + i, number_format)
        return
    for r in range(rows):
        first = begin + r * cell(linear, SCALE_STRIDE)
        for b in range(blocks):
            scale = load_number(stored, first + b * block // size, number_format)
            store(scales + 4 * (r * blocks + b), scale)


@inline
def row_power(linear: Any, row: Any) -> Any:
    """What a row's scales are to be multiplied with."""
    if cell(linear, FORMAT) != GRID8:
        return float32(1)
    return power_of_two(int64(load(cell(linear, EXPONENTS) + row, int8)))


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


@inline
def write_rows(
    linear: Any, row: Any, rows: Any, sums: Any, tokens: Any, first: Any, y: Any, y_format: Any
) -> None:
    """Finish sums [rows, M]: powers of two, bias; as y[first : first + M, row : row + rows]."""
    bias, out_features = cell(linear, BIAS), cell(linear, OUT)
    for r in range(rows):
        power = row_power(linear, row + r)
        added = load(bias + 4 * (row + r), float32) if bias else float32(0)
        for m in range(tokens):
            value = load(sums + 4 * (r * tokens + m), float32) * power + added
            store_number(y, (first + m) * out_features + row + r, y_format, value)


@inline
def float_rows(
    linear: Any, begin: Any, end: Any, x: Any, tokens: Any, scratch: Any, y: Any, y_format: Any
) -> None:
    """y[:, begin:end] of x float32 [M, K]; scratch for float32 [4, K/G + 4]."""
    columns, size = cell(linear, IN), cell(linear, GROUP)
    groups = columns // size
    sums = scratch + 4 * ROWS * groups
    limit = cell(linear, PACKED) + end * columns - 1
    row = begin
    while row < end:
        rows = int64(ROWS) if end - row >= ROWS else int64(1)
        stride = columns if rows == ROWS else int64(0)
        row_scales(linear, row, rows, size, scratch)
        weights = cell(linear, PACKED) + row * columns
        m = int64(0)
        while m < tokens:
            count, at = int64(1), x + 4 * m * columns
            if tokens - m >= 4:
                count = int64(4)
                float_4(at, weights, scratch, groups, size, sums, stride, limit)
            else:
                float_1(at, weights, scratch, groups, size, sums, stride, limit)
            if size % LANES:
                add_ends_of_groups(at, count, weights, rows, scratch, groups, size, sums)
            write_rows(linear, row, rows, sums, count, m, y, y_format)
            m += count
        row += rows


@inline
def digit_rows(
    linear: Any,
    begin: Any,
    end: Any,
    records: Any,
    tokens: Any,
    parts: Any,
    scratch: Any,
    y: Any,
    y_format: Any,
) -> None:
    """y[:, begin:end] of M records; scratch for float32 [4, K/B + 1]."""
    columns, block = cell(linear, IN), step_block(cell(linear, GROUP))
    blocks = columns // block
    sums = scratch + 4 * ROWS * blocks
    limit = cell(linear, PACKED) + end * columns - 1
    row = begin
    while row < end:
        rows = int64(ROWS) if end - row >= ROWS else int64(1)
        stride = columns if rows == ROWS else int64(0)
        row_scales(linear, row, rows, block, scratch)
        weights = cell(linear, PACKED) + row * columns
        for m in range(tokens):
            x = records + m * record_bytes(columns, block, parts)
            if parts == 2:
                digits_2(x, weights, scratch, blocks, block, sums, stride, limit)
            elif parts == 3:
                digits_3(x, weights, scratch, blocks, block, sums, stride, limit)
            else:
                digits_1(x, weights, scratch, blocks, block, sums, stride, limit)
            write_rows(linear, row, rows, sums, 1, m, y, y_format)
        row += rows


@inline
def record_bytes(columns: Any, block: Any, parts: Any) -> Any:
    """Bytes of a token in digits, as `digit_tile` reads it."""
    return whole_lines(parts * columns + columns // block * (4 * LANES * parts + 4))


@inline
def round_part(
    x: Any, digits: Any, stride: Any, starts: Any, step: Any, block: Any, parts: Any
) -> None:
    """`round_block` for 1 to 3 parts."""
    if parts == 2:
        round_2(x, digits, stride, starts, step, block)
    elif parts == 3:
        round_3(x, digits, stride, starts, step, block)
    else:
        round_1(x, digits, stride, starts, step, block)


@inline
def write_record(x: Any, columns: Any, block: Any, parts: Any, record: Any) -> None:
    """Round x float32 [K] to digits."""
    blocks = columns // block
    starts = record
    digits = starts + 4 * LANES * parts * blocks
    steps = digits + parts * columns
    for b in range(blocks):
        at, to = x + 4 * b * block, digits + b * block
        round_part(at, to, columns, starts + 4 * LANES * parts * b, steps + 4 * b, block, parts)


def float_product(
    linear: Any,
    begin: Any,
    end: Any,
    x: Any,
    tokens: Any,
    _parts: Any,
    scratch: Any,
    y: Any,
    y_format: Any,
) -> Any:
    """y[:, begin:end] of x float32 [M, K]; scratch for float32 [4, K/G + 4].

    With `begin` = -1: x of one token as it wants it (where it is). A function of its own that
    kernels call by its address, so that it is compiled once, and only where it is used.
    """
    if begin < 0:
        return x
    float_rows(linear, begin, end, x, tokens, scratch, y, y_format)
    return y


def digit_product(
    linear: Any,
    begin: Any,
    end: Any,
    x: Any,
    tokens: Any,
    parts: Any,
    scratch: Any,
    y: Any,
    y_format: Any,
) -> Any:
    """`float_product` of records; with `begin` = -1, x float32 [K] becomes one at `y`."""
    if begin < 0:
        write_record(x, cell(linear, IN), step_block(cell(linear, GROUP)), parts, y)
        return y
    digit_rows(linear, begin, end, x, tokens, parts, scratch, y, y_format)
    return y


@inline
def prepare_token(linear: Any, x: Any, to: Any) -> Any:
    """x float32 [K] as a linear's product wants it: where it is, or in digits at `to`."""
    parts = cell(linear, PARTS)
    return call_at(cell(linear, PRODUCT), (linear, -1, 0, x, 1, parts, 0, to, 0))


@inline
def multiply(
    linear: Any, begin: Any, end: Any, x: Any, tokens: Any, scratch: Any, y: Any, y_format: Any
) -> None:
    """y[:, begin:end] of a linear times prepared tokens."""
    parts = cell(linear, PARTS)
    call_at(cell(linear, PRODUCT), (linear, begin, end, x, tokens, parts, scratch, y, y_format))


@inline
def token_bytes(linear: Any) -> Any:
    """Bytes of a prepared token."""
    columns, parts = cell(linear, IN), cell(linear, PARTS)
    if parts == 0:
        return 4 * columns
    return record_bytes(columns, step_block(cell(linear, GROUP)), parts)


@inline
def take(counter: Any, linear: Any, threads: Any) -> Any:
    """The next rows of a linear that nobody has: begin and end, equal when there are none.

    First a large share for each thread, where memory is read without a break, then small ones.
    The first lines of them are asked for.
    """
    rows, columns = cell(linear, OUT), cell(linear, IN)
    large = min(3 * rows // (4 * threads), int64(MAX_SHARE_ROWS)) // ROWS * ROWS
    rest = rows - large * threads
    small = min(max(rest // (2 * threads), MIN_SHARE_BYTES // columns), int64(MAX_SHARE_ROWS))
    small = max(int64(ROWS), small // ROWS * ROWS)
    i = fetch_add(counter, 1)
    if large > 0 and i < threads:
        begin, end = i * large, i * large + large
    else:
        if large > 0:
            i -= threads
        begin = min(large * threads + i * small, rows)
        end = min(begin + small, rows)
    weights = cell(linear, PACKED) + begin * columns
    for at in range(weights, weights + min((end - begin) * columns, int64(FIRST_BYTES)), LINE):
        prefetch(at)
    return begin, end


@inline
def scratch_floats(linear: Any) -> Any:
    """Floats of scratch that a product needs."""
    block = step_block(cell(linear, GROUP)) or cell(linear, GROUP)
    return ROWS * (cell(linear, IN) // block + 4)


def linear_few(pointer: Any) -> None:
    """Kernel: y [M, N] = x [M, K] times a linear; threads take rows by ticket.

    Every thread rounds all tokens for itself: cheaper than to wait for another.
    """
    arguments = address_of(pointer)
    columns, size = cell(arguments, IN), token_bytes(arguments)
    tokens, threads = cell(arguments, TOKENS), cell(arguments, THREADS)
    begin, end = take(arguments + 8 * TICKET, arguments, threads)
    x = own_memory(arguments)
    scratch = x + tokens * size
    floats = scratch + 4 * scratch_floats(arguments)
    if cell(arguments, PARTS) == 0:
        float_tokens(arguments, 0, tokens, x)
    else:
        float_tokens(arguments, 0, tokens, floats)
        for m in range(tokens):
            prepare_token(arguments, floats + 4 * m * columns, x + m * size)
    y, y_format = cell(arguments, Y), cell(arguments, X_FORMAT)
    while begin < end:
        multiply(arguments, begin, end, x, tokens, scratch, y, y_format)
        begin, end = take(arguments + 8 * TICKET, arguments, threads)
