"""What the host tells the device of a step: int32 numbers, made by numpy, sent by one copy.

A step's numbers lie one section behind the other in one array: where each token's id lies in the
token table (`ids`), where its sequence's pages begin in the page table (`tables`), its `positions`,
the work of attention (`work`; paged.py says what an item is) and, for tokens whose
work was cut into parts, which parts (`row_parts`). Two pinned arrays take turns, because the next
step is packed while the copy of this one may still be under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int32]

FIELDS = 7
"""Numbers of a work item: first, queries, position, table, begin, end, part."""
POSITION = 2
"""Which of them is the position."""
ROW_FIELDS = 3
"""Of a token in parts: its first part, how many there are, its place among the item's queries."""
ALIGNMENT = 4
"""Sections begin at multiples of 16 bytes, so that a kernel is compiled once."""


class Sections:
    """Sections of given sizes in one int32 array."""

    def __init__(self, **sizes: int) -> None:
        self._places: dict[str, slice] = {}
        self.total = 0
        for name, size in sizes.items():
            self._places[name] = slice(self.total, self.total + size)
            self.total += -(-size // ALIGNMENT) * ALIGNMENT

    def of(self, array: Any, name: str) -> Any:
        """The section of an array or tensor."""
        return array[self._places[name]]


class Inputs:
    """An int32 array on the device, filled from the host by one copy a step."""

    def __init__(self, size: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.size = size
        self.device_array = torch.zeros(size, dtype=torch.int32, device=device)
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=is_cuda) for _ in range(2)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._copied: list[Any] = [torch.cuda.Event() if is_cuda else None for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def host_array(self) -> Ints:
        """The array to fill next; waits if its copy, two steps ago, is not done."""
        self._turn ^= 1
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        array: Ints = self._arrays[self._turn]
        return array

    def send(self, size: int) -> Tensor:
        """Copy the first `size` numbers to the device; the array there."""
        target = self.device_array[:size]
        target.copy_(self._hosts[self._turn][:size], non_blocking=True)
        if self._copied[self._turn] is not None:
            self._copied[self._turn].record()
        return self.device_array


@dataclass(frozen=True)
class Queries:
    """Tiles of queries, arrays [n]: the first one's row among all queries, how many, the first
    one's position, where the sequence's pages begin in the page table; and pages to read.
    """

    first: Ints
    count: Ints
    position: Ints
    table: Ints
    pages: Ints


@dataclass(frozen=True)
class Work:
    """`items` [n, FIELDS], `row_parts` [queries, ROW_FIELDS] and how many parts there are."""

    items: Ints
    row_parts: Ints
    num_parts: int


def tiles(
    first: Ints, count: Ints, start: Ints, table: Ints, tile: int, page_tokens: int
) -> Queries:
    """Tiles of at most `tile` queries of chunks that are in their pages; the longest first."""
    per_chunk = -(-count // tile)
    offset = places_within(per_chunk) * tile
    found = np.array((first, count, start, table, count), np.int32).repeat(per_chunk, axis=1)
    found[0] += offset
    found[1] = np.minimum(tile, found[1] - offset)
    found[2] += offset
    found[4] = -(-(found[1] + found[2]) // page_tokens)
    return Queries(*found[:, (-found[4]).argsort(kind="stable")])


def cut(queries: Queries, num_rows: int, at_once: int, least_pages: int = 1) -> Work:
    """Items of about equal size: some `at_once` if the tiles are fewer and long enough.

    A tile is cut into parts of about `least_pages` pages or more, for `at_once` 0 none is. There
    are at most as many items as tiles and `at_once` together. `num_rows` are those of all queries.
    """
    pages = queries.pages
    share = max(float(least_pages), float(pages.sum()) / at_once) if at_once else np.inf
    wanted = np.maximum(1, np.rint(pages / share).astype(np.int32))
    size = np.maximum(1, -(-pages // wanted))
    num = np.maximum(1, -(-pages // size))
    parts = num * (num > 1)
    base = parts.cumsum() - parts
    split = places_within(num)
    columns = (queries.first, queries.count, queries.position, queries.table, size, pages, base)
    items = np.array(columns, np.int32).repeat(num, axis=1)
    items[4] *= split
    items[5] = np.minimum(items[4] + size.repeat(num), items[5])
    items[6] = np.where(num.repeat(num) > 1, items[6] + split, -1)
    row_parts = _row_parts(queries, base, num, num_rows)
    return Work(np.ascontiguousarray(items.T), row_parts, int(parts.sum()))


def _row_parts(queries: Queries, base: Ints, num: Ints, num_rows: int) -> Ints:
    found = np.zeros((num_rows, ROW_FIELDS), np.int32)
    columns = np.array((base, num, queries.first), np.int32).repeat(queries.count, axis=1)
    within = places_within(queries.count)
    rows = columns[2] + within
    columns[2] = within
    found[rows] = columns.T
    return found


def places_within(counts: Ints) -> Ints:
    """0 .. n - 1 for each n of `counts`, one behind the other."""
    ends = counts.cumsum()
    places: Ints = np.arange(ends[-1] if len(ends) else 0) - (ends - counts).repeat(counts)
    return places


class PageTables:
    """The page table of every slot: on the device, and what the host knows to be there."""

    def __init__(self, num_slots: int, max_pages: int, device: torch.device) -> None:
        self.max_pages = max_pages
        self.device_table = torch.zeros(num_slots, max_pages, dtype=torch.int32, device=device)
        self._known: list[list[int]] = [[] for _ in range(num_slots)]

    def updates(self, slot: int, pages: Sequence[int]) -> list[tuple[int, int]]:
        """(place in the flat table, page) of what the device does not know yet of a slot."""
        known = self._known[slot]
        if pages == known:
            return []
        begin = len(known) if list(pages[: len(known)]) == known else 0
        self._known[slot] = list(pages)
        place = slot * self.max_pages
        return [(place + i, pages[i]) for i in range(begin, min(len(pages), self.max_pages))]
