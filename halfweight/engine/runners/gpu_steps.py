"""The ways a step is run: a recorded step of a bucket's size, and a mixed step launch by launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfweight.engine.runners.gpu_attention import PAGE_TOKENS, PagedAttention, WorkList
from halfweight.engine.runners.gpu_inputs import (
    FIELDS,
    POSITION,
    ROW_FIELDS,
    Inputs,
    Ints,
    Queries,
    Sections,
    Work,
    cut,
    places_within,
    tiles,
)
from halfweight.engine.runners.gpu_layers import Layer, Layers
from halfweight.engine.step import Chunk, Step

LEAST_PAGES_OF_A_PART = 8
"""Of a prompt's tile: shorter ones are not worth cutting."""
_cuda: Any = torch.cuda
"""torch.cuda, whose stubs leave graphs and streams untyped."""


@dataclass(frozen=True)
class Parts:
    """What steps are made of: layers, attention, the token table, and sizes of page tables."""

    layers: Layers
    attention: PagedAttention
    table: Tensor
    max_pages: int
    scratch_pages: int

    @property
    def padding_slot(self) -> int:
        """The row of the tables that is nobody's."""
        return self.table.shape[0] - 1

    def ids(self, at: Tensor) -> Tensor:
        """Token ids at places of the flat token table."""
        return self.table.view(-1).index_select(0, at)

    def ids_at(self, slots: Ints, positions: Ints) -> Ints:
        """Places in the flat token table."""
        return slots * self.table.shape[1] + positions

    def columns(self, step: Step, batch: int) -> tuple[Ints, Ints, Ints]:
        """Slots, starts and numbers of tokens of a step's chunks; of padding up to `batch`."""
        slots = np.full(batch, self.padding_slot, np.int32)
        starts, counts = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        slots[: len(step)] = [chunk.slot for chunk in step]
        starts[: len(step)] = [chunk.start for chunk in step]
        counts[: len(step)] = [chunk.num_tokens for chunk in step]
        return slots, starts, counts

    def places(self, step: Step) -> tuple[Ints, Ints, Ints]:
        """Of each token of a step: where its id is, where its pages begin, and its position."""
        slots, starts, counts = self.columns(step, len(step))
        slot = slots.repeat(counts)
        position = starts.repeat(counts) + places_within(counts)
        return self.ids_at(slot, position), slot * self.max_pages, position

    def prompt_work(self, step: Step, num_rows: int, table: Ints | None = None) -> Work:
        """Tiles of a step's chunks; `table` says where pages begin, if not the page table."""
        slots, starts, counts = self.columns(step, len(step))
        first = counts.cumsum() - counts
        table = slots * self.max_pages if table is None else table
        size = self.attention.tile_queries
        queries = tiles(first, counts, starts, table, size, PAGE_TOKENS)
        return cut(queries, num_rows, self.attention.num_tiles_at_once, LEAST_PAGES_OF_A_PART)


class Recordings:
    """Calls without arguments as CUDA graphs that share one pool of memory.

    The first call of a key runs as it is (kernels are compiled, workspaces allocated), the second
    is recorded and replayed, all later ones are replayed. On a CPU all run as they are, and where
    they wait for other ranks by ways that no graph holds.
    """

    def __init__(self, device: torch.device, *, is_on: bool = True) -> None:
        self._graphs: dict[Any, Any] = {}
        self._is_on = device.type == "cuda" and is_on
        self._stream = _cuda.Stream(device) if self._is_on else None
        self._pool = _cuda.graph_pool_handle() if self._is_on else None

    def __call__(self, key: Any, call: Callable[[], None]) -> None:
        """Run the call or replay its graph."""
        if not self._is_on:
            call()
            return
        if key not in self._graphs:
            self._aside(call)
            self._graphs[key] = None
            return
        if self._graphs[key] is None:
            self._graphs[key] = self._record(call)
        self._graphs[key].replay()

    def _aside(self, call: Callable[[], object]) -> None:
        """Run on the stream that records, whose workspaces must exist outside of the pool."""
        current = _cuda.current_stream()
        self._stream.wait_stream(current)  # type: ignore[union-attr]
        with torch.cuda.stream(self._stream):
            call()
        current.wait_stream(self._stream)

    def _record(self, call: Callable[[], object]) -> Any:
        graph = torch.cuda.CUDAGraph()

        def record() -> None:  # torch.cuda.graph would collect garbage and empty the cache
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            call()
            graph.capture_end()

        self._aside(record)
        return graph


class FewTokens:
    """A recorded step of `batch` sequences with up to `tokens` tokens each, padded.

    With one token a sequence it is new to its page (`attend_pages`, IS_NEW); with more, or with
    invariant attention, tokens are written first.
    """

    def __init__(
        self,
        parts: Parts,
        batch: int,
        tokens: int,
        inputs: Inputs,
        logits: Tensor,
        recordings: Recordings,
    ) -> None:
        """`inputs` and `logits` [rows, V] are shared with the other recorded steps."""
        self._parts, self._batch, self._tokens = parts, batch, tokens
        self._inputs, self._logits, self._recordings = inputs, logits, recordings
        self._sections = self.sections(parts, batch, tokens)
        self._is_new = tokens == 1 and not parts.attention.is_invariant
        self._ones = np.ones(batch, np.int32)
        self._last: tuple[bytes, Work] | None = None

    @staticmethod
    def sections(parts: Parts, batch: int, tokens: int) -> Sections:
        """What such a step takes of the inputs."""
        rows = batch * tokens
        items = batch + parts.attention.num_decoding_at_once
        sizes = {"ids": rows, "tables": rows, "positions": rows, "rows": rows}
        return Sections(**sizes, row_parts=rows * ROW_FIELDS, work=items * FIELDS)

    def __call__(self, step: Step) -> Tensor:
        """Logits [sum of num_logits, V], in the buffer where no sequence is left out."""
        self._pack(step, self._inputs.host_array())
        self._inputs.send(self._sections.total)
        self._recordings((self._batch, self._tokens), self._launches)
        num_logits = sum(chunk.num_logits for chunk in step)
        if self._is_new and num_logits < len(step):
            kept = [i for i, chunk in enumerate(step) if chunk.num_logits]
            return self._logits[torch.tensor(kept, dtype=torch.long, device=self._logits.device)]
        return self._logits[:num_logits]

    def _pack(self, step: Step, host: Ints) -> None:
        parts, batch, tokens = self._parts, self._batch, self._tokens
        slots, starts, counts = parts.columns(step, batch)
        tables = slots * parts.max_pages
        first = np.arange(batch, dtype=np.int32) * tokens
        if self._is_new:
            self._sections.of(host, "ids")[:] = parts.ids_at(slots, starts)
            queries = Queries(first, self._ones, starts, tables, _num_pages(starts))
        else:
            self._pack_rows(step, host, slots, starts, counts)
            queries = Queries(first, counts, starts, tables, _num_pages(starts + counts))
        work = self._cut(queries)
        self._sections.of(host, "row_parts")[:] = work.row_parts.reshape(-1)
        items = self._sections.of(host, "work")
        items[: work.items.size], items[work.items.size :] = work.items.reshape(-1), 0

    def _cut(self, queries: Queries) -> Work:
        """The work, which for few sequences is that of the step before at other positions."""
        columns = (queries.count, queries.table, queries.pages)
        key = b"".join([column.tobytes() for column in columns])
        if self._last is None or self._last[0] != key:
            at_once = self._parts.attention.num_decoding_at_once
            self._last = key, cut(queries, self._batch * self._tokens, at_once)
        items = self._last[1].items
        items[:, POSITION] = queries.position[items[:, 0] // self._tokens]
        return self._last[1]

    def _pack_rows(self, step: Step, host: Ints, slots: Ints, starts: Ints, counts: Ints) -> None:
        """Every token's place in the tables, padding's beyond a sequence's; rows of logits."""
        parts, tokens = self._parts, self._tokens
        within = np.arange(tokens, dtype=np.int32)[None, :]
        real = within < counts[:, None]
        slot = np.where(real, slots[:, None], parts.padding_slot).reshape(-1)
        position = np.where(real, starts[:, None] + within, 0).reshape(-1)
        wanted = [row for i, chunk in enumerate(step) for row in _wanted(chunk, i * tokens)]
        of = self._sections.of
        of(host, "ids")[:] = parts.ids_at(slot, position)
        of(host, "tables")[:], of(host, "positions")[:] = slot * parts.max_pages, position
        of(host, "rows")[: len(wanted)], of(host, "rows")[len(wanted) :] = wanted, 0

    def _launches(self) -> None:
        inputs, rows, of = self._inputs.device_array, self._batch * self._tokens, self._sections.of
        at_once = self._parts.attention.num_decoding_at_once
        num_items = self._batch + at_once
        lists = of(inputs, "work"), num_items, of(inputs, "row_parts")
        work = WorkList(*lists, num_queries=rows, num_parts=num_items if at_once else 0)
        ids, layers = self._parts.ids(of(inputs, "ids")), self._parts.layers
        if self._is_new:
            hidden, delta = layers.hidden(ids, partial(self._decode, work))
        else:
            attend = partial(self._verify, work, of(inputs, "tables"), of(inputs, "positions"))
            hidden, delta = layers.hidden(ids, attend)
            wanted = of(inputs, "rows")
            hidden, delta = hidden.index_select(0, wanted), delta.index_select(0, wanted)
        self._logits[:rows].copy_(layers.logits(hidden, delta))

    def _decode(self, work: WorkList, layer: Layer, qkv: Tensor) -> Tensor:
        return self._parts.attention.decode(layer, qkv, work)

    def _verify(
        self, work: WorkList, tables: Tensor, positions: Tensor, layer: Layer, qkv: Tensor
    ) -> Tensor:
        queries = self._parts.attention.write(layer, qkv, tables, positions)
        out = torch.empty_like(queries).view(len(qkv), -1)
        self._parts.attention.few(layer, queries, out, work, self._tokens)
        return out


@dataclass(frozen=True)
class _Group:
    """Work over the tokens begin to end of a mixed step; INT8 pages of prompts to read for it."""

    begin: int
    end: int
    work: Work
    is_decoding: bool
    sources: Ints | None = None


class MixedStep:
    """Steps of any chunks: the products are shared, attention is by work lists."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._inputs = Inputs(1, parts.table.device)

    def __call__(self, step: Step) -> Tensor:
        """Logits [sum of num_logits, V]."""
        groups = list(self._groups(step))
        num_tokens = sum(chunk.num_tokens for chunk in step)
        wanted = list(wanted_rows(step))
        sections = _sections(num_tokens, len(wanted), groups)
        if sections.total > self._inputs.size:
            self._inputs = Inputs(1 << sections.total.bit_length(), self._parts.table.device)
        self._pack(step, sections, groups, wanted)
        inputs = self._inputs.send(sections.total)
        ids = self._parts.ids(sections.of(inputs, "ids"))
        attend = partial(self._attend, sections, groups, inputs)
        hidden, delta = self._parts.layers.hidden(ids, attend)
        rows = sections.of(inputs, "rows")
        return self._parts.layers.logits(hidden.index_select(0, rows), delta.index_select(0, rows))

    def _groups(self, step: Step) -> Iterator[_Group]:
        """Decoding sequences first; then prompts, in INT8 as many at once as the scratch holds."""
        attention = self._parts.attention
        slots, starts, counts = self._parts.columns(step, len(step))
        tables, ends = slots * self._parts.max_pages, np.cumsum(counts)
        num = sum(1 for _ in takewhile(lambda chunk: chunk.num_tokens == 1, step))
        if num:
            first = np.arange(num, dtype=np.int32)
            pages = _num_pages(starts[:num] + 1)
            queries = Queries(first, counts[:num], starts[:num], tables[:num], pages)
            yield _Group(0, num, cut(queries, num, attention.num_decoding_at_once), True)
        for begin, end in self._fitting(step, num):
            first_row, num_rows = int(ends[begin] - counts[begin]), int(counts[begin:end].sum())
            table, sources = None, None
            if self._parts.scratch_pages:
                table, sources = _sources(step[begin:end])
            work = self._parts.prompt_work(step[begin:end], num_rows, table)
            yield _Group(first_row, first_row + num_rows, work, False, sources)

    def _fitting(self, step: Step, begin: int) -> Iterator[tuple[int, int]]:
        """Ranges of chunks whose pages fit into the scratch, if there is one."""
        used, room = 0, self._parts.scratch_pages
        for i in range(begin, len(step)):
            pages = _last_page(step[i])
            if room and used and used + pages > room:
                yield begin, i
                begin, used = i, 0
            used += pages
        if begin < len(step):
            yield begin, len(step)

    def _pack(
        self, step: Step, sections: Sections, groups: list[_Group], wanted: list[int]
    ) -> None:
        host, of = self._inputs.host_array(), sections.of
        ids, tables, positions = self._parts.places(step)
        of(host, "ids")[:], of(host, "tables")[:] = ids, tables
        of(host, "positions")[:], of(host, "rows")[:] = positions, wanted
        for i, group in enumerate(groups):
            of(host, f"work{i}")[:] = group.work.items.reshape(-1)
            of(host, f"row_parts{i}")[:] = group.work.row_parts.reshape(-1)
            if group.sources is not None:
                of(host, f"sources{i}")[:] = group.sources

    def _attend(
        self, sections: Sections, groups: list[_Group], inputs: Tensor, layer: Layer, qkv: Tensor
    ) -> Tensor:
        attention, of = self._parts.attention, sections.of
        queries = attention.write(layer, qkv, of(inputs, "tables"), of(inputs, "positions"))
        out = torch.empty_like(queries).view(len(qkv), -1)
        for i, group in enumerate(groups):
            some = slice(group.begin, group.end)
            lists = of(inputs, f"work{i}"), len(group.work.items), of(inputs, f"row_parts{i}")
            work = WorkList(*lists, group.end - group.begin, group.work.num_parts)
            if group.is_decoding:
                attention.few(layer, queries[some], out[some], work, 1)
            else:
                sources = None if group.sources is None else of(inputs, f"sources{i}")
                attention.tiles(layer, queries[some], out[some], work, sources)
        return out


def _sections(num_tokens: int, num_wanted: int, groups: list[_Group]) -> Sections:
    sizes = dict.fromkeys(("ids", "tables", "positions"), num_tokens) | {"rows": num_wanted}
    for i, group in enumerate(groups):
        sizes[f"work{i}"] = group.work.items.size
        sizes[f"row_parts{i}"] = group.work.row_parts.size
        sizes[f"sources{i}"] = 0 if group.sources is None else group.sources.size
    return Sections(**sizes)


def _sources(chunks: Step) -> tuple[Ints, Ints]:
    """Where each chunk's pages begin among the pages of all of them, and these."""
    pages = [chunk.pages[: _last_page(chunk)] for chunk in chunks]
    counts = np.array([len(part) for part in pages], np.int32)
    return np.cumsum(counts) - counts, np.concatenate([np.array(p, np.int32) for p in pages])


def _last_page(chunk: Chunk) -> int:
    """Pages that a chunk's sequence has with its new tokens."""
    return -(-(chunk.start + chunk.num_tokens) // PAGE_TOKENS)


def _num_pages(tokens: Ints) -> Ints:
    pages: Ints = -(-tokens // PAGE_TOKENS)
    return pages


def wanted_rows(step: Step) -> Iterator[int]:
    """Rows of the logits asked of a step, among those of all its tokens."""
    row = 0
    for chunk in step:
        yield from _wanted(chunk, row)
        row += chunk.num_tokens


def _wanted(chunk: Chunk, row: int) -> range:
    """Rows of the logits asked of a chunk whose first token is at `row`."""
    return range(row + chunk.num_tokens - chunk.num_logits, row + chunk.num_tokens)
