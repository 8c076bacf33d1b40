"""One decode step of a Llama-like model as one kernel: a token in, logits out.

At batch 1 a small model's layer is 20 products of some microseconds, and an interpreter between
them costs more than the products. Here the threads enter once a token and go through all layers
together, in five phases a layer:

    norm, q k v | rotate, write the cache, attend a head at a time | output, add |
    norm, gate up | down, add

A phase's rows are taken by tickets, and it ends when all its rows are done, not when all threads
are there: a thread that the system has put aside holds up nobody unless it holds rows. When it
comes back it finds no tickets, so what it has prepared from numbers that have since changed is
never used.

Activations are float32 throughout, the cache is the model's own (transformers' StaticCache, in its
dtype). The norm before a product is computed by every thread for itself: cheaper than to wait.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import carray, float32, int32, int64, uint16, uint32

from halfweight.kernels.cpu.decode_products import (
    BFLOAT16,
    FLOAT32,
    GROUP,
    IN,
    LINEAR_CELLS,
    MAX_SHARE_ROWS,
    OUT,
    PACKED,
    multiply,
    prepare_token,
    row_power,
    row_scales,
    store_number,
    take,
    weight_at,
)
from halfweight.kernels.cpu.dot_tiles import ROWS
from halfweight.kernels.cpu.llvm import (
    address_of,
    cell,
    fetch_add,
    float_from_bits,
    from_float16,
    inline,
    load,
    load_shared,
    pointer_to,
    store,
)
from halfweight.kernels.cpu.llvm_vectors import LINE

(
    COUNTERS,
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
    RECORD,
    THREADS,
    WORK,
    WORK_BYTES,
) = range(27)
"""Cells of a step; EPSILON and SCALING are bits of a float32, the rest counts and addresses.

WIDEST is the longest x of a product, RECORD its bytes in digits. Each thread has WORK_BYTES of its
own, from WORK on.
"""
STEP_CELLS = 27

LINEARS = 7
Q, K, V, OUTPUT, GATE, UP, DOWN = (LINEAR_CELLS * i for i in range(LINEARS))
INPUT_NORM, Q_NORM, K_NORM, MIDDLE_NORM, KEYS, VALUES = range(
    LINEAR_CELLS * LINEARS, LINEAR_CELLS * LINEARS + 6
)
LAYER_CELLS = LINEAR_CELLS * LINEARS + 6
"""Cells of a layer: seven linears, addresses of float32 norms (0: none) and of the cache."""

Q_TICKET, K_TICKET, V_TICKET, HEAD_TICKET, OUTPUT_TICKET, GATED_TICKET, DOWN_TICKET = range(7)
QKV_DONE, HEADS_DONE, OUTPUT_DONE, GATED_DONE, DOWN_DONE = range(7, 12)
COUNTERS_A_LAYER = 12
"""Rows (or heads) of each product taken, and of each phase done."""
EMBEDDING_TICKET, EMBEDDING_DONE, LOGITS_TICKET, LOGITS_DONE, THREAD = range(5)
COUNTERS_A_STEP = 5
"""Counters before those of the layers."""
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
def prepare_again(linear: Any, other: Any, x: Any, prepared: Any, record: Any) -> Any:
    """`prepare_token`, or what was prepared for another linear of the same groups."""
    if cell(linear, GROUP) == cell(other, GROUP):
        return prepared
    return prepare_token(linear, x, record)


@inline
def share(
    linear: Any, rows: Any, ticket: Any, threads: Any, done: Any, x: Any, scratch: Any, y: Any
) -> None:
    """y [N] = a linear times a prepared x; `rows` are those that the thread has already."""
    begin, end = rows
    while begin < end:
        multiply(linear, begin, end, x, 1, scratch, y, FLOAT32)
        fetch_add(done, end - begin)
        begin, end = take(ticket, linear, threads)


@inline
def share_and_add(
    linear: Any,
    rows: Any,
    ticket: Any,
    threads: Any,
    done: Any,
    x: Any,
    scratch: Any,
    part: Any,
    y: Any,
) -> None:
    """y [N] += a linear times a prepared x."""
    begin, end = rows
    while begin < end:
        multiply(linear, begin, end, x, 1, scratch, part - 4 * begin, FLOAT32)
        sums, products = floats_at(y + 4 * begin, end - begin), floats_at(part, end - begin)
        for i in range(end - begin):
            sums[i] += products[i]
        fetch_add(done, end - begin)
        begin, end = take(ticket, linear, threads)


@inline
def share_gated(
    layer: Any,
    rows: Any,
    ticket: Any,
    threads: Any,
    done: Any,
    gate_x: Any,
    up_x: Any,
    scratch: Any,
    part: Any,
    y: Any,
) -> None:
    """y [F] = silu(gate x) * (up x), x prepared for each."""
    gate, up = layer + 8 * GATE, layer + 8 * UP
    begin, end = rows
    while begin < end:
        multiply(gate, begin, end, gate_x, 1, scratch, y, FLOAT32)
        multiply(up, begin, end, up_x, 1, scratch, part - 4 * begin, FLOAT32)
        gates, ups = floats_at(y + 4 * begin, end - begin), floats_at(part, end - begin)
        for i in range(end - begin):
            gates[i] = gates[i] / (float32(1) + exp(-gates[i])) * ups[i]
        fetch_add(done, end - begin)
        begin, end = take(ticket, gate, threads)


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
    size, power = cell(table, GROUP), row_power(table, token)
    row_scales(table, token, 1, size, scratch)
    weights = cell(table, PACKED) + token * cell(table, IN)
    for k in range(cell(table, IN)):
        scale = load(scratch + 4 * (k // size), float32) * power
        store(out + 4 * k, weight_at(weights, k) * scale)


@inline
def share_heads(step: Any, layer: Any, ticket: Any, done: Any, scratch: Any) -> None:
    """`attend` for every head."""
    head = fetch_add(ticket, 1)
    while head < cell(step, HEADS):
        attend(step, layer, head, scratch)
        fetch_add(done, 1)
        head = fetch_add(ticket, 1)


@inline
def attend_phases(step: Any, layer: Any, counters: Any, before: Any, work: Any) -> None:
    """The first half of a layer, all threads together, once `before` (counter, total) is reached.

    A thread takes its rows, and asks for their first bytes, before it waits.
    """
    x, record, scratch, part = work
    other_record = record + cell(step, RECORD)
    hidden, threads = cell(step, HIDDEN), cell(step, THREADS)
    query, key, value = layer + 8 * Q, layer + 8 * K, layer + 8 * V
    num_q, num_k = cell(query, OUT), cell(key, OUT)
    ticket, done = counters + 8 * Q_TICKET, counters + 8 * QKV_DONE
    rows = take(ticket, query, threads)
    wait_for(before[0], before[1])
    epsilon = load(step + 8 * EPSILON, float32)
    normalize(hidden, cell(layer, INPUT_NORM), cell(query, IN), epsilon, x)
    q = cell(step, QKV)
    k, v = q + 4 * num_q, q + 4 * (num_q + num_k)
    token = prepare_token(query, x, record)
    share(query, rows, ticket, threads, done, token, scratch, q)
    other = prepare_again(key, query, x, token, other_record)
    ticket = counters + 8 * K_TICKET
    share(key, take(ticket, key, threads), ticket, threads, done, other, scratch, k)
    other = prepare_again(value, query, x, token, other_record)
    ticket = counters + 8 * V_TICKET
    share(value, take(ticket, value, threads), ticket, threads, done, other, scratch, v)
    wait_for(done, num_q + 2 * num_k)
    done = counters + 8 * HEADS_DONE
    share_heads(step, layer, counters + 8 * HEAD_TICKET, done, part)
    output = layer + 8 * OUTPUT
    ticket = counters + 8 * OUTPUT_TICKET
    rows = take(ticket, output, threads)
    wait_for(done, cell(step, HEADS))
    token, done = prepare_token(output, cell(step, ATTENDED), record), counters + 8 * OUTPUT_DONE
    share_and_add(output, rows, ticket, threads, done, token, scratch, part, hidden)


@inline
def gated_phases(step: Any, layer: Any, counters: Any, work: Any) -> None:
    """The second half; it ends when DOWN_DONE has all rows."""
    x, record, scratch, part = work
    hidden, threads = cell(step, HIDDEN), cell(step, THREADS)
    gate, up, down = layer + 8 * GATE, layer + 8 * UP, layer + 8 * DOWN
    ticket, done = counters + 8 * GATED_TICKET, counters + 8 * GATED_DONE
    rows = take(ticket, gate, threads)
    wait_for(counters + 8 * OUTPUT_DONE, cell(layer + 8 * OUTPUT, OUT))
    epsilon = load(step + 8 * EPSILON, float32)
    normalize(hidden, cell(layer, MIDDLE_NORM), cell(gate, IN), epsilon, x)
    activated, token = cell(step, ACTIVATED), prepare_token(gate, x, record)
    other = prepare_again(up, gate, x, token, record + cell(step, RECORD))
    share_gated(layer, rows, ticket, threads, done, token, other, scratch, part, activated)
    ticket = counters + 8 * DOWN_TICKET
    rows = take(ticket, down, threads)
    wait_for(done, cell(gate, OUT))
    token, done = prepare_token(down, activated, record), counters + 8 * DOWN_DONE
    share_and_add(down, rows, ticket, threads, done, token, scratch, part, hidden)


def work_bytes(widest: int, record: int, head_size: int, max_length: int) -> int:
    """Bytes of memory that a thread needs for itself."""
    part = max(MAX_SHARE_ROWS, 2 * head_size + max_length)
    return -(-(2 * record + 4 * (widest + ROWS * (widest + 4) + part)) // LINE) * LINE


def run_step(pointer: Any) -> None:
    """Kernel: a token through all layers; logits float32 [V]."""
    step = address_of(pointer)
    widest, counters = cell(step, WIDEST), cell(step, COUNTERS)
    thread = fetch_add(counters + 8 * THREAD, 1)
    record = cell(step, WORK) + thread * cell(step, WORK_BYTES)
    x = record + 2 * cell(step, RECORD)
    scratch = x + 4 * widest
    part = scratch + 4 * ROWS * (widest + 4)
    if fetch_add(counters + 8 * EMBEDDING_TICKET, 1) == 0:
        read_embedding(step, scratch)
        fetch_add(counters + 8 * EMBEDDING_DONE, 1)
    work = (x, record, scratch, part)
    before = (counters + 8 * EMBEDDING_DONE, int64(1))
    for i in range(cell(step, NUM_LAYERS)):
        layer = cell(step, LAYERS) + 8 * LAYER_CELLS * i
        own = counters + 8 * (COUNTERS_A_STEP + COUNTERS_A_LAYER * i)
        attend_phases(step, layer, own, before, work)
        gated_phases(step, layer, own, work)
        before = (own + 8 * DOWN_DONE, cell(layer + 8 * DOWN, OUT))
    head, threads = cell(step, HEAD), cell(step, THREADS)
    ticket, done = counters + 8 * LOGITS_TICKET, counters + 8 * LOGITS_DONE
    rows = take(ticket, head, threads)
    wait_for(before[0], before[1])
    epsilon = load(step + 8 * EPSILON, float32)
    normalize(cell(step, HIDDEN), cell(step, FINAL_NORM), cell(head, IN), epsilon, x)
    token = prepare_token(head, x, record)
    share(head, rows, ticket, threads, done, token, scratch, cell(step, LOGITS))
