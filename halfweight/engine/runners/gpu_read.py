"""A recorded step that reads prompts: few enough tokens that launching would take longer.

The step is padded to a bucket's tokens, its work list to the most items that such a step can have.
What changes from step to step is in the inputs alone, so one graph reads any prompts of a bucket,
whatever lies in the cache before them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from halfweight.engine.runners.gpu_attention import WorkList
from halfweight.engine.runners.gpu_inputs import FIELDS, ROW_FIELDS, Inputs, Ints, Sections, Work
from halfweight.engine.runners.gpu_layers import Layer
from halfweight.engine.runners.gpu_steps import Parts, Recordings, wanted_rows
from halfweight.engine.step import Step
from halfweight.memory.engine_memory import READ_TOKENS

READ_STEP = 128
"""Tokens between the buckets: padding takes less time than the launches that it saves."""
SMALL_READ_STEP = 32
"""Below READ_STEP, where padding is felt: what is new behind a shared beginning is short."""
READ_CHUNKS = 8
"""Chunks, and rows of logits, of such a step at most."""


class ReadStep:
    """A recorded step of up to READ_CHUNKS chunks with up to `tokens` tokens together, padded.

    Chunks are prompts, or decoding sequences beside them, which are prompts of one token here.
    """

    def __init__(
        self, parts: Parts, tokens: int, inputs: Inputs, logits: Tensor, recordings: Recordings
    ) -> None:
        """`inputs` and `logits` [rows, V] are shared with the other recorded steps."""
        self._parts, self._tokens = parts, tokens
        self._inputs, self._logits, self._recordings = inputs, logits, recordings
        self._sections = self.sections(parts, tokens)
        self._num_items = _most_items(parts, tokens)
        self._num_parts = min(self._num_items, 2 * parts.attention.num_tiles_at_once)

    @staticmethod
    def takes(parts: Parts, step: Step) -> bool:
        """Whether there is such a step: INT8 pages of prompts are read into a scratch first."""
        return (
            not parts.scratch_pages
            and len(step) <= READ_CHUNKS
            and sum(chunk.num_tokens for chunk in step) <= READ_TOKENS
            and sum(chunk.num_logits for chunk in step) <= READ_CHUNKS
        )

    @staticmethod
    def sections(parts: Parts, tokens: int) -> Sections:
        """What such a step takes of the inputs."""
        sizes = dict.fromkeys(("ids", "tables", "positions"), tokens) | {"rows": READ_CHUNKS}
        items = _most_items(parts, tokens)
        return Sections(**sizes, row_parts=tokens * ROW_FIELDS, work=items * FIELDS)

    def __call__(self, step: Step) -> Tensor:
        """The buffer of logits: those asked for come first, in order.

        Of a stage whose states leave it, the states of all tokens.
        """
        work = self._parts.prompt_work(step, self._tokens)
        self._pack(step, work, self._inputs.host_array())
        self._inputs.send(self._sections.total)
        self._recordings(("read", self._tokens), self._launches)
        return self._logits

    def _pack(self, step: Step, work: Work, host: Ints) -> None:
        of, parts = self._sections.of, self._parts
        ids, tables, positions = parts.places(step)
        nobody = parts.padding_slot
        _fill(of(host, "ids"), ids, nobody * parts.table.shape[1])
        _fill(of(host, "tables"), tables, nobody * parts.max_pages)
        _fill(of(host, "positions"), positions, 0)
        wanted = [] if parts.layers.leaves else list(wanted_rows(step))
        _fill(of(host, "rows"), wanted, 0)
        _fill(of(host, "work"), work.items.reshape(-1), 0)
        of(host, "row_parts")[:] = work.row_parts.reshape(-1)

    def _launches(self) -> None:
        inputs, of, layers = self._inputs.device_array, self._sections.of, self._parts.layers
        lists = of(inputs, "work"), self._num_items, of(inputs, "row_parts")
        work = WorkList(*lists, self._tokens, self._num_parts)
        attend = partial(self._attend, work, of(inputs, "tables"), of(inputs, "positions"))
        hidden, delta = layers.hidden(self._parts.ids(of(inputs, "ids")), attend)
        if layers.leaves:
            self._logits[: self._tokens].copy_(layers.logits(hidden, delta))
            return
        rows = of(inputs, "rows")
        logits = layers.logits(hidden.index_select(0, rows), delta.index_select(0, rows))
        self._logits[:READ_CHUNKS].copy_(logits)

    def _attend(
        self, work: WorkList, tables: Tensor, positions: Tensor, layer: Layer, qkv: Tensor
    ) -> Tensor:
        queries = self._parts.attention.write(layer, qkv, tables, positions)
        out = torch.empty_like(queries).view(len(qkv), -1)
        self._parts.attention.tiles(layer, queries, out, work, None)
        return out


def read_bucket(tokens: int) -> int:
    """The size of the recorded step that takes so many tokens: 32, 64, 96, 128, 256, 384, ..."""
    step = SMALL_READ_STEP if tokens <= READ_STEP else READ_STEP
    return max(1, -(-tokens // step)) * step


def read_buckets(most: int) -> list[int]:
    """All of them up to that of `most` tokens."""
    return sorted({read_bucket(tokens) for tokens in range(1, most + 1)})


def _most_items(parts: Parts, tokens: int) -> int:
    """Items of work that a step of so many tokens can have: see `cut`."""
    attention = parts.attention
    tiles = tokens // attention.tile_queries + READ_CHUNKS
    return tiles + attention.num_tiles_at_once


def _fill(section: Ints, values: Ints | list[int], padding: int) -> None:
    section[: len(values)], section[len(values) :] = values, padding
