"""The two inner loops of `fast_pass`, written in vectors of 16 floats.

A compiler may not reorder a float sum, so of the definition's fixed order it makes scalar code, ten
times slower. Here the order is spelled out in LLVM's own vectors, which become whatever the
processor has: one register of AVX-512, two of AVX2, four of NEON. Neither contracts nor reorders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
CANDIDATES = 8
"""Scales that are tried at once."""
QMAX = 127.0
OFFSET = 128
FLOATS = ir.VectorType(ir.FloatType(), LANES)
INDEX = ir.IntType(32)
INTS = ir.VectorType(INDEX, LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)


@intrinsic  # type: ignore[untyped-decorator]
def squared_errors(typing: Any, group: Any, inverses: Any, scales: Any, errors: Any) -> Any:
    """Of CANDIDATES scales s the sum of (w - q s)^2 over a group of 16 i float32 weights.

    Each in the definition's order, side by side: one alone would wait for its own sums. With
    inverse and scale 0 it is the sum of w^2.
    """
    signature = numba.void(group, inverses, scales, errors)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        at = [
            cgutils.create_struct_proxy(typed)(context, builder, value).data
            for typed, value in zip((inverses, scales, errors), arguments[1:], strict=True)
        ]
        cells = [[builder.gep(base, [INDEX(c)]) for c in range(CANDIDATES)] for base in at]
        tried = [
            tuple(_splat(builder, builder.load(cell)) for cell in pair)
            for pair in zip(*cells[:2], strict=True)
        ]
        empty = ir.Constant(FLOATS, None)
        totals = [cgutils.alloca_once_value(builder, empty) for _ in tried]
        for total in totals:
            builder.store(empty, total)
        with _vectors(context, builder, group, arguments[0]) as (_index, weights):
            for (inverse, scale), total in zip(tried, totals, strict=True):
                q = _rounded(builder, weights, inverse)
                error = builder.fsub(weights, builder.fmul(q, scale))
                builder.store(builder.fadd(builder.load(total), builder.fmul(error, error)), total)
        for total, cell in zip(totals, cells[2], strict=True):
            builder.store(_folded(builder, builder.load(total)), cell)
        return context.get_dummy_value()

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def store_group(typing: Any, group: Any, inverse: Any, packed: Any) -> Any:
    """Write q + 128 of every weight to `packed` (uint8); returns how many q are 0."""
    signature = numba.int64(group, numba.float32, packed)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        inverses = _splat(builder, arguments[1])
        out = cgutils.create_struct_proxy(packed)(context, builder, arguments[2])
        count = ir.IntType(64)
        zeros = cgutils.alloca_once_value(builder, ir.Constant(count, 0))
        with _vectors(context, builder, group, arguments[0]) as (index, weights):
            q = _rounded(builder, weights, inverses)
            stored = builder.add(builder.fptosi(q, INTS), ir.Constant(INTS, [OFFSET] * LANES))
            at = builder.bitcast(builder.gep(out.data, [index]), BYTES.as_pointer())
            builder.store(builder.trunc(stored, BYTES), at, align=1)
            is_zero = builder.fcmp_ordered("==", q, ir.Constant(FLOATS, None))
            found = builder.ctpop(builder.bitcast(is_zero, ir.IntType(LANES)))
            builder.store(builder.add(builder.load(zeros), builder.zext(found, count)), zeros)
        return builder.load(zeros)

    return signature, generate


@contextmanager
def _vectors(context: Any, builder: Any, typed: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """The body of a loop over a float32 array: (index of the first, 16 weights)."""
    array = cgutils.create_struct_proxy(typed)(context, builder, value)
    stop = builder.extract_value(array.shape, 0)
    step, start = ir.Constant(stop.type, LANES), ir.Constant(stop.type, 0)
    with cgutils.for_range_slice(builder, start, stop, step) as (index, _):
        at = builder.bitcast(builder.gep(array.data, [index]), FLOATS.as_pointer())
        yield index, builder.load(at, align=4)


def _rounded(builder: Any, weights: Any, inverses: Any) -> Any:
    """q = rint(w / s), half to even, clipped to -127..127, as floats."""
    kind = ir.FunctionType(FLOATS, [FLOATS])
    rint = cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{LANES}f32")
    q = builder.call(rint, [builder.fmul(weights, inverses)])
    high, low = (ir.Constant(FLOATS, [limit] * LANES) for limit in (QMAX, -QMAX))
    q = builder.select(builder.fcmp_ordered("<", q, high), q, high)
    return builder.select(builder.fcmp_ordered(">", q, low), q, low)


def _splat(builder: Any, value: Any) -> Any:
    """A vector of 16 copies."""
    undefined = ir.Constant(FLOATS, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(INDEX, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(INTS, [0] * LANES))


def _folded(builder: Any, total: Any) -> Any:
    """Lanes added in halves: j and j + 8, then j and j + 4, j + 2, j + 1."""
    width = LANES
    while width > 1:
        width //= 2
        index = ir.VectorType(INDEX, width)
        low = builder.shuffle_vector(total, total, ir.Constant(index, list(range(width))))
        high = ir.Constant(index, list(range(width, 2 * width)))
        total = builder.fadd(low, builder.shuffle_vector(total, total, high))
    return builder.extract_element(total, ir.Constant(INDEX, 0))
