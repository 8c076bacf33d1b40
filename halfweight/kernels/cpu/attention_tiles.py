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
    I64,
    INTS,
    LANES,
    LINE,
    SHORTS,
    accumulators,
    constant,
    load,
    multiply_add,
    offset,
    pointer,
    splat,
    vector_function,
)

KEY_CHAINS = 4
"""Sums that a score is added up in."""
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of a number in a page."""


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
