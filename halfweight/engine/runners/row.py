"""The chunks of a step as one row of tokens, and the row as one array that is copied once.

Everything that a forward needs to know of a step are integers: slots, positions, places in the
pages, page tables, which logits are wanted. They are written into one numpy array, go to the device
in one copy and are cut into views there. `Layout` has the sizes of the views, which are all that
the host knows of a recorded step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfweight.engine.runners.paged_attention import Piece, Places
from halfweight.engine.step import Chunk

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A chunk and the length class of its sequence (`rotary.py`)."""

    chunk: Chunk
    length_class: int = 0


@dataclass(frozen=True)
class Row:
    """A row of T tokens on the device."""

    slots: Tensor
    """[T] row of the token table."""
    classes: Tensor
    """[T] length class of each token's sequence."""
    logits_rows: Tensor
    """[R] tokens whose logits are wanted, at least one."""
    places: Places

    @property
    def positions(self) -> Tensor:
        """[T] position of each token in its sequence."""
        return self.places.positions


@dataclass(frozen=True)
class Layout:
    """How the array of a row is cut; equal layouts are steps of the same shapes."""

    num_tokens: int
    num_logits: int
    table_shape: tuple[int, int]
    """Decoding sequences, pages of each."""
    pieces: tuple[tuple[int, int, int, int], ...] = ()
    """begin in the row, start, tokens, pages of each chunk of several tokens."""

    def cut(self, numbers: Tensor) -> Row:
        """The row whose array [N] this is; views."""
        per_token, length = 4 * self.num_tokens, self.table_shape[0] * self.table_shape[1]
        sizes = [per_token, self.num_logits, length, *(piece[3] for piece in self.pieces)]
        tokens, rows, table, *pages = torch.split(numbers, sizes)
        slots, positions, writes, classes = tokens.view(4, -1).unbind()
        pieces = [Piece(*where[:3], own) for where, own in zip(self.pieces, pages, strict=True)]
        places = Places(writes, positions, table.view(self.table_shape), pieces)
        return Row(slots, classes, rows, places)


def pack(parts: Sequence[Part], page_tokens: int) -> tuple[Numbers, Layout]:
    """The array of a step: chunks of one token, which come first, decode; others are pieces."""
    num_decoding = sum(part.chunk.num_tokens == 1 for part in parts)
    tokens = np.concatenate([_tokens(part, page_tokens) for part in parts], axis=1)
    ends = np.cumsum([part.chunk.num_tokens for part in parts]).tolist()
    rows = [
        np.arange(end - part.chunk.num_logits, end) for part, end in zip(parts, ends, strict=True)
    ]
    wanted = np.concatenate(rows) if any(map(len, rows)) else np.zeros(1, np.int64)
    table = _table([part.chunk for part in parts[:num_decoding]], page_tokens)
    pieces, pages = [], []
    for part, end in zip(parts[num_decoding:], ends[num_decoding:], strict=True):
        chunk = part.chunk
        own = chunk.pages[: _num_pages(chunk, page_tokens)]
        pieces.append((end - chunk.num_tokens, chunk.start, chunk.num_tokens, len(own)))
        pages.append(np.asarray(own, np.int64))
    layout = Layout(tokens.shape[1], len(wanted), table.shape, tuple(pieces))
    return np.concatenate([tokens.ravel(), wanted, table.ravel(), *pages]), layout


def pack_decoding(
    parts: Sequence[Part], page_tokens: int, shape: tuple[int, int], padding_slot: int
) -> tuple[Numbers, Layout]:
    """The array of a step of single tokens, padded to `shape` = (sequences, pages of each)."""
    num_more = shape[0] - len(parts)
    padding = np.array([[padding_slot], [0], [0], [0]], np.int64).repeat(num_more, axis=1)
    own = [_tokens(part, page_tokens) for part in parts]
    tokens = np.concatenate([*own, padding], axis=1)
    table = np.zeros(shape, np.int64)
    found = _table([part.chunk for part in parts], page_tokens)
    table[: found.shape[0], : found.shape[1]] = found
    layout = Layout(shape[0], shape[0], shape)
    return np.concatenate([tokens.ravel(), np.arange(shape[0]), table.ravel()]), layout


def to_device(numbers: Numbers, device: torch.device) -> Tensor:
    """The array on the device; through pinned memory, without waiting, on CUDA."""
    host = torch.from_numpy(numbers)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def num_pages_of(parts: Sequence[Part], page_tokens: int) -> int:
    """Pages of the longest sequence of a step."""
    return max(_num_pages(part.chunk, page_tokens) for part in parts)


def _num_pages(chunk: Chunk, page_tokens: int) -> int:
    return -(-(chunk.start + chunk.num_tokens) // page_tokens)


def _tokens(part: Part, page_tokens: int) -> Numbers:
    """[4, n]: slot, position, place in the pages, class of each token of a chunk."""
    chunk = part.chunk
    positions = np.arange(chunk.start, chunk.start + chunk.num_tokens)
    pages = np.asarray(chunk.pages[: _num_pages(chunk, page_tokens)], np.int64)
    found = np.empty((4, chunk.num_tokens), np.int64)
    found[0], found[1], found[3] = chunk.slot, positions, part.length_class
    found[2] = pages[positions // page_tokens] * page_tokens + positions % page_tokens
    return found


def _table(chunks: Sequence[Chunk], page_tokens: int) -> Numbers:
    """Pages [B, P] of chunks, rows filled up with page 0."""
    counts = [_num_pages(chunk, page_tokens) for chunk in chunks]
    table = np.zeros((len(chunks), max(counts, default=0)), np.int64)
    for row, chunk, count in zip(table, chunks, counts, strict=True):
        row[:count] = chunk.pages[:count]
    return table
