"""What the CPU's kernels need of LLVM: memory by address, atomics, and tiles of products.

LLVM's auto-vectorizer meets bytes, groups and sums and makes poor loops of them. So the inner loops
are written in LLVM vectors of 16 lanes, by Python that repeats a line for each row and token of a
tile; LLVM gives each vector the registers the CPU has: one of AVX-512, two of AVX2, four of NEON.
To Numba a tile is one function of addresses (int64).

What a weight costs: 16 bytes become float32 weights by vpmovzxbd, vpaddd, vcvtdq2ps and vmulps (q
times its scale is exact in float32 for scales of 8 bits), and meet each token in one vfmadd. With
int8 activations 64 products are one vpdpbusd where the CPU has VNNI: the stored byte q + 128 is
unsigned and x is signed, as it wants them, and 128 sum(x) of a group is taken off at the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
OFFSET = 128
BLOCK_ROWS = 32
"""Rows of weights that meet many tokens at once."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_I32, LANES)
_BYTES16 = ir.VectorType(_I8, LANES)
_BYTES64 = ir.VectorType(_I8, 4 * LANES)
_INTS64 = ir.VectorType(_I32, 4 * LANES)
_MACHINE_TYPE = {
    types.int64: _I64,
    types.uint64: _I64,
    types.int32: _I32,
    types.uint32: _I32,
    types.uint16: _I16,
    types.int8: _I8,
    types.uint8: _I8,
    types.float32: _FLOAT,
}


def _operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a Numba function of one that writes LLVM: `function(builder, *values)`."""

    def decorate(function: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            value = function(builder, *values)
            return context.get_dummy_value() if result is types.void else value

        typed = result(*arguments), generate
        by_arity: tuple[Callable[..., Any], ...] = (
            lambda typing: typed,
            lambda typing, a: typed,
            lambda typing, a, b: typed,
            lambda typing, a, b, c: typed,
        )
        definition = by_arity[len(arguments)]
        definition.__name__, definition.__doc__ = function.__name__, function.__doc__
        return intrinsic(definition)

    return decorate


def _pointer(builder: Any, address: Any, machine_type: Any) -> Any:
    return builder.inttoptr(address, machine_type.as_pointer())


def _call(builder: Any, name: str, result: Any, *values: Any, **flags: Any) -> Any:
    """Call LLVM's intrinsic `name`."""
    signature = ir.FunctionType(result, [value.type for value in values])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, signature, name), values, **flags
    )


def _constant(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


@intrinsic  # type: ignore[untyped-decorator]
def load(_typing: Any, address: Any, dtype: Any) -> Any:
    """The scalar of `dtype` at `address`."""
    result = dtype.dtype
    machine_type = _MACHINE_TYPE[result]

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.load(_pointer(builder, values[0], machine_type), align=1)

    return result(types.int64, dtype), generate


@_operation(types.void, types.int64, types.float32)
def store(builder: Any, address: Any, value: Any) -> None:
    """Write a float32."""
    builder.store(value, _pointer(builder, address, _FLOAT), align=4)


@_operation(types.void, types.int64, types.int32)
def store_int(builder: Any, address: Any, value: Any) -> None:
    """Write an int32."""
    builder.store(value, _pointer(builder, address, _I32), align=1)


@_operation(types.void, types.int64, types.int8)
def store_byte(builder: Any, address: Any, value: Any) -> None:
    """Write an int8."""
    builder.store(value, _pointer(builder, address, _I8))


@_operation(types.void, types.int64, types.uint16)
def store_half(builder: Any, address: Any, value: Any) -> None:
    """Write 16 bits."""
    builder.store(value, _pointer(builder, address, _I16), align=2)


@_operation(types.int64, types.voidptr)
def address_of(builder: Any, pointer: Any) -> Any:
    """A C pointer as an address."""
    return builder.ptrtoint(pointer, _I64)


@_operation(types.float32, types.uint32)
def float_from_bits(builder: Any, bits: Any) -> Any:
    """The float32 with these bits."""
    return builder.bitcast(bits, _FLOAT)


@_operation(types.uint32, types.float32)
def bits_of(builder: Any, value: Any) -> Any:
    """The bits of a float32."""
    return builder.bitcast(value, _I32)


@_operation(types.float32, types.uint16)
def from_float16(builder: Any, bits: Any) -> Any:
    """The float32 equal to a float16, given as its bits."""
    return builder.fpext(builder.bitcast(bits, ir.HalfType()), _FLOAT)


@_operation(types.uint16, types.float32)
def to_float16(builder: Any, value: Any) -> Any:
    """The bits of the nearest float16."""
    return builder.bitcast(builder.fptrunc(value, ir.HalfType()), _I16)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, _constant(0))


def _load(builder: Any, address: Any, machine_type: Any) -> Any:
    return builder.load(_pointer(builder, address, machine_type), align=1)


def _offset(builder: Any, base: Any, index: Any, stride: Any) -> Any:
    return builder.add(base, builder.mul(_I64(index), stride))


def _weights(builder: Any, address: Any) -> Any:
    """16 packed bytes q + 128 as the float32 numbers q."""
    packed = _load(builder, address, _BYTES16)
    return builder.sitofp(builder.sub(builder.zext(packed, _INTS), _constant(OFFSET)), _FLOATS)


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, x, y, z)


def _fold(builder: Any, x: Any) -> Any:
    """Sum of the lanes, in halves."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    return _call(builder, name, _FLOAT, ir.Constant(_FLOAT, 0.0), x, fastmath=("reassoc",))


def _accumulators(builder: Any, count: int, machine_type: Any) -> list[Any]:
    zero = ir.Constant(machine_type, [0] * LANES)
    return [cgutils.alloca_once_value(builder, zero) for _ in range(count)]


def _prefetch_next(builder: Any, at: Any, num_rows: int, columns: Any, group_size: Any) -> None:
    """Ask for a group of the rows after these: four streams are too many for a CPU to guess."""
    ahead = builder.add(at, builder.mul(_I64(num_rows), columns))
    with cgutils.for_range(builder, builder.udiv(group_size, _I64(64))) as lines:
        line = builder.add(ahead, builder.mul(lines.index, _I64(64)))
        for r in range(num_rows):
            pointer = _pointer(builder, _offset(builder, line, r, columns), _I8)
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _I32(0), _I32(3), _I32(1))


def _store_sums(builder: Any, sums: list[Any], num_tokens: int, out: Any, stride: Any) -> None:
    for i, cell in enumerate(sums):
        row, token = divmod(i, num_tokens)
        address = builder.add(_offset(builder, out, row, stride), _I64(4 * token))
        builder.store(
            _fold(builder, builder.load(cell)), _pointer(builder, address, _FLOAT), align=4
        )


def _intrinsic_of_addresses(name: str, generate: Callable[..., None]) -> Any:
    """A Numba function of 7 int64 that writes LLVM by `generate(features, builder, *values)`."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        features = frozenset(context.codegen().magic_tuple()[2].split(","))
        generate(features, builder, *values)
        return context.get_dummy_value()

    def define(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
        return types.void(*[types.int64] * 7), codegen

    define.__name__ = name
    return intrinsic(define)


def float_tile(num_rows: int, num_tokens: int) -> Any:
    """The product of some rows of weights with some tokens, in registers.

    The Numba function takes the addresses of x float32 [num_tokens, K], packed [num_rows, K] and
    scales float32 [num_rows, K/G], then K/G, G, and the address of float32 [num_rows, num_tokens]
    to write with the bytes between its rows. Weights past the last 16 of a group are left out.
    One token is cheaper if its groups are scaled, several if the weights are.
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
        out_stride: Any,
    ) -> None:
        columns, scale_stride = b.mul(num_groups, group_size), b.mul(num_groups, _I64(4))
        sums = _accumulators(b, num_rows * num_tokens, _FLOATS)
        parts = _accumulators(b, num_rows, _FLOATS) if num_tokens == 1 else sums
        with cgutils.for_range(b, num_groups) as groups:
            scale_at = b.add(scales, b.mul(groups.index, _I64(4)))
            steps = [
                _splat(b, _load(b, _offset(b, scale_at, r, scale_stride), _FLOAT))
                for r in range(num_rows)
            ]
            begin = b.mul(groups.index, group_size)
            if num_tokens == 1:
                _prefetch_next(b, b.add(weights, begin), num_rows, columns, group_size)
                for part in parts:
                    b.store(ir.Constant(_FLOATS, [0.0] * LANES), part)
            with cgutils.for_range(b, b.udiv(group_size, _I64(LANES))) as loop:
                k = b.add(begin, b.mul(loop.index, _I64(LANES)))
                x_at, weights_at = b.add(x, b.mul(k, _I64(4))), b.add(weights, k)
                tokens = [
                    _load(b, _offset(b, x_at, m, b.mul(columns, _I64(4))), _FLOATS)
                    for m in range(num_tokens)
                ]
                for r in range(num_rows):
                    row = _weights(b, _offset(b, weights_at, r, columns))
                    if num_tokens > 1:
                        row = b.fmul(row, steps[r])
                    for m, token in enumerate(tokens):
                        cell = parts[r * num_tokens + m]
                        b.store(_multiply_add(b, row, token, b.load(cell)), cell)
            if num_tokens == 1:
                for part, step, cell in zip(parts, steps, sums, strict=True):
                    b.store(_multiply_add(b, b.load(part), step, b.load(cell)), cell)
        _store_sums(b, sums, num_tokens, out, out_stride)

    return _intrinsic_of_addresses(f"float_tile_{num_rows}x{num_tokens}", generate)


def int8_tile(num_rows: int, num_tokens: int) -> Any:
    """`float_tile` for x rounded to int8 in groups of a multiple of 64 weights.

    A token at `x` is a record of int8 [K], float32 [K/G] steps and int32 [K/G] -128 sum(x).
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
        columns, scale_stride = b.mul(num_groups, group_size), b.mul(num_groups, _I64(4))
        x_stride = b.add(columns, b.mul(num_groups, _I64(8)))
        sums = _accumulators(b, num_rows * num_tokens, _FLOATS)
        parts = _accumulators(b, num_rows * num_tokens, _INTS)
        steps_at = b.add(x, columns)
        starts_at = b.add(steps_at, scale_stride)
        with cgutils.for_range(b, num_groups) as groups:
            group_bytes = b.mul(groups.index, _I64(4))
            begin = b.mul(groups.index, group_size)
            starts, steps = (
                [
                    _load(b, b.add(_offset(b, base, m, x_stride), group_bytes), kind)
                    for m in range(num_tokens)
                ]
                for base, kind in ((starts_at, _I32), (steps_at, _FLOAT))
            )
            for i, cell in enumerate(parts):
                start = b.insert_element(_constant(0), starts[i % num_tokens], _I32(0))
                b.store(start, cell)
            with cgutils.for_range(b, b.udiv(group_size, _I64(4 * LANES))) as loop:
                k = b.add(begin, b.mul(loop.index, _I64(4 * LANES)))
                tokens = [
                    _load(b, _offset(b, b.add(x, k), m, x_stride), _BYTES64)
                    for m in range(num_tokens)
                ]
                for r in range(num_rows):
                    row = _load(b, _offset(b, b.add(weights, k), r, columns), _BYTES64)
                    for m, token in enumerate(tokens):
                        cell = parts[r * num_tokens + m]
                        b.store(_dot_bytes(features, b, b.load(cell), row, token), cell)
            for r in range(num_rows):
                scale_at = b.add(_offset(b, scales, r, scale_stride), group_bytes)
                scale = _load(b, scale_at, _FLOAT)
                for m in range(num_tokens):
                    i = r * num_tokens + m
                    part = b.sitofp(b.load(parts[i]), _FLOATS)
                    step = _splat(b, b.fmul(scale, steps[m]))
                    b.store(_multiply_add(b, part, step, b.load(sums[i])), sums[i])
        _store_sums(b, sums, num_tokens, out, out_stride)

    return _intrinsic_of_addresses(f"int8_tile_{num_rows}x{num_tokens}", generate)


def int8_block(num_tokens: int) -> Any:
    """32 rows of weights, interleaved, times some tokens rounded to int8: for many tokens.

    A lane is a row here, so nothing is folded and four bytes of a token meet all rows at once.
    The Numba function takes the addresses of the tokens' records (as in `int8_tile`), of packed
    [K/4, 32, 4] and scales float32 [K/G, 32], then K/G, G, and the address of float32
    [num_tokens, 32] to write with the bytes between its rows.
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
        x_stride = b.add(columns, b.mul(num_groups, _I64(8)))
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

    return _intrinsic_of_addresses(f"int8_block_{num_tokens}", generate)


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


@_operation(types.int64, types.int64, types.int64)
def fetch_add(builder: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at `address`, at once for all threads; returns what it was."""
    return builder.atomic_rmw("add", _pointer(builder, address, _I64), value, "seq_cst")


@_operation(types.int64, types.int64)
def load_shared(builder: Any, address: Any) -> Any:
    """The int64 at `address` as other threads see it."""
    return builder.load_atomic(_pointer(builder, address, _I64), "acquire", 8)


def inline(function: Any) -> Any:
    """A part of a kernel, compiled into it: no exceptions, sums in any order."""
    flags = {"reassoc", "contract", "nsz", "arcp"}
    return numba.njit(error_model="numpy", fastmath=flags, nogil=True)(function)


@_operation(types.voidptr, types.int64)
def pointer_to(builder: Any, address: Any) -> Any:
    """An address as a C pointer, for `carray`."""
    return builder.inttoptr(address, _I8.as_pointer())
