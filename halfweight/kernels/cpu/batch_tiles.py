"""The inner loops of a step of several tokens: 16 rows of weights meet any number of tokens.

A tile reads 16 rows by 64 bytes once, turns them in registers so that a lane is a row, and
multiplies them with every token in turn. The integers of 64 products are exact, and what follows
is the same for each token whatever stands beside it:

    sum[row] += float(integer) * (scale[row] * step)        blocks of 64 in order, rounded once

so a token's numbers do not depend on the batch, to the bit. A matrix unit (`matrix_rows`) gives the
same integers, and so the same bits. Attention's tiles take 16 keys at a time, or all values of a
page.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from halfweight.kernels.cpu.attention_tiles import exp_of
from halfweight.kernels.cpu.dot_tiles import ROWS, store_sums
from halfweight.kernels.cpu.llvm_vectors import (
    BYTES64,
    FLOAT,
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    LANES,
    LINE,
    accumulators,
    call,
    constant,
    dot_bytes,
    load,
    multiply_add,
    offset,
    pointer,
    splat,
    splat_int,
    vector_function,
)
from halfweight.kernels.cpu.matrix_unit import configure_tiles, load_tile, tile_call

TILE_ROWS = 16
"""Rows of weights that meet all tokens of a step at once."""
CHAINS = 2
"""Sums a digit is added to in turn: one product waits for the last of its chain."""


LINES_AHEAD = 4
"""Lines of a row between what is multiplied and what memory is asked for."""


def digit_rows(num_parts: int) -> Any:
    """16 rows of weights times tokens in digits, a lane a row.

    The Numba function takes the address of int64 [16] addresses of the rows, that of the first
    token's record, K, the address of scales float32 [K/64, 16], the number of tokens, the address
    of float32 [tokens, 16] to write, and the bytes from these rows to those that come next (0: none
    do). A record is int8 digits [num_parts, K], lowest first, then float32 steps [K/64] and int32
    starts [2, K/64]: -128 times the sums of what the lower two digits say, and of the third; in
    whole lines.
    """

    def generate(
        features: Any,
        b: Any,
        rows: Any,
        x: Any,
        columns: Any,
        scales: Any,
        tokens: Any,
        sums: Any,
        ahead: Any,
    ) -> None:
        lines = b.udiv(columns, I64(LINE))
        stride = _record_bytes(b, columns, lines, num_parts)
        with cgutils.for_range(b, tokens) as loop:
            to = offset(b, sums, loop.index, I64(4 * LANES))
            b.store(ir.Constant(FLOATS, [0.0] * LANES), pointer(b, to, FLOATS), align=4)
        with cgutils.for_range(b, lines) as blocks:
            k = b.mul(blocks.index, I64(LINE))
            at = [load(b, b.add(rows, I64(8 * r)), I64) for r in range(TILE_ROWS)]
            _prefetch(b, at, k, columns, ahead)
            weights = _turn(b, [load(b, b.add(row, k), INTS) for row in at])
            scale = load(b, offset(b, scales, k, I64(1)), FLOATS)
            with cgutils.for_range(b, tokens) as loop:
                record = offset(b, x, loop.index, stride)
                ends = b.add(offset(b, record, num_parts, columns), b.mul(blocks.index, I64(4)))
                digits = [
                    _dot_line(features, b, weights, b.add(offset(b, record, part, columns), k))
                    for part in range(num_parts)
                ]
                starts = [
                    splat_int(b, load(b, b.add(ends, b.mul(lines, I64(4 * i))), I32))
                    for i in (1, 2)
                ]
                total = _join(b, digits, starts)
                factor = b.fmul(scale, splat(b, load(b, ends, FLOAT)))
                cell = pointer(b, offset(b, sums, loop.index, I64(4 * LANES)), FLOATS)
                b.store(multiply_add(b, total, factor, b.load(cell, align=4)), cell, align=4)

    return vector_function(f"digit_rows_{num_parts}", 7, generate)


def _record_bytes(builder: Any, columns: Any, lines: Any, parts: int) -> Any:
    """Bytes of a record (batch_loops.batch_record_bytes)."""
    used = builder.add(builder.mul(columns, I64(parts)), builder.mul(lines, I64(12)))
    return builder.and_(builder.add(used, I64(LINE - 1)), I64(-LINE))


def _prefetch(builder: Any, rows: list[Any], k: Any, columns: Any, ahead: Any) -> None:
    """Ask for a line of each row some lines on, where a row ends in the row that comes next.

    Sixteen streams are too many for a CPU to guess, and so is one that jumps.
    """
    wanted = builder.add(k, I64(LINE * LINES_AHEAD))
    beyond = builder.add(ahead, builder.sub(wanted, columns))
    past = builder.icmp_signed(">=", wanted, columns)
    distance = builder.select(past, beyond, wanted)
    for row in rows:
        line = pointer(builder, builder.add(row, distance), I8)
        call(builder, "llvm.prefetch.p0", ir.VoidType(), line, I32(0), I32(3), I32(1))


def turn_words() -> Any:
    """Words of 16 rows, turned: 16 of a column side by side.

    The Numba function takes the address of 4-byte words [16, count], the bytes of one of its rows,
    count, how often each column is to be written, and the address of [count, copies, 16] to write.
    Up to 15 columns more are read and written.
    """

    def generate(
        _features: Any, b: Any, words: Any, stride: Any, count: Any, copies: Any, out: Any
    ) -> None:
        turns = b.udiv(b.add(count, I64(LANES - 1)), I64(LANES))
        with cgutils.for_range(b, turns) as loop:
            column = b.mul(loop.index, I64(LANES))
            at = offset(b, words, column, I64(4))
            rows = [load(b, offset(b, at, r, stride), INTS) for r in range(TILE_ROWS)]
            for i, turned in enumerate(_turn(b, rows)):
                line = b.mul(b.add(column, I64(i)), copies)
                first = offset(b, out, line, I64(4 * TILE_ROWS))
                with cgutils.for_range(b, copies) as copy:
                    to = offset(b, first, copy.index, I64(4 * TILE_ROWS))
                    b.store(turned, pointer(b, to, INTS), align=4)

    return vector_function("turn_words", 5, generate)


def matrix_rows(num_parts: int) -> Any:
    """`digit_rows` for 16 tokens by a CPU's matrix unit (AMX).

    The Numba function takes the address of the first of 16 rows, that of tokens, K, the addresses
    of scales float32 [K/64, 16] and of float32 [16, 16] (tokens, rows) to write, and the bytes to
    the rows that come next. Tokens are turned: digits [num_parts, K/4, 16, 4], steps [K/64, 16],
    starts [2, K/64, 16]. A line of a tile is a row of weights as it lies, a column a token; while
    the unit multiplies a block, the one before it is scaled and added.
    """

    def generate(
        _features: Any,
        b: Any,
        weights: Any,
        x: Any,
        columns: Any,
        scales: Any,
        out: Any,
        ahead: Any,
    ) -> None:
        lines, size = b.udiv(columns, I64(LINE)), 4 * LANES * TILE_ROWS
        digits = b.mul(columns, I64(LANES))
        steps = offset(b, x, num_parts, digits)
        both = b.ptrtoint(cgutils.alloca_once(b, I32, 2 * num_parts * size // 4), I64)
        sums = accumulators(b, TILE_ROWS, FLOATS)
        for cell in sums:
            b.store(ir.Constant(FLOATS, [0.0] * LANES), cell)
        rows = [offset(b, weights, r, columns) for r in range(TILE_ROWS)]
        configure_tiles(b)
        with cgutils.for_range(b, b.add(lines, I64(1))) as blocks:
            turn = b.mul(b.and_(blocks.index, I64(1)), I64(num_parts * size))
            here, other = b.add(both, turn), b.add(both, b.sub(I64(num_parts * size), turn))
            with b.if_then(b.icmp_signed("<", blocks.index, lines)):
                k = b.mul(blocks.index, I64(LINE))
                _prefetch(b, rows, k, columns, ahead)
                load_tile(b, 0, b.add(weights, k), columns)
                for part in range(num_parts):
                    at = b.add(offset(b, x, part, digits), b.mul(k, I64(LANES)))
                    load_tile(b, 1 + part, at, I64(LINE))
                    tile_call(b, "tilezero", I8(4 + part))
                    tile_call(b, "tdpbusd", I8(4 + part), I8(0), I8(1 + part))
                    to = b.inttoptr(b.add(here, I64(size * part)), I8.as_pointer())
                    tile_call(b, "tilestored64", I8(4 + part), to, I64(LINE))
            with b.if_then(b.icmp_signed(">", blocks.index, I64(0))):
                block = b.mul(b.sub(blocks.index, I64(1)), I64(4 * LANES))
                step = load(b, b.add(steps, block), FLOATS)
                starts = [
                    load(b, b.add(offset(b, steps, i, b.mul(lines, I64(4 * LANES))), block), INTS)
                    for i in (1, 2)
                ]
                for r, cell in enumerate(sums):
                    line = b.add(other, I64(LINE * r))
                    products = [
                        load(b, b.add(line, I64(size * part)), INTS) for part in range(num_parts)
                    ]
                    scale = splat(b, load(b, b.add(scales, b.add(block, I64(4 * r))), FLOAT))
                    total, factor = _join(b, products, starts), b.fmul(scale, step)
                    b.store(multiply_add(b, total, factor, b.load(cell)), cell)
        tile_call(b, "tilerelease")
        of_rows = [b.bitcast(b.load(cell), INTS) for cell in sums]
        for token, turned in enumerate(_turn(b, of_rows)):
            to = pointer(b, b.add(out, I64(4 * TILE_ROWS * token)), INTS)
            b.store(turned, to, align=4)

    return vector_function(f"matrix_rows_{num_parts}", 6, generate)


def wide_rows() -> Any:
    """`float_tile` for one token and rows that are widened to floats already: the same bits.

    The Numba function takes the addresses of x float32 [K], rows float32 [4, K] and scales float32
    [4, K/G], then K/G, G, whether the rows are four (else one, four times), and the address of
    float32 [4] to write. Numbers past the last 16 of a group are left out.
    """

    def generate(
        _features: Any,
        b: Any,
        x: Any,
        rows: Any,
        scales: Any,
        num_groups: Any,
        group_size: Any,
        several: Any,
        out: Any,
    ) -> None:
        columns = b.mul(b.mul(num_groups, group_size), I64(4))
        stride, scale_stride = b.mul(columns, several), b.mul(b.mul(num_groups, I64(4)), several)
        sums, parts = accumulators(b, ROWS, FLOATS), accumulators(b, ROWS, FLOATS)
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        for cell in sums:
            b.store(zero, cell)
        with cgutils.for_range(b, num_groups) as groups:
            begin = b.mul(groups.index, group_size)
            for part in parts:
                b.store(zero, part)
            with cgutils.for_range(b, b.udiv(group_size, I64(LANES))) as loop:
                k = b.mul(b.add(begin, b.mul(loop.index, I64(LANES))), I64(4))
                token = load(b, b.add(x, k), FLOATS)
                for r, part in enumerate(parts):
                    row = load(b, b.add(offset(b, rows, r, stride), k), FLOATS)
                    b.store(multiply_add(b, row, token, b.load(part)), part)
            at = b.add(scales, b.mul(groups.index, I64(4)))
            for r, (part, cell) in enumerate(zip(parts, sums, strict=True)):
                step = splat(b, load(b, offset(b, at, r, scale_stride), FLOAT))
                b.store(multiply_add(b, b.load(part), step, b.load(cell)), cell)
        store_sums(b, sums, out)

    return vector_function("wide_rows", 7, generate)


def finish_tile(use: str) -> Any:
    """The products of 16 rows with tokens, finished: stored, added or gated.

    The Numba function takes the addresses of sums float32 [tokens, 16], of factors and then biases
    float32 [2, 16], and of y, the bytes between tokens there, and the number of tokens. With
    p = sums * factors + biases: y = p, y += p, or y = silu(y) p.
    """

    def generate(
        _features: Any, b: Any, sums: Any, factors: Any, y: Any, stride: Any, tokens: Any
    ) -> None:
        factor = load(b, factors, FLOATS)
        bias = load(b, b.add(factors, I64(4 * LANES)), FLOATS)
        with cgutils.for_range(b, tokens) as loop:
            of_token = load(b, offset(b, sums, loop.index, I64(4 * LANES)), FLOATS)
            product = multiply_add(b, of_token, factor, bias)
            to = pointer(b, offset(b, y, loop.index, stride), FLOATS)
            if use == "add":
                product = b.fadd(b.load(to, align=4), product)
            elif use == "gate":
                gate = b.load(to, align=4)
                one = ir.Constant(FLOATS, [1.0] * LANES)
                below = b.fadd(one, exp_of(b, b.fneg(gate)))
                product = b.fmul(b.fdiv(gate, below), product)
            b.store(product, to, align=4)

    return vector_function(f"finish_tile_{use}", 5, generate)


def _turn(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 words, transposed."""
    for step, (low, high) in enumerate(_turns()):
        distance = 1 << step
        turned = list(rows)
        for i in range(LANES):
            if not i & distance:
                pair = rows[i], rows[i + distance]
                turned[i] = builder.shuffle_vector(*pair, low)
                turned[i + distance] = builder.shuffle_vector(*pair, high)
        rows = turned
    return [rows[_place(word)] for word in range(LANES)]


def _turns() -> list[tuple[Any, Any]]:
    """What pairs of vectors are shuffled to in the four steps that exchange rows and columns."""
    steps = (
        (_unpack(1, 0), _unpack(1, 1)),
        (_unpack(2, 0), _unpack(2, 1)),
        (_quarters(0, 2), _quarters(1, 3)),
        (_quarters(0, 2), _quarters(1, 3)),
    )
    return [(ir.Constant(INTS, low), ir.Constant(INTS, high)) for low, high in steps]


def _unpack(width: int, high: int) -> list[int]:
    """Words of two vectors in turn, `width` at a time, of the low or high half of each quarter."""
    lanes = []
    for quarter in range(4):
        for i in range(2 // width):
            at = 4 * quarter + 2 * high + i * width
            lanes += [*range(at, at + width), *range(LANES + at, LANES + at + width)]
    return lanes


def _quarters(first: int, second: int) -> list[int]:
    """Two quarters of a vector, then the same two of another."""
    return [
        base + 4 * quarter + i
        for base in (0, LANES)
        for quarter in (first, second)
        for i in range(4)
    ]


def _place(word: int) -> int:
    """Where the four steps of `_turn` leave a word: the middle two of each four are swapped."""
    return word & ~3 | (word & 1) << 1 | (word & 2) >> 1


def _dot_line(features: Any, builder: Any, weights: list[Any], x: Any) -> Any:
    """Sums of 16 rows' 64 bytes times 64 digits at an address, summed in two chains."""
    sums = [constant(0)] * CHAINS
    for i, quad in enumerate(weights):
        digits = splat_int(builder, load(builder, builder.add(x, I64(4 * i)), I32))
        signed = builder.bitcast(digits, BYTES64)
        unsigned = builder.bitcast(quad, BYTES64)
        sums[i % CHAINS] = dot_bytes(features, builder, sums[i % CHAINS], unsigned, signed)
    return builder.add(*sums)


def _join(builder: Any, digits: list[Any], starts: list[Any]) -> Any:
    """Sums of products with one to three digits as floats; the lower two fit an int32."""
    total = digits[0]
    if len(digits) > 1:
        total = builder.add(total, builder.shl(digits[1], constant(8)))
    joined = builder.sitofp(builder.add(total, starts[0]), FLOATS)
    if len(digits) < 3:
        return joined
    third = builder.sitofp(builder.add(digits[2], starts[1]), FLOATS)
    weight = ir.Constant(FLOATS, [65536.0] * LANES)
    return multiply_add(builder, third, weight, joined)
