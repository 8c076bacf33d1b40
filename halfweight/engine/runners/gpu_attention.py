"""Attention over pages: the pool, and how a layer's queries, keys and values meet it.

Three forms, by what a step is (paged.py has the device code):

    decode   one new token a sequence: one kernel norms, rotates, writes and attends
    verify   a few new tokens a sequence: written first, then attended like decode's
    mixed    decoding sequences and chunks of prompts: all written first, then decode's kernel for
             the one and tiles of many queries for the other

INT8 pages are read as they are where memory is the limit. The tiles of a prompt use each key many
times, so a chunk's pages are turned to 16 bits first, of one layer at a time, into a scratch pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfweight.engine.runners.gpu_layers import Layer
from halfweight.kernels.triton.launch import device_info, launch
from halfweight.memory import engine_memory
from halfweight.memory.engine_memory import (
    DECODE_PROGRAMS,
    MIN_DOT_ROWS,
    TILE_ROWS,
    decode_counters,
    power_of_two,
)

PAGE_TOKENS = engine_memory.PAGE_TOKENS["gpu"]
"""Tokens a page, which is what a program loads at a time."""
MERGED_NUMBERS = 4096
"""Of parts, that a program loads together to merge them."""
LEAST_MERGED_AT_ONCE = 16
"""Sequences of a recorded step from which on the last program of each merges its parts; of fewer a
kernel of its own, whose programs are as many as the heads."""
DECODE_WARPS = 4
DECODE_STAGES = 3
TILE_WARPS = 8
SMALL_ROWS = 32
"""Of head_size numbers, that a program's small things in shared memory take together."""
HOPPER_SHARED_BYTES = 227 << 10
SMALLEST_SHARED_BYTES = 99 << 10
"""Shared memory of a program on the GPUs that have least, from Ampere on."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's attention."""

    heads: int
    kv_heads: int
    head_size: int
    scaling: float
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """Those of `model`."""
        config, attention = model.config, model.model.layers[0].self_attn
        return cls(
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            float(attention.scaling),
            model.model.norm.weight.dtype,
        )

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.heads // self.kv_heads

    @property
    def tile_rows(self) -> int:
        """Rows of a prompt's tile: fewer where the sums of a row are many."""
        return TILE_ROWS if self.head_size * self.dtype.itemsize <= 256 else TILE_ROWS // 2


class Pool:
    """Pages of all layers: keys, values [layers, pages, kv_heads, PAGE_TOKENS, head_size]; in INT8
    bytes q + 128 and `steps` [.., PAGE_TOKENS, 2] of key and value.
    """

    def __init__(
        self, shape: Shape, layers: int, pages: int, kv_cache: str, device: torch.device
    ) -> None:
        is_int8 = kv_cache == "int8"
        sizes = (layers, pages, shape.kv_heads, PAGE_TOKENS)
        where: dict[str, Any] = {"device": device}
        dtype = torch.uint8 if is_int8 else shape.dtype
        self.keys = torch.empty(*sizes, shape.head_size, dtype=dtype, **where)
        self.values = torch.empty_like(self.keys)
        self.steps = torch.empty(*sizes, 2, dtype=shape.dtype, **where) if is_int8 else None

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        steps = 0 if self.steps is None else self.steps.nbytes
        return self.keys.nbytes + self.values.nbytes + steps

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and steps of a layer."""
        steps = None if self.steps is None else self.steps[index]
        return self.keys[index], self.values[index], steps


@dataclass(frozen=True)
class WorkList:
    """Work on the device: items int32 [n, FIELDS] as one row of numbers, row_parts int32 [queries,
    ROW_FIELDS] likewise, and how many parts the items write at most.
    """

    items: Tensor
    num_items: int
    row_parts: Tensor
    num_queries: int
    num_parts: int


@dataclass(frozen=True)
class Scratch:
    """16-bit pages of one layer, [pages, kv_heads, PAGE_TOKENS, head_size], and a page table in
    which page n is n.
    """

    keys: Tensor
    values: Tensor
    table: Tensor

    @classmethod
    def make(cls, shape: Shape, pages: int, device: torch.device) -> Scratch:
        """Room for `pages` pages."""
        sizes = (pages, shape.kv_heads, PAGE_TOKENS, shape.head_size)
        keys = torch.empty(sizes, dtype=shape.dtype, device=device)
        table = torch.arange(pages, dtype=torch.int32, device=device)
        return cls(keys, torch.empty_like(keys), table)


class PagedAttention:
    """Attention of a model over a pool of pages; every call is launches alone."""

    is_invariant = False
    """Whether a query's bits depend on its position alone; then no token is attended unwritten."""

    def __init__(
        self,
        model: PreTrainedModel,
        pool: Pool,
        page_table: Tensor,
        max_context: int,
        scratch: Scratch | None,
    ) -> None:
        """`page_table` int32 [max_sequences + 1, max_pages]; INT8 pages need a `scratch` to read
        prompts.
        """
        self.shape, self._pool, self._scratch = Shape.of(model), pool, scratch
        self._page_table, self._device = page_table, page_table.device
        self._epsilon = float(model.model.norm.variance_epsilon)
        positions = torch.arange(max_context, device=self._device)[None]
        tables = model.model.rotary_emb(torch.empty(1, device=self._device), positions)
        half = self.shape.head_size // 2
        self._cos, self._sin = (t[0, :, :half].float().contiguous() for t in tables)
        self._is_int8 = pool.steps is not None
        self._no_parts = torch.empty(1, dtype=torch.float32, device=self._device)
        counters = decode_counters(len(page_table) - 1, self.shape.kv_heads)
        self._arrived = torch.zeros(counters, dtype=torch.int32, device=self._device)
        self._meta = {
            "HEADS": self.shape.heads,
            "KV_HEADS": self.shape.kv_heads,
            "HEAD_SIZE": self.shape.head_size,
            "PAGE": PAGE_TOKENS,
        }
        self._smallest = torch.finfo(self.shape.dtype).smallest_normal

    @property
    def num_decoding_at_once(self) -> int:
        """Work items of decode's attention that fill the GPU; 0 where sequences stay whole."""
        programs = DECODE_PROGRAMS["int8" if self._is_int8 else "16bit"]
        num_processors = device_info(self._device).num_processors
        return max(1, programs * num_processors // self.shape.kv_heads)

    @property
    def num_tiles_at_once(self) -> int:
        """Tiles of prompts that fill the GPU; 0 where they stay whole."""
        return max(1, device_info(self._device).num_processors // self.shape.kv_heads)

    @property
    def tile_queries(self) -> int:
        """Queries of a prompt's tile."""
        return max(1, self.shape.tile_rows // self.shape.group)

    def decode(self, layer: Layer, qkv: Tensor, work: WorkList) -> Tensor:
        """Attention of one new token a sequence, put into its page: [B, heads head_size]."""
        out = qkv.new_empty(len(qkv), self.shape.heads * self.shape.head_size)
        self._few(layer, qkv, out, work, self.shape.group, is_new=True)
        return out

    def write(self, layer: Layer, qkv: Tensor, tables: Tensor, positions: Tensor) -> Tensor:
        """Keys and values of tokens into their pages; the rotated queries [T, heads, head_size]."""
        tokens = len(qkv)
        queries = qkv.new_empty(tokens, self.shape.heads, self.shape.head_size)
        launch(
            "rotate_into_pages",
            (tokens, 1),
            tokens,
            (
                *(qkv, layer.q_norm, layer.k_norm, queries, *self._pool.layer(layer.index)),
                *(self._cos, self._sin, tables, positions, self._page_table, self._epsilon),
            ),
            **self._meta,
            Q_ROWS=power_of_two(self.shape.heads),
            KV_ROWS=power_of_two(self.shape.kv_heads),
            HAS_NORM=layer.q_norm is not None,
            INT8=self._is_int8,
            SMALLEST=self._smallest,
            num_warps=8,
        )
        return queries

    def few(self, layer: Layer, queries: Tensor, out: Tensor, work: WorkList, most: int) -> None:
        """Attention of items of at most `most` queries each, whose tokens are in their pages."""
        self._few(layer, queries, out, work, most * self.shape.group, is_new=False)

    def tiles(
        self, layer: Layer, queries: Tensor, out: Tensor, work: WorkList, sources: Tensor | None
    ) -> None:
        """Attention of tiles of prompts. For INT8 pages `sources` are those that they need, and a
        sequence's page table begins at the place of its first page there.
        """
        keys, values, steps = self._pool.layer(layer.index)
        table = self._page_table
        if sources is not None:
            assert self._scratch is not None
            keys, values, table = self._scratch.keys, self._scratch.values, self._scratch.table
            self._read_pages(layer, sources, keys, values)
        assert sources is not None or steps is None
        self._launch(
            *(layer, queries, out, work, (keys, values, None), table),
            ROWS=self.shape.tile_rows,
            IS_NEW=False,
            IS_LONG=True,
            num_warps=TILE_WARPS,
            num_stages=self._stages(3, self.shape.tile_rows),
        )

    def _read_pages(self, layer: Layer, sources: Tensor, keys: Tensor, values: Tensor) -> None:
        launch(
            "read_pages",
            (len(sources), self.shape.kv_heads),
            len(sources),
            (sources, *self._pool.layer(layer.index), keys, values),
            **{name: size for name, size in self._meta.items() if name != "HEADS"},
        )

    def _few(
        self, layer: Layer, qkv: Tensor, out: Tensor, work: WorkList, rows: int, *, is_new: bool
    ) -> None:
        rows = max(MIN_DOT_ROWS, power_of_two(rows))
        self._launch(
            *(layer, qkv, out, work, self._pool.layer(layer.index), self._page_table),
            ROWS=rows,
            IS_NEW=is_new,
            IS_LONG=False,
            num_warps=DECODE_WARPS,
            num_stages=min(DECODE_STAGES, self._stages(DECODE_STAGES - 1, rows)),
        )

    def _launch(
        self,
        layer: Layer,
        qkv: Tensor,
        out: Tensor,
        work: WorkList,
        pages: tuple[Tensor, Tensor, Tensor | None],
        page_table: Tensor,
        **meta: Any,
    ) -> None:
        """attend_pages, and merge_parts if there are any that it does not merge itself."""
        parts, stats = self._parts(work.num_parts, meta["ROWS"])
        is_merged = meta["IS_NEW"] and work.num_parts > 0 and len(qkv) >= LEAST_MERGED_AT_ONCE
        launch(
            "attend_pages",
            (work.num_items, self.shape.kv_heads),
            len(qkv),
            (
                *(qkv, layer.q_norm, layer.k_norm, *pages, self._cos, self._sin, page_table),
                *(work.items, out, parts, stats, work.row_parts, self._arrived),
                *(self.shape.scaling, self._epsilon),
            ),
            **self._meta,
            MERGED=self._merged_together(self.shape.group) if is_merged else 0,
            HAS_NORM=meta["IS_NEW"] and layer.q_norm is not None,
            INT8=pages[2] is not None,
            SMALLEST=self._smallest,
            ASM=device_info(self._device).is_nvidia,
            **meta,
        )
        if work.num_parts > 0 and not is_merged:
            sizes = {name: size for name, size in self._meta.items() if name != "PAGE"}
            launch(
                "merge_parts",
                (work.num_queries, self.shape.heads),
                work.num_queries,
                (parts, stats, work.row_parts, out),
                **sizes,
                ROWS=meta["ROWS"],
                BLOCK=self._merged_together(1),
            )

    def _merged_together(self, heads: int) -> int:
        """Parts that a program which merges those of so many heads loads together."""
        return max(1, MERGED_NUMBERS // (power_of_two(heads) * self.shape.head_size))

    def _parts(self, num_parts: int, rows: int) -> tuple[Tensor, Tensor]:
        if num_parts == 0:
            return self._no_parts, self._no_parts
        place = num_parts * self.shape.kv_heads * rows
        new = self._no_parts.new_empty
        return new(place, self.shape.head_size), new(place, 2)

    def _stages(self, pages_held: int, rows: int) -> int:
        """Stages of a loop over pages: 3, or fewer where shared memory has no room for the
        `pages_held` that three stages hold.

        The tensor cores of Hopper take a tile's `rows` of queries from shared memory as well.
        """
        row = self.shape.head_size * self.shape.dtype.itemsize
        shared = shared_bytes(self._device)
        rows = rows if shared >= HOPPER_SHARED_BYTES else 0
        missing = pages_held - (shared - (rows + SMALL_ROWS) * row) // (2 * PAGE_TOKENS * row)
        return max(1, 3 - max(0, missing))


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have."""
    if device.type != "cuda":
        return SMALLEST_SHARED_BYTES
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])
