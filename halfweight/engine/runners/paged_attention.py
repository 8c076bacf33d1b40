"""Attention over pages, in torch: the definition, and what runs on a CPU.

One row of tokens holds the new tokens of several sequences: first the decoding ones, one token
each, then chunks of several tokens. Keys and values of the new tokens are in the pages already.
Decoding is one batched product whose shapes depend on nothing but the page table, without a look
at the device, so a CUDA graph can hold it; chunks go one by one.

What a token sees is an interval that ends with itself: all before it, a sliding window or a block
(`Span`). Where a softcap or sinks ask for it the softmax is written out, in pieces of queries.

Pages are garbage beyond a sequence's tokens, NaN included, so those keys and values are zeroed
where they are read: 0 * NaN would be NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from halfweight.engine.kv_cache import quantize_heads

SCORES_AT_ONCE = 1 << 24
"""Most numbers of a written-out softmax at a time: bounds its memory."""


@dataclass(frozen=True)
class Span:
    """The tokens that a token sees: those from `first` on, up to itself."""

    kind: Literal["all", "window", "block"] = "all"
    size: int = 0
    """Tokens of a window (itself included), or of the blocks that the positions are cut into."""

    def first(self, positions: Tensor) -> Tensor:
        """The lowest position that each of `positions` sees; may be below 0 for a window."""
        if self.kind == "window":
            return positions - (self.size - 1)
        return positions - positions % self.size if self.kind == "block" else positions * 0


@dataclass(frozen=True)
class Manner:
    """How a layer turns scores into weights."""

    scale: float
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""
    sinks: Tensor | None = None
    """A score a head [H] that takes its share of the softmax and gives nothing."""


class PagePool:
    """Keys and values of one layer: [pages, page_tokens, heads, D], in the model's dtype or int8.

    In int8 each vector of D numbers has a scale of its own, in the model's dtype.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        int8: bool = False,
    ) -> None:
        """`shape` are pages, tokens a page and heads; `widths` the numbers of a key and a value."""
        stored = torch.int8 if int8 else dtype
        self.page_tokens = shape[1]
        self.keys, self.values = (
            torch.zeros(*shape, width, dtype=stored, device=device) for width in widths
        )
        self._scales = [
            torch.zeros(*shape, 1, dtype=dtype, device=device) for _ in "kv"[: 2 * int8]
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """All that the pool holds, pages first."""
        return [self.keys, self.values, *self._scales]

    def write(self, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, heads, D] of tokens at places [T] = page * page_tokens + i."""
        new = [keys, values]
        if self._scales:
            (keys, key_scales), (values, value_scales) = (
                quantize_heads(keys),
                quantize_heads(values),
            )
            new = [keys, values, key_scales, value_scales]
        for pages, numbers in zip(self.tensors, new, strict=True):
            pages.flatten(0, 1).index_copy_(0, places, numbers)

    def read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., P * page_tokens, heads, D] of pages [..., P]; a copy."""
        found = [t[pages].flatten(pages.dim() - 1, pages.dim()) for t in self.tensors]
        if self._scales:
            found = [found[0] * found[2], found[1] * found[3]]
        return found[0], found[1]


@dataclass(frozen=True)
class Piece:
    """Several new tokens of one sequence in the row: rows `begin` to `begin + num_tokens`."""

    begin: int
    start: int
    """Position of the first."""
    num_tokens: int
    pages: Tensor
    """The sequence's pages [P], from its first token on."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of a row lie in the pages."""

    writes: Tensor
    """[T] page * page_tokens + offset of each token."""
    positions: Tensor
    """[T] position of each token in its sequence."""
    page_table: Tensor
    """[B, P] pages of the B decoding sequences, whose tokens are the row's first B."""
    pieces: Sequence[Piece] = field(default_factory=tuple)


def attend(q: Tensor, pool: PagePool, places: Places, span: Span, manner: Manner) -> Tensor:
    """Attention of the row's queries q [T, heads, D] over their own pages; [T, heads, Dv].

    By a kernel on CUDA (`kernels/triton/spans.py`), by torch elsewhere.
    """
    num_decoding = len(places.page_table)
    parts = []
    if num_decoding:
        decode = _decode_by_kernel if q.is_cuda else _decode
        parts.append(decode(q[:num_decoding], pool, places, span, manner))
    for piece in places.pieces:
        read = _read_by_kernel if q.is_cuda else _read_piece
        rows = slice(piece.begin, piece.begin + piece.num_tokens)
        parts.append(read(q[rows], places.positions[rows], pool, piece, span, manner))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode_by_kernel(
    q: Tensor, pool: PagePool, places: Places, span: Span, manner: Manner
) -> Tensor:
    return _by_kernel(q, pool, places.page_table, places.positions, span, manner, decodes=True)


def _read_by_kernel(
    q: Tensor, positions: Tensor, pool: PagePool, piece: Piece, span: Span, manner: Manner
) -> Tensor:
    return _by_kernel(q, pool, piece.pages, positions, span, manner, decodes=False)


def _by_kernel(
    q: Tensor,
    pool: PagePool,
    pages: Tensor,
    positions: Tensor,
    span: Span,
    manner: Manner,
    *,
    decodes: bool,
) -> Tensor:
    from halfweight.kernels.triton.spans import attend_span

    return attend_span(
        q,
        pool.tensors,
        pages,
        positions,
        span=(span.kind, span.size),
        scale=manner.scale,
        softcap=manner.softcap,
        sinks=manner.sinks,
        decodes=decodes,
    )


def _decode(q: Tensor, pool: PagePool, places: Places, span: Span, manner: Manner) -> Tensor:
    table, page_tokens = places.page_table, pool.page_tokens
    positions = places.positions[: len(table), None]
    first = span.first(positions)
    begin = torch.zeros_like(positions)
    if span.kind != "all":
        needed = -(-(span.size - 1) // page_tokens) + 1
        if needed < table.shape[1]:
            columns = first.clamp(min=0) // page_tokens
            begin = columns * page_tokens
            columns = columns + torch.arange(needed, device=table.device)
            table = table.gather(1, columns.clamp(max=table.shape[1] - 1))
    keys, values = pool.read(table)
    at = begin + torch.arange(keys.shape[1], device=table.device)
    seen = (at <= positions) & (at >= first)
    hidden = ~seen[:, :, None, None]
    keys, values = keys.masked_fill_(hidden, 0), values.masked_fill_(hidden, 0)
    found = _softmax_product(
        q.unsqueeze(2), keys.transpose(1, 2), values.transpose(1, 2), seen[:, None, None], manner
    )
    return found.squeeze(2)


def _read_piece(
    q: Tensor, positions: Tensor, pool: PagePool, piece: Piece, span: Span, manner: Manner
) -> Tensor:
    end = piece.start + piece.num_tokens
    first_page = max(0, _first_of(span, piece.start)) // pool.page_tokens
    begin = first_page * pool.page_tokens
    keys, values = pool.read(piece.pages[first_page : -(-end // pool.page_tokens)])
    keys, values = keys[: end - begin], values[: end - begin]
    at = torch.arange(begin, end, device=q.device)
    seen = (at <= positions[:, None]) & (at >= span.first(positions)[:, None])
    found = _softmax_product(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        seen[None, None],
        manner,
        causal=piece.start == 0 and (span.kind == "all" or end <= span.size),
    )
    return found[0].transpose(0, 1)


def _first_of(span: Span, position: int) -> int:
    return {
        "all": 0,
        "window": position - span.size + 1,
        "block": position - position % max(1, span.size),
    }[span.kind]


def _softmax_product(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, manner: Manner, *, causal: bool = False
) -> Tensor:
    """q [B, H, n, D], k and v [B, Hkv, L, D], seen [B, 1, n, L]; [B, H, n, Dv].

    `causal` says that n = L and `seen` is the whole triangle.
    """
    if manner.softcap is None and manner.sinks is None:
        return _fused(q, k, v, None if causal else seen, manner.scale)
    step = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [
        _written_out(rows, k, v, mask, manner)
        for rows, mask in zip(torch.split(q, step, 2), torch.split(seen, step, 2), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """By torch's own kernels; the heads of a group are rows of one product if there is one row."""
    num_heads, num_groups = q.shape[1], k.shape[1]
    if q.shape[2] == 1 and seen is not None:
        rows = q.view(len(q), num_groups, -1, q.shape[-1])
        found = functional.scaled_dot_product_attention(rows, k, v, attn_mask=seen, scale=scale)
        return found.view(len(q), num_heads, 1, -1)
    return functional.scaled_dot_product_attention(
        q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=num_heads != num_groups
    )


def _written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, manner: Manner) -> Tensor:
    batch, num_heads, num_rows, _ = q.shape
    num_groups = k.shape[1]
    grouped = q.reshape(batch, num_groups, -1, num_rows, q.shape[-1])
    scores = (grouped @ k.transpose(-1, -2).unsqueeze(2)).float() * manner.scale
    if manner.softcap is not None:
        scores = torch.tanh(scores / manner.softcap) * manner.softcap
    scores = scores.masked_fill_(~seen.unsqueeze(2), float("-inf"))
    if manner.sinks is not None:
        sinks = manner.sinks.float().view(1, num_groups, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]].to(v.dtype)
    return (weights @ v.unsqueeze(2)).view(batch, num_heads, num_rows, v.shape[-1])
