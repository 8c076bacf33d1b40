"""Attention of a step of several tokens: over pages, a head of a sequence at a time.

A ticket writes the keys and values of its sequence's new tokens before it attends, so nobody waits
for another; heads that share a key write the same bytes to the same place. A query goes page by
page with a running maximum, so memory does not grow with the context. Queries that share keys, of
several heads or tokens, meet a page four at a time, each as if alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, float32, int8, int64

from halfweight.kernels.cpu.attention_products import QUERIES
from halfweight.kernels.cpu.attention_tiles import weigh_page
from halfweight.kernels.cpu.batch_cells import (
    ATTENDED,
    CACHE_FORMAT,
    COS,
    COUNT,
    EPSILON,
    FIRST,
    HEAD_SIZE,
    HEADS,
    INT8,
    K_NORM,
    KEYS,
    KV_HEADS,
    NUM_SEQUENCES,
    PAGE_TOKENS,
    POSITIONS,
    Q_NORM,
    QKV,
    SCALING,
    SCORE,
    SEQUENCE_CELLS,
    SEQUENCES,
    SIN,
    SUM_VALUES,
    TABLE,
    THREADS,
    VALUES,
    K,
    Q,
)
from halfweight.kernels.cpu.between_products import floats_at, normalize, rotate
from halfweight.kernels.cpu.decode_products import FLOAT32, OUT, store_number
from halfweight.kernels.cpu.llvm import (
    call_at,
    cell,
    fetch_add,
    inline,
    load,
    pointer_to,
    prefetch,
    store,
)
from halfweight.kernels.cpu.llvm_vectors import LANES, LINE

STATE = 4
"""Floats of a query's state between pages, one of them to spare."""
SMALLEST_SCALE = float32(1e-30)
"""Of a vector in one byte a number."""

weigh_scores = weigh_page()


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
def numbers_bytes(step: Any) -> Any:
    """Bytes of the numbers in a page of keys, or of values, of one head."""
    number_format, item = cell(step, CACHE_FORMAT), int64(2)
    if number_format == INT8:
        item = int64(1)
    elif number_format == FLOAT32:
        item = int64(4)
    return cell(step, PAGE_TOKENS) * cell(step, HEAD_SIZE) * item


@inline
def page_bytes(step: Any) -> Any:
    """Bytes of a page of keys, or of values, of one head."""
    scales = 4 * cell(step, PAGE_TOKENS) if cell(step, CACHE_FORMAT) == INT8 else int64(0)
    return numbers_bytes(step) + scales


@inline
def page_of(step: Any, table: Any, head: Any, page: Any) -> Any:
    """Where a sequence's page of one head is, counted from the first page."""
    return (cell(table, page) * cell(step, KV_HEADS) + head) * page_bytes(step)


@inline
def write_vector(step: Any, x: Any, page: Any, first: Any, stride: Any, row: Any) -> None:
    """x float32 [D] to a page: numbers first, first + stride, ..; `row` is the token's."""
    size, number_format = cell(step, HEAD_SIZE), cell(step, CACHE_FORMAT)
    values = floats_at(x, size)
    if number_format != INT8:
        for d in range(size):
            store_number(page, first + d * stride, number_format, values[d])
        return
    largest = float32(0)
    for d in range(size):
        largest = max(largest, abs(values[d]))
    scale = max(largest / float32(127), SMALLEST_SCALE)
    count = numbers_bytes(step)
    stored = carray(pointer_to(page), count, int8)
    for d in range(size):
        stored[first + d * stride] = int8(np.rint(values[d] / scale))
    store(page + count + 4 * row, scale if largest == largest else largest)


@inline
def write_token(step: Any, layer: Any, table: Any, head: Any, token: Any, scratch: Any) -> None:
    """Rotate a token's key of one head, write it and its value to their page."""
    size, page_tokens = cell(step, HEAD_SIZE), cell(step, PAGE_TOKENS)
    num_q, num_k = cell(layer + 8 * Q, OUT), cell(layer + 8 * K, OUT)
    position = cell(cell(step, POSITIONS), token)
    k = cell(step, QKV) + 4 * (token * (num_q + 2 * num_k) + num_q + head * size)
    prepare_head(step, cell(layer, K_NORM), k, position, scratch)
    at, row = page_of(step, table, head, position // page_tokens), position % page_tokens
    write_vector(step, scratch, cell(layer, KEYS) + at, row, page_tokens, row)
    write_vector(step, k + 4 * num_k, cell(layer, VALUES) + at, row * size, 1, row)


@inline
def multiply_by(values: Any, count: Any, factors: Any) -> None:
    """`count` float32 at an address times as many at another; address 0 for none."""
    if factors:
        products, scales = floats_at(values, count), floats_at(factors, count)
        for t in range(count):
            products[t] *= scales[t]


@inline
def weigh(scores: Any, count: Any, blocks: Any, state: Any, sums: Any, size: Any) -> None:
    """`weigh_page`, and sums float32 [D] made relative to the new largest score."""
    weigh_scores(scores, count, blocks, state, 0)
    factor = load(state + 8, float32)
    if factor != float32(1):
        out = floats_at(sums, size)
        for d in range(size):
            out[d] *= factor


@inline
def prefetch_page(keys: Any, values: Any, num_bytes: Any) -> None:
    """Ask for a page of one head."""
    for at in range(0, num_bytes, LINE):
        prefetch(keys + at)
        prefetch(values + at)


@inline
def attend_queries(
    step: Any, layer: Any, table: Any, head: Any, positions: Any, count: Any, scratch: Any
) -> None:
    """Attention of up to four queries, each to all positions up to its own, page by page.

    `positions` are addresses of int64 in rising order. `scratch` holds queries float32 [4, D],
    then, written here, sums [4, D], states of `weigh_page` [4, 4], scores [4, page_tokens].
    """
    size, page_tokens = cell(step, HEAD_SIZE), cell(step, PAGE_TOKENS)
    sums, several = scratch + 4 * QUERIES * size, int64(count > 1)
    state = sums + 4 * QUERIES * size
    scores = state + 4 * STATE * QUERIES
    floats_at(sums, QUERIES * size)[:] = float32(0)
    for i in range(QUERIES):
        store(state + 4 * STATE * i, float32(-np.inf))
        store(state + 4 * (STATE * i + 1), float32(0))
    last = cell(positions, count - 1)
    pages, num_bytes = last // page_tokens + 1, page_bytes(step)
    scales = numbers_bytes(step) if cell(step, CACHE_FORMAT) == INT8 else int64(0)
    for page in range(pages):
        at, begin = page_of(step, table, head, page), page * page_tokens
        keys, values = cell(layer, KEYS) + at, cell(layer, VALUES) + at
        if page + 1 < pages:
            after = page_of(step, table, head, page + 1)
            prefetch_page(cell(layer, KEYS) + after, cell(layer, VALUES) + after, num_bytes)
        end = min(page_tokens, last + 1 - begin)
        shape, blocks = (size, page_tokens, end), (end + LANES - 1) // LANES
        call_at(cell(step, SCORE), (scratch, keys, *shape, several, scores, 0, 0))
        for i in range(count):
            own = max(int64(0), min(page_tokens, cell(positions, i) + 1 - begin))
            to, row = sums + 4 * size * i, scores + 4 * page_tokens * i
            multiply_by(row, own, keys + scales if scales else int64(0))
            weigh(row, own, blocks, state + 4 * STATE * i, to, size)
            multiply_by(row, own, values + scales if scales else int64(0))
        call_at(cell(step, SUM_VALUES), (scores, values, *shape, several, sums, 0, 0))


@inline
def attend(step: Any, layer: Any, sequence: Any, begin: Any, num_heads: Any, scratch: Any) -> None:
    """Heads of a sequence that share keys: write its new tokens' keys and values, attend for each.

    `scratch`: int64 [4] positions, then as `attend_queries` has it.
    """
    size, heads = cell(step, HEAD_SIZE), cell(step, HEADS)
    shared, table = begin // (heads // cell(step, KV_HEADS)), cell(sequence, TABLE)
    first, width = cell(sequence, FIRST), cell(layer + 8 * Q, OUT) + 2 * cell(layer + 8 * K, OUT)
    for token in range(first, first + cell(sequence, COUNT)):
        write_token(step, layer, table, shared, token, scratch)
    scaling, queries = load(step + 8 * SCALING, float32), scratch + 8 * QUERIES
    positions = carray(pointer_to(scratch), QUERIES, int64)
    num_queries = cell(sequence, COUNT) * num_heads
    for done in range(0, num_queries, QUERIES):
        count = min(int64(QUERIES), num_queries - done)
        for i in range(count):
            token, head = first + (done + i) // num_heads, begin + (done + i) % num_heads
            positions[i] = cell(cell(step, POSITIONS), token)
            to = queries + 4 * size * i
            q = cell(step, QKV) + 4 * (token * width + head * size)
            prepare_head(step, cell(layer, Q_NORM), q, positions[i], to)
            scaled = floats_at(to, size)
            for d in range(size):
                scaled[d] *= scaling
        attend_queries(step, layer, table, shared, scratch, count, queries)
        sums = queries + 4 * QUERIES * size
        state = sums + 4 * QUERIES * size
        for i in range(count):
            token, head = first + (done + i) // num_heads, begin + (done + i) % num_heads
            out = floats_at(cell(step, ATTENDED) + 4 * size * (token * heads + head), size)
            found, total = floats_at(sums + 4 * size * i, size), state + 4 * (STATE * i + 1)
            for d in range(size):
                out[d] = found[d] / load(total, float32)


@inline
def heads_at_once(step: Any) -> Any:
    """Heads that a ticket stands for: all that share keys, if enough are left for all threads."""
    kv_heads, sequences = cell(step, KV_HEADS), cell(step, NUM_SEQUENCES)
    if sequences * kv_heads < 2 * cell(step, THREADS):
        return int64(1)
    return cell(step, HEADS) // kv_heads


@inline
def share_heads(step: Any, layer: Any, ticket: Any, scratch: Any) -> None:
    """`attend` for every head of every sequence; the counter of those done is behind `ticket`."""
    heads, num_heads = cell(step, HEADS), heads_at_once(step)
    i = fetch_add(ticket, num_heads)
    while i < heads * cell(step, NUM_SEQUENCES):
        sequence = cell(step, SEQUENCES) + 8 * SEQUENCE_CELLS * (i // heads)
        attend(step, layer, sequence, i % heads, num_heads, scratch)
        fetch_add(ticket + 8, num_heads)
        i = fetch_add(ticket, num_heads)


def attention_bytes(head_size: int, page_tokens: int) -> int:
    """Bytes of scratch that `attend` needs."""
    return 8 * QUERIES + 4 * QUERIES * (2 * head_size + STATE + page_tokens)
