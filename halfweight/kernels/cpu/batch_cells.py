"""How a step of several tokens is told to its kernel: int64 cells, sizes and addresses, by name."""

from __future__ import annotations

from halfweight.kernels.cpu.decode_products import LINEAR_CELLS

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
    SCORE,
    SUM_VALUES,
    TURNED,
    PREPARE,
) = range(38)
"""Cells of a step; EPSILON and SCALING are bits of a float32, the rest counts and addresses.

DIGITS: parts that a linear's x is rounded to where its groups allow. WIDEST is the longest x of a
product. Each thread has WORK_BYTES of its own, from WORK on; TURNED is where in it the tokens for
the matrix unit are. IDS and POSITIONS have an int64 a token, LOGIT_TOKENS the tokens (indices)
whose logits are wanted.

Functions that are called by address: PREPARE; MATRIX, the product of a matrix unit, 0 where the CPU
has none; SCORE and SUM_VALUES, attention's for the pages' format.
"""
STEP_CELLS = 38
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
INT8 = 4
"""CACHE_FORMAT of pages in one byte a number, beside decode_products' formats.

Behind the numbers of a page of one head stands a float32 scale for each token.
"""
