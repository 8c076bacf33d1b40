"""Vectors of 16 lanes for the CPU's tiles, written as LLVM: types, memory, arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
OFFSET = 128
LINE = 64
"""Bytes of a cache line, and bytes that one integer product takes of a row."""

I8, I32, I64 = (ir.IntType(bits) for bits in (8, 32, 64))
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(I32, LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)
SHORTS = ir.VectorType(ir.IntType(16), LANES)
BYTES16 = ir.VectorType(I8, LANES)
BYTES64 = ir.VectorType(I8, LINE)
INTS64 = ir.VectorType(I32, LINE)


def vector_function(name: str, num_arguments: int, generate: Callable[..., None]) -> Any:
    """A Numba function of int64 that writes LLVM by `generate(features, builder, *values)`."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        features = frozenset(context.codegen().magic_tuple()[2].split(","))
        generate(features, builder, *values)
        return context.get_dummy_value()

    typed = types.void(*[types.int64] * num_arguments), codegen

    def of_3(typing: Any, a: Any, b: Any, c: Any) -> Any:
        return typed

    def of_5(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        return typed

    def of_6(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        return typed

    def of_7(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
        return typed

    def of_8(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
        return typed

    definition = {3: of_3, 5: of_5, 6: of_6, 7: of_7, 8: of_8}[num_arguments]
    definition.__name__ = name
    return intrinsic(definition)


def pointer(builder: Any, address: Any, machine_type: Any) -> Any:
    """An address as a pointer to `machine_type`."""
    return builder.inttoptr(address, machine_type.as_pointer())


def load(builder: Any, address: Any, machine_type: Any) -> Any:
    """The value at an address, aligned or not."""
    return builder.load(pointer(builder, address, machine_type), align=1)


def offset(builder: Any, base: Any, index: Any, stride: Any) -> Any:
    """base + index stride."""
    index = I64(index) if isinstance(index, int) else index
    return builder.add(base, builder.mul(index, stride))


def call(builder: Any, name: str, result: Any, *values: Any, **flags: Any) -> Any:
    """Call LLVM's intrinsic `name`."""
    signature = ir.FunctionType(result, [value.type for value in values])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, signature, name), values, **flags
    )


def constant(value: int) -> Any:
    """16 times an int32."""
    return ir.Constant(INTS, [value] * LANES)


def splat(builder: Any, value: Any) -> Any:
    """16 times a float."""
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, constant(0))


def splat_int(builder: Any, value: Any) -> Any:
    """16 times an int32."""
    one = builder.insert_element(ir.Constant(INTS, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, constant(0))


def signed_weights(builder: Any, address: Any) -> Any:
    """16 packed bytes q + 128 as the float32 numbers q."""
    packed = load(builder, address, BYTES16)
    return builder.sitofp(builder.sub(builder.zext(packed, INTS), constant(OFFSET)), FLOATS)


def multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once."""
    return call(builder, f"llvm.fma.v{LANES}f32", FLOATS, x, y, z)


def accumulators(builder: Any, count: int, machine_type: Any) -> list[Any]:
    """Cells for sums, which LLVM keeps in registers, zero at first."""
    zero = ir.Constant(machine_type, [0] * LANES)
    return [cgutils.alloca_once_value(builder, zero) for _ in range(count)]


def dot_bytes(features: Any, builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Lane j of `sums` plus four products of bytes 4 j .. 4 j + 3, unsigned times signed."""
    if "+avx512vnni" in features:
        quads = (builder.bitcast(v, INTS) for v in (unsigned, signed))
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, sums, *quads)
    products = builder.mul(builder.zext(unsigned, INTS64), builder.sext(signed, INTS64))
    for part in range(4):
        lanes = ir.Constant(INTS, [4 * lane + part for lane in range(LANES)])
        sums = builder.add(sums, builder.shuffle_vector(products, products, lanes))
    return sums


def record_stride(builder: Any, columns: Any, num_groups: Any) -> Any:
    """Bytes of a record, in whole lines: digits, steps, starts (decode_products.record_bytes)."""
    used = builder.add(columns, builder.mul(num_groups, I64(8)))
    return builder.and_(builder.add(used, I64(LINE - 1)), I64(-LINE))
