"""Products of a step of several tokens: rows of weights read once for all of them.

Tokens come prepared: float32 [M, K] where a linear's groups are no multiple of 64 or the CPU has no
VNNI, else a record a token (batch_tiles.py). Either way a token's results are the same to the
bit whatever stands beside it.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, int8, int32, int64, uint8, uint32

from halfweight.kernels.cpu.batch_tiles import (
    TILE_ROWS,
    digit_rows,
    finish_tile,
    matrix_rows,
    turn_words,
    wide_rows,
)
from halfweight.kernels.cpu.between_products import floats_at
from halfweight.kernels.cpu.decode_products import (
    BIAS,
    EXPONENTS,
    FIRST_BYTES,
    FORMAT,
    GRID8,
    GROUP,
    IN,
    MAX_SHARE_ROWS,
    MIN_SHARE_BYTES,
    OUT,
    PACKED,
    add_ends_of_groups,
    float_1,
    round_part,
    row_scales,
    whole_lines,
)
from halfweight.kernels.cpu.dot_tiles import ROWS
from halfweight.kernels.cpu.llvm import (
    cell,
    fetch_add,
    float_from_bits,
    inline,
    load,
    pointer_to,
    prefetch,
    store,
    store_int,
)
from halfweight.kernels.cpu.llvm_vectors import LANES, LINE

STORE, ADD, GATE = range(3)
"""What becomes of a product: y = p, y += p, or y = silu(y) p."""

digit_rows_2, digit_rows_3 = digit_rows(2), digit_rows(3)
matrix_rows_2, matrix_rows_3 = matrix_rows(2), matrix_rows(3)
turn, wide_4 = turn_words(), wide_rows()
finish_store, finish_add, finish_gate = (finish_tile(use) for use in ("store", "add", "gate"))


@inline
def batch_record_bytes(columns: Any, parts: Any) -> Any:
    """Bytes of a token in digits."""
    return whole_lines(parts * columns + 12 * (columns // LINE))


@inline
def write_batch_record(x: Any, columns: Any, parts: Any, record: Any, scratch: Any) -> None:
    """Round x float32 [K] to digits, a step for each 64; scratch for int32 [parts, 16]."""
    blocks = columns // LINE
    steps = record + parts * columns
    for b in range(blocks):
        at, digits = x + 4 * LINE * b, record + LINE * b
        round_part(at, digits, columns, scratch, steps + 4 * b, LINE, parts)
        low, high = int32(0), int32(0)
        starts = carray(pointer_to(scratch), parts * LANES, int32)
        for lane in range(LANES):
            low += starts[lane] + (starts[LANES + lane] << int32(8))
        if parts == 3:
            for lane in range(LANES):
                high += starts[2 * LANES + lane]
        store_int(steps + 4 * (blocks + b), low)
        store_int(steps + 4 * (2 * blocks + b), high)


def batch_scratch_bytes(columns: int, tokens: int) -> int:
    """Bytes of scratch that a product needs."""
    scales = 4 * TILE_ROWS * (2 * (columns // LINE + LANES) + LANES)
    return int(8 * LINE + sums_bytes.py_func(tokens) + TILE_ROWS * max(columns, LINE) + scales)


@inline
def turned_scales(linear: Any, row: Any, rows: Any, scratch: Any) -> Any:
    """Where in `scratch` scales float32 [K/64, 16] are written, without powers of two."""
    columns, size = cell(linear, IN), cell(linear, GROUP)
    groups = columns // size
    scales = scratch + 4 * TILE_ROWS * (groups + LANES)
    row_scales(linear, row, rows, size, scratch)
    turn(scratch, 4 * groups, groups, size // LINE, scales)
    return scales


@inline
def digit_arguments(linear: Any, row: Any, rows: Any, scratch: Any, more: Any) -> Any:
    """What `digit_rows` is told of 16 rows: addresses, K, scales, the way to the next ones."""
    columns = cell(linear, IN)
    first, addresses = cell(linear, PACKED) + row * columns, scratch
    pointers = carray(pointer_to(addresses), TILE_ROWS, int64)
    for r in range(TILE_ROWS):
        pointers[r] = first + min(r, rows - 1) * columns
    scales = turned_scales(linear, row, rows, scratch + 8 * TILE_ROWS)
    ahead = TILE_ROWS * columns if more else int64(0)
    return addresses, columns, scales, ahead


@inline
def turned_bytes(columns: Any, parts: Any) -> Any:
    """Bytes of 16 tokens in digits as `matrix_rows` reads them."""
    return LANES * (parts * columns + 12 * (columns // LINE))


@inline
def turn_tokens(records: Any, columns: Any, parts: Any, tokens: Any, to: Any) -> None:
    """Records as `matrix_rows` reads them, 16 at a time.

    Past the last one digits are anything, and steps 0: numbers below the normal ones are slow.
    """
    record, blocks = batch_record_bytes(columns, parts), columns // LINE
    for m in range(0, tokens, LANES):
        at = records + m * record
        for part in range(parts):
            turn(at + part * columns, record, columns // 4, 1, to + LANES * columns * part)
        ends, turned = at + parts * columns, to + LANES * columns * parts
        for i in range(3):
            turn(ends + 4 * blocks * i, record, blocks, 1, turned + 4 * LANES * blocks * i)
        steps = floats_at(turned, LANES * blocks)
        for b in range(blocks):
            for lane in range(tokens - m, LANES):
                steps[b * LANES + lane] = float32(0)
        to += turned_bytes(columns, parts)


@inline
def matrix_arguments(linear: Any, row: Any, rows: Any, scratch: Any, more: Any) -> Any:
    """What `matrix_rows` is told of 16 rows; fewer are copied, as it reads whole sixteens."""
    columns = cell(linear, IN)
    first = cell(linear, PACKED) + row * columns
    scales = turned_scales(linear, row, rows, scratch + TILE_ROWS * columns)
    if rows < TILE_ROWS:
        copied = carray(pointer_to(scratch), rows * columns // 4, int32)
        copied[:] = carray(pointer_to(first), rows * columns // 4, int32)
        first = scratch
    ahead = TILE_ROWS * columns if more else int64(0)
    return first, columns, scales, ahead


@inline
def multiply_floats(
    linear: Any, row: Any, rows: Any, x: Any, tokens: Any, sums: Any, scratch: Any
) -> None:
    """sums float32 [M, 16] of x float32 [M, K], four rows at a time.

    Several tokens meet rows that are widened first, which is cheaper, and the same to the bit.
    """
    columns, size = cell(linear, IN), cell(linear, GROUP)
    groups = columns // size
    limit = cell(linear, PACKED) + cell(linear, OUT) * columns - 1
    out, wide = scratch, scratch + 4 * ROWS
    scales = wide + 4 * ROWS * columns
    r = int64(0)
    while r < rows:
        count = int64(ROWS) if rows - r >= ROWS else int64(1)
        stride = columns if count == ROWS else int64(0)
        row_scales(linear, row + r, count, size, scales)
        weights = cell(linear, PACKED) + (row + r) * columns
        if tokens > 1:
            packed = carray(pointer_to(weights), count * columns, uint8)
            numbers = floats_at(wide, count * columns)
            for i in range(count * columns):
                numbers[i] = float32(int32(packed[i]) - int32(128))
        for m in range(tokens):
            at = x + 4 * m * columns
            if tokens > 1:
                wide_4(at, wide, scales, groups, size, count // ROWS, out)
            else:
                float_1(at, weights, scales, groups, size, out, stride, limit)
            if size % LANES:
                add_ends_of_groups(at, 1, weights, count, scales, groups, size, out)
            for i in range(count):
                store(sums + 4 * (m * TILE_ROWS + r + i), load(out + 4 * i, float32))
        r += count


@inline
def write_factors(linear: Any, row: Any, rows: Any, to: Any) -> None:
    """What the sums of 16 rows are to be multiplied with, then what is to be added."""
    powers, added = floats_at(to, TILE_ROWS), floats_at(to + 4 * TILE_ROWS, TILE_ROWS)
    powers[:], added[:] = float32(1), float32(0)
    if cell(linear, FORMAT) == GRID8:
        exponents = carray(pointer_to(cell(linear, EXPONENTS) + row), rows, int8)
        for r in range(rows):
            half = int32(exponents[r]) >> int32(1)
            rest = int32(exponents[r]) - half
            low = float_from_bits(uint32(half + int32(127)) << uint32(23))
            powers[r] = low * float_from_bits(uint32(rest + int32(127)) << uint32(23))
    bias = cell(linear, BIAS)
    if bias:
        biases = floats_at(bias + 4 * row, rows)
        for r in range(rows):
            added[r] = biases[r]


@inline
def finish(sums: Any, factors: Any, y: Any, stride: Any, tokens: Any, use: Any) -> None:
    """Sums [M, 16], finished, to y (`finish_tile`)."""
    if use == ADD:
        finish_add(sums, factors, y, stride, tokens)
    elif use == GATE:
        finish_gate(sums, factors, y, stride, tokens)
    else:
        finish_store(sums, factors, y, stride, tokens)


@inline
def finish_rows(
    linear: Any,
    row: Any,
    rows: Any,
    sums: Any,
    tokens: Any,
    own: Any,
    y: Any,
    stride: Any,
    use: Any,
) -> None:
    """Sums [M, 16] finished, to y float32 [M, stride] as `use` says."""
    write_factors(linear, row, rows, own)
    if rows == TILE_ROWS:
        finish(sums, own, y + 4 * row, 4 * stride, tokens, use)
        return
    copy = own + 8 * TILE_ROWS
    whole = floats_at(copy, TILE_ROWS)
    for m in range(tokens):
        out = floats_at(y + 4 * (m * stride + row), rows)
        for r in range(rows):
            whole[r] = out[r]
        finish(sums + 4 * TILE_ROWS * m, own, copy, 0, 1, use)
        for r in range(rows):
            out[r] = whole[r]


@inline
def sums_bytes(tokens: Any) -> Any:
    """Bytes of sums float32 [M, 16], M in whole sixteens."""
    return 4 * TILE_ROWS * ((tokens + LANES - 1) // LANES * LANES)


def batch_float(
    linear: Any,
    begin: Any,
    end: Any,
    x: Any,
    tokens: Any,
    scratch: Any,
    y: Any,
    stride: Any,
    use: Any,
) -> Any:
    """y[:, begin:end] of x float32 [M, K], y float32 [M, stride]; begin a multiple of 16.

    Functions of their own that kernels call by address: only those in use are compiled, once.
    """
    sums = scratch + 8 * LINE
    own = sums + sums_bytes(tokens)
    for row in range(begin, end, TILE_ROWS):
        rows = min(int64(TILE_ROWS), end - row)
        multiply_floats(linear, row, rows, x, tokens, sums, own)
        finish_rows(linear, row, rows, sums, tokens, scratch, y, stride, use)
    return y


def batch_digits_2(
    linear: Any,
    begin: Any,
    end: Any,
    x: Any,
    tokens: Any,
    scratch: Any,
    y: Any,
    stride: Any,
    use: Any,
) -> Any:
    """`batch_float` of records of 2 digits."""
    sums = scratch + 8 * LINE
    own = sums + sums_bytes(tokens)
    for row in range(begin, end, TILE_ROWS):
        rows, more = min(int64(TILE_ROWS), end - row), row + TILE_ROWS < end
        at, columns, scales, ahead = digit_arguments(linear, row, rows, own, more)
        digit_rows_2(at, x, columns, scales, tokens, sums, ahead)
        finish_rows(linear, row, rows, sums, tokens, scratch, y, stride, use)
    return y


def batch_digits_3(
    linear: Any,
    begin: Any,
    end: Any,
    x: Any,
    tokens: Any,
    scratch: Any,
    y: Any,
    stride: Any,
    use: Any,
) -> Any:
    """`batch_float` of records of 3 digits."""
    sums = scratch + 8 * LINE
    own = sums + sums_bytes(tokens)
    for row in range(begin, end, TILE_ROWS):
        rows, more = min(int64(TILE_ROWS), end - row), row + TILE_ROWS < end
        at, columns, scales, ahead = digit_arguments(linear, row, rows, own, more)
        digit_rows_3(at, x, columns, scales, tokens, sums, ahead)
        finish_rows(linear, row, rows, sums, tokens, scratch, y, stride, use)
    return y


def batch_matrix_2(
    linear: Any,
    begin: Any,
    end: Any,
    x: Any,
    tokens: Any,
    scratch: Any,
    y: Any,
    stride: Any,
    use: Any,
) -> Any:
    """`batch_digits_2` of turned tokens by a matrix unit: the same bits."""
    sums = scratch + 8 * LINE
    own = sums + sums_bytes(tokens)
    for row in range(begin, end, TILE_ROWS):
        rows, more = min(int64(TILE_ROWS), end - row), row + TILE_ROWS < end
        first, columns, scales, ahead = matrix_arguments(linear, row, rows, own, more)
        for m in range(0, tokens, LANES):
            at, to = x + m // LANES * turned_bytes(columns, 2), sums + 4 * TILE_ROWS * m
            matrix_rows_2(first, at, columns, scales, to, ahead)
        finish_rows(linear, row, rows, sums, tokens, scratch, y, stride, use)
    return y


def batch_matrix_3(
    linear: Any,
    begin: Any,
    end: Any,
    x: Any,
    tokens: Any,
    scratch: Any,
    y: Any,
    stride: Any,
    use: Any,
) -> Any:
    """`batch_digits_3` of turned tokens by a matrix unit: the same bits."""
    sums = scratch + 8 * LINE
    own = sums + sums_bytes(tokens)
    for row in range(begin, end, TILE_ROWS):
        rows, more = min(int64(TILE_ROWS), end - row), row + TILE_ROWS < end
        first, columns, scales, ahead = matrix_arguments(linear, row, rows, own, more)
        for m in range(0, tokens, LANES):
            at, to = x + m // LANES * turned_bytes(columns, 3), sums + 4 * TILE_ROWS * m
            matrix_rows_3(first, at, columns, scales, to, ahead)
        finish_rows(linear, row, rows, sums, tokens, scratch, y, stride, use)
    return y


@inline
def take_rows(counter: Any, linear: Any, threads: Any) -> Any:
    """The next rows of a linear that nobody has: begin and end, equal when there are none.

    First a large share for each thread, where memory is read without a break, then small ones.
    Begins are multiples of 16. The first lines are asked for.
    """
    rows, columns = cell(linear, OUT), cell(linear, IN)
    large = min(3 * rows // (4 * threads), int64(MAX_SHARE_ROWS)) // TILE_ROWS * TILE_ROWS
    rest = rows - large * threads
    small = min(max(rest // (2 * threads), MIN_SHARE_BYTES // columns), int64(MAX_SHARE_ROWS))
    small = max(int64(TILE_ROWS), small // TILE_ROWS * TILE_ROWS)
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
