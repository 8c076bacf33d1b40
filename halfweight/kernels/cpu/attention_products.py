"""Attention's two products for each format of pages, as functions that kernels call by address.

So only those of the format in use are compiled, once.
"""

from __future__ import annotations

from typing import Any

from halfweight.kernels.cpu.attention_tiles import key_scores, value_sums
from halfweight.kernels.cpu.llvm_vectors import LANES

QUERIES = 4
"""Queries, of heads or tokens that share keys, that meet a page at once."""

scores_float32_1, scores_float32_4 = key_scores("float32", 1), key_scores("float32", QUERIES)
values_float32_1, values_float32_4 = value_sums("float32", 1), value_sums("float32", QUERIES)
scores_bfloat16_1, scores_bfloat16_4 = key_scores("bfloat16", 1), key_scores("bfloat16", QUERIES)
values_bfloat16_1, values_bfloat16_4 = value_sums("bfloat16", 1), value_sums("bfloat16", QUERIES)
scores_float16_1, scores_float16_4 = key_scores("float16", 1), key_scores("float16", QUERIES)
values_float16_1, values_float16_4 = value_sums("float16", 1), value_sums("float16", QUERIES)
scores_int8_1, scores_int8_4 = key_scores("int8", 1), key_scores("int8", QUERIES)
values_int8_1, values_int8_4 = value_sums("int8", 1), value_sums("int8", QUERIES)


def score_float32(
    queries: Any,
    keys: Any,
    size: Any,
    page_tokens: Any,
    count: Any,
    several: Any,
    out: Any,
    _: Any,
    __: Any,
) -> Any:
    """Scores [page_tokens] of one query, or four, with `count` keys and up to 15 behind them."""
    blocks = (count + LANES - 1) // LANES
    if several:
        scores_float32_4(queries, keys, size, page_tokens, blocks, out)
    else:
        scores_float32_1(queries, keys, size, page_tokens, blocks, out)
    return out


def sum_float32(
    weights: Any,
    values: Any,
    size: Any,
    page_tokens: Any,
    count: Any,
    several: Any,
    out: Any,
    _: Any,
    __: Any,
) -> Any:
    """Sums [D] of one query, or four, += `count` values times their weights [page_tokens]."""
    if several:
        values_float32_4(weights, values, size, page_tokens, count, out)
    else:
        values_float32_1(weights, values, size, page_tokens, count, out)
    return out


def score_bfloat16(
    queries: Any,
    keys: Any,
    size: Any,
    page_tokens: Any,
    count: Any,
    several: Any,
    out: Any,
    _: Any,
    __: Any,
) -> Any:
    """Scores [page_tokens] of one query, or four, with `count` keys and up to 15 behind them."""
    blocks = (count + LANES - 1) // LANES
    if several:
        scores_bfloat16_4(queries, keys, size, page_tokens, blocks, out)
    else:
        scores_bfloat16_1(queries, keys, size, page_tokens, blocks, out)
    return out


def sum_bfloat16(
    weights: Any,
    values: Any,
    size: Any,
    page_tokens: Any,
    count: Any,
    several: Any,
    out: Any,
    _: Any,
    __: Any,
) -> Any:
    """Sums [D] of one query, or four, += `count` values times their weights [page_tokens]."""
    if several:
        values_bfloat16_4(weights, values, size, page_tokens, count, out)
    else:
        values_bfloat16_1(weights, values, size, page_tokens, count, out)
    return out


def score_float16(
    queries: Any,
    keys: Any,
    size: Any,
    page_tokens: Any,
    count: Any,
    several: Any,
    out: Any,
    _: Any,
    __: Any,
) -> Any:
    """Scores [page_tokens] of one query, or four, with `count` keys and up to 15 behind them."""
    blocks = (count + LANES - 1) // LANES
    if several:
        scores_float16_4(queries, keys, size, page_tokens, blocks, out)
    else:
        scores_float16_1(queries, keys, size, page_tokens, blocks, out)
    return out


def sum_float16(
    weights: Any,
    values: Any,
    size: Any,
    page_tokens: Any,
    count: Any,
    several: Any,
    out: Any,
    _: Any,
    __: Any,
) -> Any:
    """Sums [D] of one query, or four, += `count` values times their weights [page_tokens]."""
    if several:
        values_float16_4(weights, values, size, page_tokens, count, out)
    else:
        values_float16_1(weights, values, size, page_tokens, count, out)
    return out


def score_int8(
    queries: Any,
    keys: Any,
    size: Any,
    page_tokens: Any,
    count: Any,
    several: Any,
    out: Any,
    _: Any,
    __: Any,
) -> Any:
    """Scores [page_tokens] of one query, or four, with `count` keys and up to 15 behind them."""
    blocks = (count + LANES - 1) // LANES
    if several:
        scores_int8_4(queries, keys, size, page_tokens, blocks, out)
    else:
        scores_int8_1(queries, keys, size, page_tokens, blocks, out)
    return out


def sum_int8(
    weights: Any,
    values: Any,
    size: Any,
    page_tokens: Any,
    count: Any,
    several: Any,
    out: Any,
    _: Any,
    __: Any,
) -> Any:
    """Sums [D] of one query, or four, += `count` values times their weights [page_tokens]."""
    if several:
        values_int8_4(weights, values, size, page_tokens, count, out)
    else:
        values_int8_1(weights, values, size, page_tokens, count, out)
    return out
