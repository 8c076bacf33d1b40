"""Llama-like models on the CPU over pages of KV cache: every token through one compiled step.

A step of the engine becomes calls of at most 32 or 64 tokens (`cpu_step.py`): decoding sequences
and pieces of prompts share each call, and a weight is read once for all its tokens. Longer pieces
would gain little: arithmetic is the limit by then. A sequence's logits are the same to the bit
whatever runs beside it and however its prompt is cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfweight.engine.runners.cpu_step import BatchStep, Pages, token_bytes
from halfweight.engine.runners.unfit import UnfitError
from halfweight.engine.step import Chunk, KvCache, Step, wanting_all
from halfweight.errors import DoesNotFitError
from halfweight.kernels.cpu.llvm_vectors import LANES
from halfweight.memory import engine_memory
from halfweight.memory.devices import processor_device
from halfweight.model.llama_like import difference, layer_linears
from halfweight.model.modules import QuantizedEmbedding, QuantizedLinear
from halfweight.model.share import shared
from halfweight.model.stage import enters, leaves

PAGE_TOKENS = engine_memory.PAGE_TOKENS["cpu"]
CACHE_SHARE = 0.5
"""Part of the free memory that pages may take."""


class CpuRunner:
    """A Runner (`engine/step.py`) for Llama-like models in INT8 on the backend 'cpu'."""

    page_tokens = PAGE_TOKENS
    shares_prefixes = True
    most_drafts = 15
    device = torch.device("cpu")

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_sequences: int,
        max_context: int,
        cache_tokens: int | None = None,
        kv_cache: KvCache = "16bit",
        shortens: bool = False,
    ) -> None:
        """Raises UnfitError for models that the kernel does not know.

        `cache_tokens` in pages by default hold all sequences, or fill half of the free memory if
        that is less. Where that is not one sequence of `max_context`, it `shortens` that, or raises
        DoesNotFitError.
        """
        reason = unsupported(model)
        if reason is not None:
            raise UnfitError(reason)
        int8 = kv_cache == "int8"
        self.max_sequences, self.max_context = max_sequences, max_context
        size = token_bytes(model, int8)
        self.num_pages = 1 + self._pages_for(cache_tokens, size, shortens=shortens)
        self.vocab_size = model.get_output_embeddings().out_features
        self.table = torch.zeros(max_sequences + 1, self.max_context + 1, dtype=torch.int32)
        self._ids = self.table.numpy()
        pages = Pages(model, self.num_pages, PAGE_TOKENS, int8)
        self.cache_bytes = pages.nbytes
        self._step: BatchStep | None = BatchStep(model, pages, self.max_context)
        self.max_step_tokens = max_sequences + self._step.max_tokens
        self._logits = torch.empty(max_sequences, self.vocab_size)

    def run(self, step: Step) -> Tensor:
        """Logits float32 [sum of num_logits, V] in chunk order, valid until the next run."""
        assert self._step is not None
        step = wanting_all(step) if self._step.leaves else step
        wanted = sum(chunk.num_logits for chunk in step)
        if wanted > len(self._logits):
            self._logits = torch.empty(wanted, self.vocab_size)
        done = 0
        for pieces in cut(step, self._step.max_tokens):
            count = sum(piece.num_logits for piece in pieces)
            ids = [self._ids[p.slot, p.start : p.start + p.num_tokens] for p in pieces]
            self._step(pieces, np.concatenate(ids), self._logits[done : done + count])
            done += count
        return self._logits[:wanted]

    def close(self) -> None:
        """Free the pages."""
        self._step = None

    def _pages_for(self, cache_tokens: int | None, size: int, *, shortens: bool) -> int:
        """Pages for the tokens asked for, or for what memory allows."""
        each = -(-self.max_context // PAGE_TOKENS)
        if cache_tokens is not None:
            return max(1, cache_tokens // PAGE_TOKENS)
        free = processor_device().free_bytes
        pages = int(free * CACHE_SHARE) // (size * PAGE_TOKENS)
        if pages < each and shortens and pages > 0:
            self.max_context = pages * PAGE_TOKENS
        elif pages < each:
            raise DoesNotFitError(
                f"a sequence of {self.max_context} tokens needs "
                f"{each * PAGE_TOKENS * size / 1e9:.2f} GB of KV cache, "
                f"half of the free memory is {free * CACHE_SHARE / 1e9:.2f} GB",
                hint="ask for a shorter context, or for an int8 KV cache",
            )
        return min(pages, self.max_sequences * each)


def unsupported(model: PreTrainedModel) -> str | None:
    """Why `model` has no compiled step, or None."""
    reason = difference(model)
    if reason is not None:
        return reason
    if shared(model) is not None:
        return "its compiled step has no sums between ranks"
    if model.model.layers[0].self_attn.head_dim % LANES:
        return f"its heads are not a multiple of {LANES} wide"
    embedding = model.get_input_embeddings()
    in_int8 = isinstance(embedding, QuantizedEmbedding) and embedding.embed_scale is None
    if not in_int8 and enters(model) is None:
        return "its embedding is not in INT8"
    linears = [linear for layer in model.model.layers for linear in layer_linears(layer)]
    head = [] if leaves(model) else [model.get_output_embeddings()]
    for linear in (*linears, *head):
        if not isinstance(linear, QuantizedLinear) or linear.backend_name != "cpu":
            return "not every linear is in INT8 on the backend 'cpu'"
    return None


def cut(step: Step, max_tokens: int) -> Iterator[list[Chunk]]:
    """The chunks of a step in pieces, in calls of at most `max_tokens`; their order is kept."""
    pieces: list[Chunk] = []
    room = max_tokens
    for chunk in step:
        begin, end = chunk.start, chunk.start + chunk.num_tokens
        while begin < end:
            count = min(room, end - begin)
            after = end - begin - count
            pieces.append(_piece(chunk, begin, count, after) if count < chunk.num_tokens else chunk)
            begin, room = begin + count, room - count
            if room == 0:
                yield pieces
                pieces, room = [], max_tokens
    if pieces:
        yield pieces


def _piece(chunk: Chunk, start: int, count: int, after: int) -> Chunk:
    """Tokens start .. start + count of a chunk, with `after` more of it behind them."""
    num_logits = min(count, max(0, chunk.num_logits - after))
    return Chunk(chunk.slot, start, count, num_logits, chunk.pages)
