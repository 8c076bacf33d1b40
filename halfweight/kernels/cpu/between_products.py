"""What a layer does between its products on a CPU: norms, rotation, e^x; and waiting for a phase.

batch_step.py has the threads go through all layers together. A phase's rows are taken by tickets,
and it ends when all its rows are done, not when all threads are there: a thread that the system
has put aside holds up nobody unless it holds rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import carray, float32, int32, int64, uint32

from halfweight.kernels.cpu.llvm import float_from_bits, inline, load_shared, pointer_to

SPINS = 3000
"""Looks at a counter before a thread offers its core to others."""
LOG2_E = float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = float32(0.693359375), float32(-2.12194440e-4)

_yield_core = numba.types.ExternalFunction("sched_yield", numba.types.int32())


@inline
def floats_at(address: Any, count: Any) -> Any:
    """`count` float32 at an address as an array."""
    return carray(pointer_to(address), count, float32)


@inline
def wait_for(done: Any, total: Any) -> None:
    """Wait until a phase's rows are done; what was written for them is then seen here."""
    spins = int64(0)
    while load_shared(done) < total:
        spins += 1
        if spins > SPINS:
            _yield_core()


@numba.njit(error_model="numpy", nogil=True)  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """e^x to two units in the last place, in arithmetic that LLVM vectorizes."""
    x = min(max(x, float32(-87)), float32(88))
    power = np.rint(x * LOG2_E)
    x = x - power * LN2_HIGH - power * LN2_LOW
    y = float32(1.9875691500e-4)
    y = y * x + float32(1.3981999507e-3)
    y = y * x + float32(8.3334519073e-3)
    y = y * x + float32(4.1665795894e-2)
    y = y * x + float32(1.6666665459e-1)
    y = y * x + float32(5.0000001201e-1)
    y = y * x * x + x + float32(1)
    return y * float_from_bits(uint32(int32(power) + int32(127)) << uint32(23))


@inline
def normalize(x: Any, weight: Any, size: Any, epsilon: Any, to: Any) -> None:
    """RMS norm of float32 [size] at `x` to `to`."""
    values, weights, out = floats_at(x, size), floats_at(weight, size), floats_at(to, size)
    squares = float32(0)
    for i in range(size):
        squares += values[i] * values[i]
    factor = float32(1) / np.sqrt(squares / float32(size) + epsilon)
    for i in range(size):
        out[i] = values[i] * factor * weights[i]


@inline
def rotate(values: Any, size: Any, cos: Any, sin: Any) -> None:
    """Rotary embedding of one head in place; cos and sin float32 [size]."""
    half = size // 2
    head, cosines, sines = floats_at(values, size), floats_at(cos, size), floats_at(sin, size)
    for i in range(half):
        low, high = head[i], head[i + half]
        head[i] = low * cosines[i] - high * sines[i]
        head[i + half] = high * cosines[i + half] + low * sines[i + half]
