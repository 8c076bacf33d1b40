"""One decode step of a Llama-like model as one kernel: a token in, logits out.

At batch 1 a small model's layer is 20 products of some microseconds, and an interpreter between
them costs more than the products. Here the threads enter once a token and go through all layers
together; they share the rows of each product by tickets and meet five times a layer:

    norm, q k v | rotate, write the cache, attend a head at a time | output, add |
    norm, gate up | down, add

Activations are float32 throughout, the cache is the model's own (transformers' StaticCache, in its
dtype). The norm before a product is computed by every thread for itself: cheaper than to meet.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import carray, float32, int32, int64, uint16, uint32

from halfweight.kernels.cpu_loops import (
    BFLOAT16,
    FLOAT32,
    GROUP,
    IN,
    LINEAR_CELLS,
    OUT,
    PACKED,
    ROWS,
    cell,
    row_scales,
    store_number,
    token_rows,
    weight_at,
)
from halfweight.kernels.simd import (
    address_of,
    call,
    fetch_add,
    float_from_bits,
    from_float16,
    inline,
    load,
    load_shared,
    pointer_to,
    store,
    store_shared,
)

(
    WAITING,
    MEETINGS,
    TEAM_SIZE,
    TICKETS,
    NUM_LAYERS,
    LAYERS,
    HEADS,
    KV_HEADS,
    HEAD_SIZE,
    MAX_LENGTH,
    CACHE_FORMAT,
    TOKEN,
    POSITION,
    EPSILON,
    SCALING,
    COS,
    SIN,
    HIDDEN,
    QKV,
    ATTENDED,
    ACTIVATED,
    LOGITS,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    WIDEST,
) = range(26)
"""Cells of a step; EPSILON and SCALING are bits of a float32, the rest counts and addresses."""
STEP_CELLS = 26

LINEARS = 7
Q, K, V, OUTPUT, GATE, UP, DOWN = (LINEAR_CELLS * i for i in range(LINEARS))
INPUT_NORM, Q_NORM, K_NORM, MIDDLE_NORM, KEYS, VALUES = range(
    LINEAR_CELLS * LINEARS, LINEAR_CELLS * LINEARS + 6
)
LAYER_CELLS = LINEAR_CELLS * LINEARS + 6
"""Cells of a layer: seven linears, addresses of float32 norms (0: none) and of the cache."""

TICKETS_A_LAYER = LINEARS
"""Counters by which threads share the products of a layer, and its heads."""
CHUNK_BYTES = 1 << 14
SPINS = 3000
"""Looks at a meeting before a thread offers its core to others."""
LOG2_E = float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = float32(0.693359375), float32(-2.12194440e-4)

_yield_core = numba.types.ExternalFunction("sched_yield", numba.types.int32())


@inline
def floats_at(address: Any, count: Any) -> Any:
    """`count` float32 at an address as an array."""
    return carray(pointer_to(address), count, float32)


@inline
def meet(step: Any, team: Any) -> None:
    """Wait until all threads are here; what they wrote before is then seen by all."""
    if team == 1:
        return
    meeting = load_shared(step + 8 * MEETINGS)
    if fetch_add(step + 8 * WAITING, 1) == team - 1:
        store_shared(step + 8 * WAITING, 0)
        store_shared(step + 8 * MEETINGS, meeting + 1)
        return
    spins = int64(0)
    while load_shared(step + 8 * MEETINGS) == meeting:
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
def share(linear: Any, ticket: Any, x: Any, scratch: Any, y: Any) -> None:
    """y [N] = a linear times x; threads take chunks of rows."""
    chunk = max(int64(ROWS), CHUNK_BYTES // cell(linear, IN) // ROWS * ROWS)
    out_features = cell(linear, OUT)
    while True:
        begin = fetch_add(ticket, chunk)
        if begin >= out_features:
            return
        end = min(begin + chunk, out_features)
        token_rows(linear, begin, end, x, scratch, y, FLOAT32)


@inline
def share_and_add(linear: Any, ticket: Any, x: Any, scratch: Any, part: Any, y: Any) -> None:
    """y [N] += a linear times x."""
    chunk = max(int64(ROWS), CHUNK_BYTES // cell(linear, IN) // ROWS * ROWS)
    out_features = cell(linear, OUT)
    while True:
        begin = fetch_add(ticket, chunk)
        if begin >= out_features:
            return
        end = min(begin + chunk, out_features)
        token_rows(linear, begin, end, x, scratch, part - 4 * begin, FLOAT32)
        for n in range(begin, end):
            total = load(y + 4 * n, float32) + load(part + 4 * (n - begin), float32)
            store(y + 4 * n, total)


@inline
def share_gated(layer: Any, ticket: Any, x: Any, scratch: Any, part: Any, y: Any) -> None:
    """y [F] = silu(gate x) * (up x)."""
    gate, up = layer + 8 * GATE, layer + 8 * UP
    chunk = max(int64(ROWS), CHUNK_BYTES // cell(gate, IN) // ROWS * ROWS)
    while True:
        begin = fetch_add(ticket, chunk)
        if begin >= cell(gate, OUT):
            return
        end = min(begin + chunk, cell(gate, OUT))
        token_rows(gate, begin, end, x, scratch, y, FLOAT32)
        token_rows(up, begin, end, x, scratch, part - 4 * begin, FLOAT32)
        gates, ups = floats_at(y + 4 * begin, end - begin), floats_at(part, end - begin)
        for i in range(end - begin):
            gates[i] = gates[i] / (float32(1) + exp(-gates[i])) * ups[i]


@inline
def rotate(values: Any, size: Any, cos: Any, sin: Any) -> None:
    """Rotary embedding of one head in place; cos and sin float32 [size]."""
    half = size // 2
    head, cosines, sines = floats_at(values, size), floats_at(cos, size), floats_at(sin, size)
    for i in range(half):
        low, high = head[i], head[i + half]
        head[i] = low * cosines[i] - high * sines[i]
        head[i + half] = high * cosines[i + half] + low * sines[i + half]


@inline
def dot_cached(query: Any, row: Any, size: Any, number_format: Any) -> Any:
    """query float32 [size] times one cached key."""
    total = float32(0)
    if number_format == FLOAT32:
        keys = floats_at(row, size)
        for d in range(size):
            total += query[d] * keys[d]
        return total
    halves = carray(pointer_to(row), size, uint16)
    if number_format == BFLOAT16:
        for d in range(size):
            total += query[d] * float_from_bits(uint32(halves[d]) << uint32(16))
    else:
        for d in range(size):
            total += query[d] * from_float16(halves[d])
    return total


@inline
def add_cached(out: Any, factor: Any, row: Any, size: Any, number_format: Any) -> None:
    """out float32 [size] += factor times one cached value."""
    if number_format == FLOAT32:
        values = floats_at(row, size)
        for d in range(size):
            out[d] += factor * values[d]
        return
    halves = carray(pointer_to(row), size, uint16)
    if number_format == BFLOAT16:
        for d in range(size):
            out[d] += factor * float_from_bits(uint32(halves[d]) << uint32(16))
    else:
        for d in range(size):
            out[d] += factor * from_float16(halves[d])


@inline
def prepare_head(step: Any, norm: Any, values: Any, to: Any) -> None:
    """Copy a head of q or k, normalized where the model does so, and rotate it."""
    size = cell(step, HEAD_SIZE)
    if norm:
        normalize(values, norm, size, load(step + 8 * EPSILON, float32), to)
    else:
        for d in range(size):
            store(to + 4 * d, load(values + 4 * d, float32))
    at = 4 * size * cell(step, POSITION)
    rotate(to, size, cell(step, COS) + at, cell(step, SIN) + at)


@inline
def attend(step: Any, layer: Any, head: Any, scratch: Any) -> None:
    """One head: rotate, write its key and value to the cache, attend to all positions.

    Heads that share a key write the same bytes to the same place. `scratch` holds a query, a key
    and a score for each position.
    """
    size, position = cell(step, HEAD_SIZE), cell(step, POSITION)
    number_format = cell(step, CACHE_FORMAT)
    item = int64(4) if number_format == FLOAT32 else int64(2)
    shared = head // (cell(step, HEADS) // cell(step, KV_HEADS))
    k = cell(step, QKV) + 4 * cell(layer + 8 * Q, OUT) + 4 * shared * size
    v = k + 4 * cell(layer + 8 * K, OUT)
    key = scratch + 4 * size
    prepare_head(step, cell(layer, Q_NORM), cell(step, QKV) + 4 * head * size, scratch)
    prepare_head(step, cell(layer, K_NORM), k, key)
    first = shared * cell(step, MAX_LENGTH) * size * item
    keys, values = cell(layer, KEYS) + first, cell(layer, VALUES) + first
    for d in range(size):
        at = position * size + d
        store_number(keys, at, number_format, load(key + 4 * d, float32))
        store_number(values, at, number_format, load(v + 4 * d, float32))
    query = floats_at(scratch, size)
    scores = floats_at(scratch + 8 * size, position + 1)
    scaling, largest = load(step + 8 * SCALING, float32), float32(-np.inf)
    for t in range(position + 1):
        score = dot_cached(query, keys + t * size * item, size, number_format) * scaling
        scores[t] = score
        largest = max(largest, score)
    total = float32(0)
    for t in range(position + 1):
        scores[t] = exp(scores[t] - largest)
        total += scores[t]
    out = floats_at(cell(step, ATTENDED) + 4 * head * size, size)
    out[:] = float32(0)
    for t in range(position + 1):
        add_cached(out, scores[t] / total, values + t * size * item, size, number_format)


@inline
def read_embedding(step: Any, scratch: Any) -> None:
    """The token's row as float32 to HIDDEN."""
    table, token, out = cell(step, EMBEDDING), cell(step, TOKEN), cell(step, HIDDEN)
    size = cell(table, GROUP)
    row_scales(table, token, size, scratch)
    weights = cell(table, PACKED) + token * cell(table, IN)
    for k in range(cell(table, IN)):
        store(out + 4 * k, weight_at(weights, k) * load(scratch + 4 * (k // size), float32))


@inline
def run_layer(
    step: Any, layer: Any, tickets: Any, team: Any, x: Any, scratch: Any, part: Any
) -> None:
    """One layer, all threads together."""
    hidden, width = cell(step, HIDDEN), cell(layer + 8 * Q, IN)
    epsilon = load(step + 8 * EPSILON, float32)
    normalize(hidden, cell(layer, INPUT_NORM), width, epsilon, x)
    q = cell(step, QKV)
    k = q + 4 * cell(layer + 8 * Q, OUT)
    v = k + 4 * cell(layer + 8 * K, OUT)
    share(layer + 8 * Q, tickets, x, scratch, q)
    share(layer + 8 * K, tickets + 8, x, scratch, k)
    share(layer + 8 * V, tickets + 16, x, scratch, v)
    meet(step, team)
    while True:
        head = fetch_add(tickets + 24, 1)
        if head >= cell(step, HEADS):
            break
        attend(step, layer, head, part)
    meet(step, team)
    share_and_add(layer + 8 * OUTPUT, tickets + 32, cell(step, ATTENDED), scratch, part, hidden)
    meet(step, team)
    normalize(hidden, cell(layer, MIDDLE_NORM), width, epsilon, x)
    share_gated(layer, tickets + 40, x, scratch, part, cell(step, ACTIVATED))
    meet(step, team)
    share_and_add(layer + 8 * DOWN, tickets + 48, cell(step, ACTIVATED), scratch, part, hidden)
    meet(step, team)


def run_step(pointer: Any) -> None:
    """Kernel: a token through all layers; logits float32 [V]."""
    step = address_of(pointer)
    team = int64(call(cell(step, TEAM_SIZE))) if cell(step, TEAM_SIZE) else int64(1)
    widest, head_size = cell(step, WIDEST), cell(step, HEAD_SIZE)
    part_size = max(CHUNK_BYTES // ROWS, 2 * head_size + cell(step, MAX_LENGTH))
    buffer = np.empty(widest + ROWS * (widest + 1) + part_size, np.float32)
    x = int64(buffer.ctypes.data)
    scratch = x + 4 * widest
    part = scratch + 4 * ROWS * (widest + 1)
    tickets = cell(step, TICKETS)
    if fetch_add(tickets, 1) == 0:
        read_embedding(step, scratch)
    meet(step, team)
    layers = cell(step, LAYERS)
    for i in range(cell(step, NUM_LAYERS)):
        layer_tickets = tickets + 16 + 8 * TICKETS_A_LAYER * i
        run_layer(step, layers + 8 * LAYER_CELLS * i, layer_tickets, team, x, scratch, part)
    head = cell(step, HEAD)
    epsilon = load(step + 8 * EPSILON, float32)
    normalize(cell(step, HIDDEN), cell(step, FINAL_NORM), cell(head, IN), epsilon, x)
    share(head, tickets + 8, x, scratch, cell(step, LOGITS))
