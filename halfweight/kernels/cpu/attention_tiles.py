"""The inner loops of attention over pages of keys and values: one query or four, each as if alone.

Keys lie transposed, [head_size, page_tokens], so that a lane is a key and nothing is folded; values
lie as [page_tokens, head_size]. Four queries share what it costs to read and widen a number.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from halfweight.kernels.cpu.llvm_vectors import (
    BYTES16,
    FLOAT,
    FLOATS,
    HALVES,
    I32,
    I64,
    INTS,
    LANES,
    LINE,
    SHORTS,
    accumulators,
    call,
    constant,
    load,
    multiply_add,
    offset,
    pointer,
    splat,
    splat_int,
    vector_function,
)

KEY_CHAINS = 4
"""Sums that a score is added up in."""
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of a number in a page."""
LOG2_E = 1.4426950408889634
LN2 = (0.693359375, -2.12194440e-4)
EXP_TERMS = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)
"""Of a polynomial beside 0, highest power first."""


def key_scores(dtype: str, num_queries: int) -> Any:
    """Some queries times keys that lie transposed, a lane a key.

    The Numba function takes the addresses of queries float32 [num_queries, D] and of keys
    [D, page_tokens], D (a multiple of 16), page_tokens, how many blocks of 16 keys are wanted, and
    the address of float32 [num_queries, page_tokens] to write. Each sum runs in four chains.
    """

    def generate(
        _features: Any,
        b: Any,
        queries: Any,
        keys: Any,
        size: Any,
        page_tokens: Any,
        num_blocks: Any,
        out: Any,
    ) -> None:
        stride, zero = b.mul(page_tokens, I64(ITEM[dtype])), ir.Constant(FLOATS, [0.0] * LANES)
        with cgutils.for_range(b, num_blocks) as blocks:
            first = offset(b, keys, blocks.index, I64(LANES * ITEM[dtype]))
            sums = accumulators(b, num_queries * KEY_CHAINS, FLOATS)
            for cell in sums:
                b.store(zero, cell)
            with cgutils.for_range(b, b.udiv(size, I64(KEY_CHAINS))) as loop:
                for chain in range(KEY_CHAINS):
                    d = b.add(b.mul(loop.index, I64(KEY_CHAINS)), I64(chain))
                    key = _numbers(b, dtype, offset(b, first, d, stride))
                    for q in range(num_queries):
                        at = offset(b, offset(b, queries, q, b.mul(size, I64(4))), d, I64(4))
                        cell = sums[q * KEY_CHAINS + chain]
                        number = splat(b, load(b, at, FLOAT))
                        b.store(multiply_add(b, key, number, b.load(cell)), cell)
            for q in range(num_queries):
                parts = [b.load(sums[q * KEY_CHAINS + chain]) for chain in range(KEY_CHAINS)]
                total = b.fadd(b.fadd(parts[0], parts[1]), b.fadd(parts[2], parts[3]))
                row = offset(b, out, q, b.mul(page_tokens, I64(4)))
                to = offset(b, row, blocks.index, I64(4 * LANES))
                b.store(total, pointer(b, to, FLOATS), align=4)

    return vector_function(f"key_scores_{dtype}_{num_queries}", 6, generate)


def value_sums(dtype: str, num_queries: int) -> Any:
    """Values, each times its weight, added to the sums of some queries.

    The Numba function takes the addresses of weights float32 [num_queries, page_tokens] and of
    values [page_tokens, D], D (a multiple of 16), page_tokens, how many values are wanted, and the
    address of float32 [num_queries, D] to add to.
    """

    def generate(
        _features: Any,
        b: Any,
        weights: Any,
        values: Any,
        size: Any,
        page_tokens: Any,
        count: Any,
        out: Any,
    ) -> None:
        rows = [
            (
                offset(b, weights, q, b.mul(page_tokens, I64(4))),
                offset(b, out, q, b.mul(size, I64(4))),
            )
            for q in range(num_queries)
        ]
        wide = b.udiv(size, I64(LINE))
        with cgutils.for_range(b, wide) as loop:
            add(b, rows, values, size, count, b.mul(loop.index, I64(LINE)), LINE)
        begin = b.mul(wide, I64(LINE))
        with cgutils.for_range(b, b.udiv(b.sub(size, begin), I64(LANES))) as loop:
            d = b.add(begin, b.mul(loop.index, I64(LANES)))
            add(b, rows, values, size, count, d, LANES)

    def add(b: Any, rows: Any, values: Any, size: Any, count: Any, d: Any, width: int) -> None:
        """Numbers d .. d + width of all values."""
        stride, at = b.mul(size, I64(ITEM[dtype])), offset(b, values, d, I64(ITEM[dtype]))
        cells = {}
        for q, (_, out) in enumerate(rows):
            for lane in range(0, width, LANES):
                to = pointer(b, b.add(offset(b, out, d, I64(4)), I64(4 * lane)), FLOATS)
                cells[q, lane] = cgutils.alloca_once(b, FLOATS), to
        for cell, to in cells.values():
            b.store(b.load(to, align=4), cell)
        with cgutils.for_range(b, count) as loop:
            row = offset(b, at, loop.index, stride)
            numbers = {
                lane: _numbers(b, dtype, b.add(row, I64(lane * ITEM[dtype])))
                for lane in range(0, width, LANES)
            }
            for q, (weights, _) in enumerate(rows):
                weight = splat(b, load(b, offset(b, weights, loop.index, I64(4)), FLOAT))
                for lane, number in numbers.items():
                    cell, _ = cells[q, lane]
                    b.store(multiply_add(b, number, weight, b.load(cell)), cell)
        for cell, to in cells.values():
            b.store(b.load(cell), to, align=4)

    return vector_function(f"value_sums_{dtype}_{num_queries}", 6, generate)


def weigh_page() -> Any:
    """Scores of a query with the keys of a page to weights, relative to the largest so far.

    The Numba function takes the addresses of scores float32 [16 blocks], of which `count` are to be
    kept and the others become 0, then count, blocks, and the address of float32 [3]: the largest
    score so far, the total of the weights, and what all before is now to be multiplied with.
    """

    def generate(
        _features: Any, b: Any, scores: Any, count: Any, num_blocks: Any, state: Any, _: Any
    ) -> None:
        lowest = ir.Constant(FLOATS, [float("-inf")] * LANES)
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        most, total, factor = (pointer(b, b.add(state, I64(4 * i)), FLOAT) for i in range(3))
        best, added = (cgutils.alloca_once_value(b, value) for value in (lowest, zero))
        b.store(lowest, best)
        b.store(zero, added)
        with cgutils.for_range(b, num_blocks) as blocks:
            at, kept = block_of(b, scores, count, blocks.index)
            found = b.select(kept, b.load(at, align=4), lowest)
            b.store(found, at, align=4)
            b.store(call(b, f"llvm.maximum.v{LANES}f32", FLOATS, b.load(best), found), best)
        name = f"llvm.vector.reduce.fmaximum.v{LANES}f32"
        found = call(b, name, FLOAT, b.load(best))
        before = b.load(most)
        largest = call(b, "llvm.maximum.f32", FLOAT, before, found)
        level = splat(b, largest)
        with cgutils.for_range(b, num_blocks) as blocks:
            at, kept = block_of(b, scores, count, blocks.index)
            weight = b.select(kept, exp_of(b, b.fsub(b.load(at, align=4), level)), zero)
            b.store(weight, at, align=4)
            b.store(b.fadd(b.load(added), weight), added)
        change = exp_of(b, splat(b, b.fsub(before, largest)))
        rescale = b.extract_element(change, I32(0))
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        more = call(b, name, FLOAT, ir.Constant(FLOAT, 0.0), b.load(added), fastmath=("reassoc",))
        b.store(b.fadd(b.fmul(b.load(total), rescale), more), total)
        b.store(largest, most)
        b.store(rescale, factor)

    def block_of(b: Any, scores: Any, count: Any, index: Any) -> tuple[Any, Any]:
        """Where a block is, and which of its lanes are kept."""
        lanes = ir.Constant(INTS, list(range(LANES)))
        left = b.trunc(b.sub(count, b.mul(index, I64(LANES))), I32)
        kept = b.icmp_signed("<", lanes, splat_int(b, left))
        return pointer(b, offset(b, scores, index, I64(4 * LANES)), FLOATS), kept

    return vector_function("weigh_page", 5, generate)


def exp_of(builder: Any, x: Any) -> Any:
    """e^x to two units in the last place (cpu_step.exp)."""

    def number(value: float) -> Any:
        return ir.Constant(FLOATS, [value] * LANES)

    def unary(name: str, *values: Any) -> Any:
        return call(builder, f"llvm.{name}.v{LANES}f32", FLOATS, *values)

    x = unary("minimum", unary("maximum", x, number(-87.0)), number(88.0))
    power = unary("rint", builder.fmul(x, number(LOG2_E)))
    for part in LN2:
        x = multiply_add(builder, power, number(-part), x)
    y = number(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        y = multiply_add(builder, y, x, number(term))
    y = builder.fadd(multiply_add(builder, builder.fmul(y, x), x, x), number(1.0))
    exponent = builder.add(builder.fptosi(power, INTS), constant(127))
    return builder.fmul(y, builder.bitcast(builder.shl(exponent, constant(23)), FLOATS))


def _numbers(builder: Any, dtype: str, address: Any) -> Any:
    """16 numbers at an address as float32."""
    if dtype == "float32":
        return load(builder, address, FLOATS)
    if dtype == "float16":
        return builder.fpext(load(builder, address, HALVES), FLOATS)
    if dtype == "int8":
        return builder.sitofp(load(builder, address, BYTES16), FLOATS)
    words = builder.zext(load(builder, address, SHORTS), INTS)
    return builder.bitcast(builder.shl(words, constant(16)), FLOATS)
