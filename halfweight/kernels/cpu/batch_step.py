"""A step of a Llama-like model for several tokens of several sequences as one kernel.

1 to 32 tokens over pages of KV cache. At batch 1 a small model's layer is 20 products of some
microseconds, and an interpreter between them costs more than the products. Here threads enter once
a step and go through all layers together, by tickets, each weight read once for all tokens. The
phases of a layer:

    norm, q k v | rotate, write the pages, attend a head of a sequence at a time | output, add |
    norm, gate up | down, add

Before a product its tokens are prepared (norm, digits). One token is prepared by every thread for
itself, which is cheaper than to wait; several are shared out, a ticket each.

A token's numbers depend on nothing but its sequence: the same bits alone and beside others, in one
step or in many (batch_tiles.py, batch_attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba import float32, int64

from halfweight.kernels.cpu.batch_attention import attention_bytes, share_heads
from halfweight.kernels.cpu.batch_cells import (
    ACTIVATED,
    ACTIVATED_TICKET,
    ATTENDED,
    ATTENDED_TICKET,
    COUNTERS,
    COUNTERS_A_LAYER,
    COUNTERS_A_STEP,
    DIGITS,
    DOWN,
    DOWN_DONE,
    DOWN_TICKET,
    EMBEDDING,
    EMBEDDING_DONE,
    EMBEDDING_TICKET,
    EPSILON,
    FINAL_NORM,
    FINAL_TICKET,
    GATE_ROWS,
    GATED_DONE,
    GATED_TICKET,
    HEAD,
    HEAD_TICKET,
    HEADS,
    HEADS_DONE,
    HIDDEN,
    IDS,
    INPUT_NORM,
    INPUT_TICKET,
    K_TICKET,
    LAYER_CELLS,
    LAYERS,
    LOGIT_TOKENS,
    LOGITS,
    LOGITS_DONE,
    LOGITS_TICKET,
    MATRIX,
    MIDDLE_NORM,
    MIDDLE_TICKET,
    NUM_LAYERS,
    NUM_LOGITS,
    NUM_SEQUENCES,
    NUM_TOKENS,
    OUTPUT,
    OUTPUT_DONE,
    OUTPUT_TICKET,
    PREPARE,
    PREPARED,
    Q_TICKET,
    QKV,
    QKV_DONE,
    THREAD,
    THREADS,
    TURNED,
    UP,
    V_TICKET,
    WIDEST,
    WORK,
    WORK_BYTES,
    K,
    Q,
    V,
)
from halfweight.kernels.cpu.batch_loops import (
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
from halfweight.kernels.cpu.between_products import normalize, wait_for
from halfweight.kernels.cpu.decode_products import (
    GROUP,
    IN,
    MAX_PARTS,
    OUT,
    PACKED,
    PARTS,
    PRODUCT,
    row_power,
    row_scales,
    weight_at,
    whole_lines,
)
from halfweight.kernels.cpu.llvm import (
    address_of,
    call_at,
    cell,
    fetch_add,
    inline,
    load,
    store,
)
from halfweight.kernels.cpu.llvm_vectors import LANES, LINE

MIN_MATRIX_TOKENS = 8
"""Tokens from which on a matrix unit is worth to turn them."""
SPARE_BYTES = 16 * LINE
"""What is read and written past the last number that is turned."""


def prepare_one(
    step: Any,
    norm: Any,
    x: Any,
    columns: Any,
    floats: Any,
    record: Any,
    scratch: Any,
    _: Any,
    __: Any,
) -> Any:
    """x float32 [K], normalized to `floats` if there is a norm, and in digits to `record`.

    A function of its own that the kernel calls by its address, so that it is compiled once.
    """
    if norm:
        normalize(x, norm, columns, load(step + 8 * EPSILON, float32), floats)
        x = floats
    if cell(step, DIGITS) and columns % LINE == 0:
        write_batch_record(x, columns, cell(step, DIGITS), record, scratch)
    return record


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
        to = (base + 4 * columns * m, records + size * m)
        call_at(cell(step, PREPARE), (step, norm, at, columns, *to, scratch, 0, 0))
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
    step: Any,
    linear: Any,
    rows: Any,
    counters: Any,
    x: Any,
    tokens: Any,
    work: Any,
    y: Any,
    use: Any,
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


@dataclass(frozen=True)
class WorkBytes:
    """Bytes of memory of a step: of each thread, before its turned tokens there, and of all."""

    own: int
    turned_at: int
    prepared: int


def work_bytes(
    widest: int, digits: int, head_size: int, page_tokens: int, tokens: int
) -> WorkBytes:
    """The memory that a step of `tokens` needs; `widest` is the longest x of a product."""
    token = int(whole_lines.py_func(4 * widest) + batch_record_bytes.py_func(widest, digits))
    attention = attention_bytes(head_size, page_tokens)
    scratch = max(batch_scratch_bytes(widest, tokens), attention, 4 * MAX_PARTS * LANES)
    turned_at = token + int(whole_lines.py_func(scratch))
    turned = all_turned_bytes(widest, digits, tokens) + SPARE_BYTES
    return WorkBytes(turned_at + turned, turned_at, tokens * token + SPARE_BYTES)


def all_turned_bytes(widest: int, digits: int, tokens: int) -> int:
    """Bytes of tokens as a matrix unit reads them."""
    return -(-tokens // LANES) * int(turned_bytes.py_func(widest, digits))


def run_batch_step(pointer: Any) -> None:
    """Kernel: tokens through all layers; pages written, logits float32 [L, V]."""
    step = address_of(pointer)
    counters, tokens = cell(step, COUNTERS), cell(step, NUM_TOKENS)
    thread = fetch_add(counters + 8 * THREAD, 1)
    own = cell(step, WORK) + thread * cell(step, WORK_BYTES)
    widest = cell(step, WIDEST)
    scratch = own + whole_lines(4 * widest) + batch_record_bytes(widest, cell(step, DIGITS))
    work = (own, scratch, own + cell(step, TURNED))
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
