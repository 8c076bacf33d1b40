"""What the CPU's kernels need of LLVM besides products: memory by address, bits, atomics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
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


@intrinsic  # type: ignore[untyped-decorator]
def load(_typing: Any, address: Any, dtype: Any) -> Any:
    """The scalar of `dtype` at `address`."""
    result = dtype.dtype
    machine_type = _MACHINE_TYPE[result]

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.load(_pointer(builder, values[0], machine_type), align=1)

    return result(types.int64, dtype), generate


@_operation(types.int64, types.int64, types.int64)
def cell(builder: Any, cells: Any, index: Any) -> Any:
    """An int64 of an array at an address."""
    address = builder.add(cells, builder.mul(index, _I64(8)))
    return builder.load(_pointer(builder, address, _I64), align=8)


@_operation(types.void, types.int64, types.float32)
def store(builder: Any, address: Any, value: Any) -> None:
    """Write a float32."""
    builder.store(value, _pointer(builder, address, _FLOAT), align=4)


@_operation(types.void, types.int64, types.int32)
def store_int(builder: Any, address: Any, value: Any) -> None:
    """Write an int32."""
    builder.store(value, _pointer(builder, address, _I32), align=1)


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


@_operation(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address."""
    byte, values = _pointer(builder, address, _I8), (_I32(0), _I32(3), _I32(1))
    signature = ir.FunctionType(ir.VoidType(), [byte.type, _I32, _I32, _I32])
    name = "llvm.prefetch.p0"
    builder.call(cgutils.get_or_insert_function(builder.module, signature, name), (byte, *values))


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


@intrinsic  # type: ignore[untyped-decorator]
def call_at(_typing: Any, address: Any, arguments: Any) -> Any:
    """Call the C function of int64 at `address` with a tuple of arguments; returns its int64."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        cells = cgutils.unpack_tuple(builder, values[1])
        function = ir.FunctionType(_I64, [_I64] * len(cells)).as_pointer()
        return builder.call(builder.inttoptr(values[0], function), cells)

    return types.int64(types.int64, arguments), generate
