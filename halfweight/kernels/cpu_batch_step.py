"""A step of a Llama-like model for several tokens of several sequences as one kernel.

cpu_step.py for 1 to 32 tokens over pages of KV cache: the threads enter once a step and go through
all layers together, by tickets, each weight read once for all tokens. A layer's phases:

    norm, q k v | rotate, write the pages, attend a head of a sequence at a time | output, add |
    norm, gate up | down, add

Before a product its tokens are prepared (norm, digits). One token is prepared by every thread for
itself, which is cheaper than to wait; several are shared out, a ticket each.

A head of a sequence rotates and writes its own keys and values before it attends, so nobody waits
for another; heads that share a key write the same bytes to the same place. Attention goes page by
page with a running maximum, so its memory does not grow with the context, and so a token's numbers
depend on nothing but its sequence: the same bits alone and beside others, in one step or in many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int64

from halfweight.kernels.cpu_batch_loops import (
    ADD,
    GATE,
    STORE,
    batch_record_bytes,
    batch_scratch_bytes,
    take_rows,
    turn_tokens,
    turned_bytes,
    write_batch_record,
)
from halfweight.kernels.cpu_batch_tiles import key_scores, value_sums
from halfweight.kernels.cpu_loops import (
    BFLOAT16,
    FLOAT32,
    GROUP,
    IN,
    LINEAR_CELLS,
    MAX_PARTS,
    OUT,
    PACKED,
    PARTS,
    PRODUCT,
    row_power,
    row_scales,
    store_number,
    weight_at,
    whole_lines,
)
from halfweight.kernels.cpu_step import exp, floats_at, normalize, rotate, wait_for
from halfweight.kernels.simd import (
    address_of,
    call_at,
    cell,
    fetch_add,
    inline,
    load,
    store,
)
from halfweight.kernels.vectors import LANES, LINE

(
    COUNTERS,
    NUM_LAYERS,
    LAYERS,
    HEADS,
    KV_HEADS,
    HEAD_SIZE,
    PAGE_TOKENS,
    CACHE_FORMAT,
    DIGITS,
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
    PREPARED,
    THREADS,
    WORK,
    WORK_BYTES,
    NUM_TOKENS,
    IDS,
    POSITIONS,
    NUM_SEQUENCES,
    SEQUENCES,
    NUM_LOGITS,
    LOGIT_TOKENS,
    MATRIX,
) = range(34)
"""Cells of a step; EPSILON and SCALING are bits of a float32, the rest counts and addresses.

DIGITS: parts that a linear's x is rounded to where its groups allow. WIDEST is the longest x of a
product. Each thread has WORK_BYTES of its own, from WORK on. IDS and POSITIONS have an int64 a
token, LOGIT_TOKENS the tokens (indices) whose logits are wanted. MATRIX: the address of
`matrix_product` where the CPU has a matrix unit, else 0.
"""
STEP_CELLS = 34
FIRST, COUNT, TABLE = range(3)
SEQUENCE_CELLS = 3
"""Cells of a sequence: its first token in the step, how many, and the address of its pages' ids."""

LINEARS = 7
Q, K, V, OUTPUT, GATE_ROWS, UP, DOWN = (LINEAR_CELLS * i for i in range(LINEARS))
INPUT_NORM, Q_NORM, K_NORM, MIDDLE_NORM, KEYS, VALUES = range(
    LINEAR_CELLS * LINEARS, LINEAR_CELLS * LINEARS + 6
)
LAYER_CELLS = LINEAR_CELLS * LINEARS + 6
"""Cells of a layer: seven linears, addresses of float32 norms (0: none) and of the pages."""

(
    INPUT_TICKET,
    INPUT_DONE,
    Q_TICKET,
    K_TICKET,
    V_TICKET,
    QKV_DONE,
    HEAD_TICKET,
    HEADS_DONE,
    ATTENDED_TICKET,
    ATTENDED_DONE,
    OUTPUT_TICKET,
    OUTPUT_DONE,
    MIDDLE_TICKET,
    MIDDLE_DONE,
    GATED_TICKET,
    GATED_DONE,
    ACTIVATED_TICKET,
    ACTIVATED_DONE,
    DOWN_TICKET,
    DOWN_DONE,
) = range(20)
COUNTERS_A_LAYER = 20
"""Rows, heads or tokens of each phase taken, and done."""
EMBEDDING_TICKET, EMBEDDING_DONE, FINAL_TICKET, FINAL_DONE, LOGITS_TICKET, LOGITS_DONE, THREAD = (
    range(7)
)
COUNTERS_A_STEP = 7
"""Counters before those of the layers."""
MIN_MATRIX_TOKENS = 8
"""Tokens from which on a matrix unit is worth to turn them."""
SPARE_BYTES = 16 * LINE
"""What is read and written past the last number that is turned."""

scores_float32, scores_bfloat16, scores_float16 = (
    key_scores(dtype) for dtype in ("float32", "bfloat16", "float16")
)
values_float32, values_bfloat16, values_float16 = (
    value_sums(dtype) for dtype in ("float32", "bfloat16", "float16")
)


@inline
def prepare_one(
    step: Any, norm: Any, x: Any, columns: Any, floats: Any, record: Any, scratch: Any
) -> None:
    """x float32 [K], normalized to `floats` if there is a norm, and in digits to `record`."""
    if norm:
        normalize(x, norm, columns, load(step + 8 * EPSILON, float32), floats)
        x = floats
    if cell(step, DIGITS) and columns % LINE == 0:
        write_batch_record(x, columns, cell(step, DIGITS), record, scratch)


@inline
def by_matrix(step: Any, count: Any) -> Any:
    """Whether so many tokens are worth a matrix unit."""
    return cell(step, MATRIX) != 0 and count >= MIN_MATRIX_TOKENS


@inline
def prepare(
    step: Any, norm: Any, x: Any, columns: Any, count: Any, chosen: Any, ticket: Any, work: Any
) -> Any:
    """Tokens of x float32 [M, K] as products want them: as floats, as records, and turned.

    `chosen` is the address of the `count` tokens wanted, 0 for the first ones; `ticket` that of the
    counter of tokens taken, and of those done behind it.
    """
    own, scratch, turned = work
    alone = count == 1
    base = own if alone else cell(step, PREPARED)
    size = batch_record_bytes(columns, cell(step, DIGITS))
    records = base + 4 * columns * count
    m = int64(0) if alone else fetch_add(ticket, 1)
    while m < count:
        token = cell(chosen, m) if chosen else m
        at = x + 4 * columns * token
        prepare_one(step, norm, at, columns, base + 4 * columns * m, records + size * m, scratch)
        if alone:
            break
        fetch_add(ticket + 8, 1)
        m = fetch_add(ticket, 1)
    if not alone:
        wait_for(ticket + 8, count)
    if by_matrix(step, count) and columns % LINE == 0:
        turn_tokens(records, columns, cell(step, DIGITS), count, turned)
    floats = base if norm else x
    return floats, records, turned


@inline
def multiply_rows(
    step: Any, linear: Any, rows: Any, x: Any, tokens: Any, scratch: Any, y: Any, use: Any
) -> None:
    """y[:, rows] of prepared tokens; y: address and stride of float32 [M, stride]."""
    floats, records, turned = x
    at, product = floats, cell(linear, PRODUCT)
    if cell(linear, PARTS):
        at = records
        if by_matrix(step, tokens):
            at, product = turned, cell(step, MATRIX)
    call_at(product, (linear, rows[0], rows[1], at, tokens, scratch, y[0], y[1], use))


@inline
def share(
    step: Any, linear: Any, rows: Any, counters: Any, x: Any, tokens: Any, work: Any, y: Any, use: Any
) -> None:
    """y (address, stride) of a linear by all threads; `rows` are those that this one has already.

    `counters` are the addresses of those of rows taken and done.
    """
    ticket, done = counters
    while rows[0] < rows[1]:
        multiply_rows(step, linear, rows, x, tokens, work[1], y, use)
        fetch_add(done, rows[1] - rows[0])
        rows = take_rows(ticket, linear, cell(step, THREADS))


@inline
def share_gated(
    step: Any, layer: Any, rows: Any, counters: Any, x: Any, tokens: Any, work: Any, y: Any
) -> None:
    """y [M, F] (address, stride) = silu(gate x) * (up x)."""
    gate, up = layer + 8 * GATE_ROWS, layer + 8 * UP
    ticket, done = counters
    while rows[0] < rows[1]:
        multiply_rows(step, gate, rows, x, tokens, work[1], y, STORE)
        multiply_rows(step, up, rows, x, tokens, work[1], y, GATE)
        fetch_add(done, rows[1] - rows[0])
        rows = take_rows(ticket, gate, cell(step, THREADS))


@inline
def prepare_head(step: Any, norm: Any, values: Any, position: Any, to: Any) -> None:
    """Copy a head of q or k, normalized where the model does so, and rotate it."""
    size = cell(step, HEAD_SIZE)
    if norm:
        normalize(values, norm, size, load(step + 8 * EPSILON, float32), to)
    else:
        for d in range(size):
            store(to + 4 * d, load(values + 4 * d, float32))
    at = 4 * size * position
    rotate(to, size, cell(step, COS) + at, cell(step, SIN) + at)


@inline
def page_bytes(step: Any) -> Any:
    """Bytes of a page of keys, or of values, of one head."""
    item = int64(4) if cell(step, CACHE_FORMAT) == FLOAT32 else int64(2)
    return cell(step, PAGE_TOKENS) * cell(step, HEAD_SIZE) * item


@inline
def page_of(step: Any, table: Any, head: Any, page: Any) -> Any:
    """Where a sequence's page of one head is, counted from the first page."""
    return (cell(table, page) * cell(step, KV_HEADS) + head) * page_bytes(step)


@inline
def write_token(step: Any, layer: Any, table: Any, head: Any, token: Any, scratch: Any) -> None:
    """Rotate a token's key of one head, write it and its value to their page."""
    size, number_format = cell(step, HEAD_SIZE), cell(step, CACHE_FORMAT)
    num_q, num_k = cell(layer + 8 * Q, OUT), cell(layer + 8 * K, OUT)
    position, page_tokens = cell(cell(step, POSITIONS), token), cell(step, PAGE_TOKENS)
    k = cell(step, QKV) + 4 * (token * (num_q + 2 * num_k) + num_q + head * size)
    prepare_head(step, cell(layer, K_NORM), k, position, scratch)
    at, first = page_of(step, table, head, position // page_tokens), position % page_tokens * size
    keys, values = cell(layer, KEYS) + at, cell(layer, VALUES) + at
    for d in range(size):
        store_number(keys, first + d, number_format, load(scratch + 4 * d, float32))
        value = load(k + 4 * (num_k + d), float32)
        store_number(values, first + d, number_format, value)


@inline
def score_page(query: Any, keys: Any, size: Any, count: Any, number_format: Any, to: Any) -> None:
    """`count` scores, and up to 15 of what lies behind."""
    blocks = (count + LANES - 1) // LANES
    if number_format == BFLOAT16:
        scores_bfloat16(query, keys, size, blocks, to)
    elif number_format == FLOAT32:
        scores_float32(query, keys, size, blocks, to)
    else:
        scores_float16(query, keys, size, blocks, to)


@inline
def add_page(
    weights: Any, values: Any, size: Any, count: Any, number_format: Any, out: Any
) -> None:
    """out float32 [D] += `count` values times their weights."""
    if number_format == BFLOAT16:
        values_bfloat16(weights, values, size, count, out)
    elif number_format == FLOAT32:
        values_float32(weights, values, size, count, out)
    else:
        values_float16(weights, values, size, count, out)


@inline
def attend_token(
    step: Any, layer: Any, table: Any, head: Any, position: Any, query: Any, to: Any, scratch: Any
) -> None:
    """Attention of one query to all positions up to its own, page by page, to float32 [D] at `to`.

    Sums and weights are relative to the largest score so far.
    """
    size, page_tokens = cell(step, HEAD_SIZE), cell(step, PAGE_TOKENS)
    number_format = cell(step, CACHE_FORMAT)
    out = floats_at(to, size)
    out[:] = float32(0)
    most, total = float32(-np.inf), float32(0)
    for page in range(position // page_tokens + 1):
        at = page_of(step, table, head, page)
        count = min(page_tokens, position + 1 - page * page_tokens)
        score_page(query, cell(layer, KEYS) + at, size, count, number_format, scratch)
        scores = floats_at(scratch, count)
        largest = most
        for t in range(count):
            largest = max(largest, scores[t])
        if largest > most:
            factor = exp(most - largest)
            most = largest
            total *= factor
            for d in range(size):
                out[d] *= factor
        for t in range(count):
            scores[t] = exp(scores[t] - most)
            total += scores[t]
        add_page(scratch, cell(layer, VALUES) + at, size, count, number_format, to)
    for d in range(size):
        out[d] /= total


@inline
def attend(step: Any, layer: Any, sequence: Any, head: Any, scratch: Any) -> None:
    """One head of a sequence: write the keys and values of its new tokens, attend for each."""
    size, heads = cell(step, HEAD_SIZE), cell(step, HEADS)
    shared, table = head // (heads // cell(step, KV_HEADS)), cell(sequence, TABLE)
    width = cell(layer + 8 * Q, OUT) + 2 * cell(layer + 8 * K, OUT)
    begin = cell(sequence, FIRST)
    for token in range(begin, begin + cell(sequence, COUNT)):
        write_token(step, layer, table, shared, token, scratch)
    scaling = load(step + 8 * SCALING, float32)
    for token in range(begin, begin + cell(sequence, COUNT)):
        position = cell(cell(step, POSITIONS), token)
        q = cell(step, QKV) + 4 * (token * width + head * size)
        prepare_head(step, cell(layer, Q_NORM), q, position, scratch)
        for d in range(size):
            store(scratch + 4 * d, load(scratch + 4 * d, float32) * scaling)
        out = cell(step, ATTENDED) + 4 * size * (token * heads + head)
        attend_token(step, layer, table, shared, position, scratch, out, scratch + 4 * size)


@inline
def share_heads(step: Any, layer: Any, ticket: Any, scratch: Any) -> None:
    """`attend` for every head of every sequence; the counter of those done is behind `ticket`."""
    heads = cell(step, HEADS)
    i = fetch_add(ticket, 1)
    while i < heads * cell(step, NUM_SEQUENCES):
        sequence = cell(step, SEQUENCES) + 8 * SEQUENCE_CELLS * (i // heads)
        attend(step, layer, sequence, i % heads, scratch)
        fetch_add(ticket + 8, 1)
        i = fetch_add(ticket, 1)


@inline
def read_embedding(step: Any, token: Any, scratch: Any) -> None:
    """A token's row as float32 to HIDDEN."""
    table, row = cell(step, EMBEDDING), cell(cell(step, IDS), token)
    columns, size, power = cell(table, IN), cell(table, GROUP), row_power(table, row)
    out = cell(step, HIDDEN) + 4 * columns * token
    row_scales(table, row, 1, size, scratch)
    weights = cell(table, PACKED) + row * columns
    for k in range(columns):
        scale = load(scratch + 4 * (k // size), float32) * power
        store(out + 4 * k, weight_at(weights, k) * scale)


@inline
def attend_phases(step: Any, layer: Any, counters: Any, before: Any, work: Any) -> None:
    """The first half of a layer, all threads together, once `before` (counter, total) is reached.

    A thread takes its rows, and asks for their first bytes, before it waits.
    """
    tokens, threads = cell(step, NUM_TOKENS), cell(step, THREADS)
    query, key, value = layer + 8 * Q, layer + 8 * K, layer + 8 * V
    num_q, num_k = cell(query, OUT), cell(key, OUT)
    ticket, done = counters + 8 * Q_TICKET, counters + 8 * QKV_DONE
    rows = take_rows(ticket, query, threads)
    wait_for(before[0], before[1])
    hidden, norm = cell(step, HIDDEN), cell(layer, INPUT_NORM)
    at = counters + 8 * INPUT_TICKET
    x = prepare(step, norm, hidden, cell(query, IN), tokens, 0, at, work)
    y, stride = cell(step, QKV), num_q + 2 * num_k
    share(step, query, rows, (ticket, done), x, tokens, work, (y, stride), STORE)
    ticket = counters + 8 * K_TICKET
    rows, to = take_rows(ticket, key, threads), (y + 4 * num_q, stride)
    share(step, key, rows, (ticket, done), x, tokens, work, to, STORE)
    ticket = counters + 8 * V_TICKET
    rows, to = take_rows(ticket, value, threads), (y + 4 * (num_q + num_k), stride)
    share(step, value, rows, (ticket, done), x, tokens, work, to, STORE)
    wait_for(done, stride)
    share_heads(step, layer, counters + 8 * HEAD_TICKET, work[1])
    output, ticket = layer + 8 * OUTPUT, counters + 8 * OUTPUT_TICKET
    rows = take_rows(ticket, output, threads)
    wait_for(counters + 8 * HEADS_DONE, cell(step, HEADS) * cell(step, NUM_SEQUENCES))
    at = counters + 8 * ATTENDED_TICKET
    x = prepare(step, 0, cell(step, ATTENDED), cell(output, IN), tokens, 0, at, work)
    done, to = counters + 8 * OUTPUT_DONE, (hidden, cell(output, OUT))
    share(step, output, rows, (ticket, done), x, tokens, work, to, ADD)


@inline
def gated_phases(step: Any, layer: Any, counters: Any, work: Any) -> None:
    """The second half; it ends when DOWN_DONE has all rows."""
    tokens, threads = cell(step, NUM_TOKENS), cell(step, THREADS)
    gate, down = layer + 8 * GATE_ROWS, layer + 8 * DOWN
    ticket, done = counters + 8 * GATED_TICKET, counters + 8 * GATED_DONE
    rows = take_rows(ticket, gate, threads)
    wait_for(counters + 8 * OUTPUT_DONE, cell(layer + 8 * OUTPUT, OUT))
    hidden, norm, at = cell(step, HIDDEN), cell(layer, MIDDLE_NORM), counters + 8 * MIDDLE_TICKET
    x = prepare(step, norm, hidden, cell(gate, IN), tokens, 0, at, work)
    activated = cell(step, ACTIVATED)
    to = (activated, cell(gate, OUT))
    share_gated(step, layer, rows, (ticket, done), x, tokens, work, to)
    ticket = counters + 8 * DOWN_TICKET
    rows = take_rows(ticket, down, threads)
    wait_for(done, cell(gate, OUT))
    at = counters + 8 * ACTIVATED_TICKET
    x = prepare(step, 0, activated, cell(down, IN), tokens, 0, at, work)
    done, to = counters + 8 * DOWN_DONE, (hidden, cell(down, OUT))
    share(step, down, rows, (ticket, done), x, tokens, work, to, ADD)


@inline
def logits_phase(step: Any, counters: Any, before: Any, work: Any) -> None:
    """Logits float32 [L, V] of the tokens that want them."""
    head, count = cell(step, HEAD), cell(step, NUM_LOGITS)
    ticket, done = counters + 8 * LOGITS_TICKET, counters + 8 * LOGITS_DONE
    rows = take_rows(ticket, head, cell(step, THREADS))
    wait_for(before[0], before[1])
    hidden, norm, at = cell(step, HIDDEN), cell(step, FINAL_NORM), counters + 8 * FINAL_TICKET
    chosen = cell(step, LOGIT_TOKENS)
    x = prepare(step, norm, hidden, cell(head, IN), count, chosen, at, work)
    to = (cell(step, LOGITS), cell(head, OUT))
    share(step, head, rows, (ticket, done), x, count, work, to, STORE)


def batch_work_bytes(
    widest: int, digits: int, head_size: int, page_tokens: int, tokens: int
) -> tuple[int, int]:
    """Bytes of memory that a thread needs for itself, and that `tokens` prepared ones need."""
    token = whole_lines.py_func(4 * widest) + batch_record_bytes.py_func(widest, digits)
    attention = 4 * (head_size + page_tokens)
    scratch = max(batch_scratch_bytes(widest, tokens), attention, 4 * MAX_PARTS * LANES)
    turned = -(-tokens // LANES) * turned_bytes.py_func(widest, digits) + SPARE_BYTES
    own = token + whole_lines.py_func(scratch) + whole_lines.py_func(turned)
    return int(own), int(tokens * token + SPARE_BYTES)


def run_batch_step(pointer: Any) -> None:
    """Kernel: tokens through all layers; pages written, logits float32 [L, V]."""
    step = address_of(pointer)
    counters, tokens = cell(step, COUNTERS), cell(step, NUM_TOKENS)
    thread = fetch_add(counters + 8 * THREAD, 1)
    own = cell(step, WORK) + thread * cell(step, WORK_BYTES)
    widest = cell(step, WIDEST)
    scratch = own + whole_lines(4 * widest) + batch_record_bytes(widest, cell(step, DIGITS))
    end = own + cell(step, WORK_BYTES)
    turned = end - whole_lines(2 * turned_bytes(widest, cell(step, DIGITS)) + SPARE_BYTES)
    work = (own, scratch, turned)
    token = fetch_add(counters + 8 * EMBEDDING_TICKET, 1)
    while token < tokens:
        read_embedding(step, token, scratch)
        fetch_add(counters + 8 * EMBEDDING_DONE, 1)
        token = fetch_add(counters + 8 * EMBEDDING_TICKET, 1)
    before = (counters + 8 * EMBEDDING_DONE, tokens)
    for i in range(cell(step, NUM_LAYERS)):
        layer = cell(step, LAYERS) + 8 * LAYER_CELLS * i
        counters_of_layer = counters + 8 * (COUNTERS_A_STEP + COUNTERS_A_LAYER * i)
        attend_phases(step, layer, counters_of_layer, before, work)
        gated_phases(step, layer, counters_of_layer, work)
        before = (counters_of_layer + 8 * DOWN_DONE, cell(layer + 8 * DOWN, OUT))
    if cell(step, NUM_LOGITS):
        logits_phase(step, counters, before, work)
