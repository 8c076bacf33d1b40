"""The seam between scheduler, runners and sampler: which tokens of which sequences run next.

Token ids live in one place, the runner's `table` on the device: the loop writes prompts there, the
sampler writes what it chose, and a runner reads its input by (slot, position). So the next step can
be launched before anybody has looked at the tokens of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

KvCache = Literal["16bit", "int8"]
"""Numbers of the KV cache: the model's own, or one byte with a scale a token and head."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence in a step: table[slot, start : start + num_tokens]."""

    slot: int
    """Row of the token table and of the sampler's state."""
    start: int
    """Tokens of the sequence that are in the cache already."""
    num_tokens: int
    """Tokens to read now."""
    num_logits: int
    """Logits wanted, of its last tokens: 0 for an inner chunk of a prompt, 1, or 1 + drafts."""
    pages: Sequence[int]
    """Page ids from the sequence's first token on, at least enough for start + num_tokens. This is
    the scheduler's own list, which grows later: read it during `run`, do not keep it."""


Step = Sequence[Chunk]
"""Chunks of different slots that run together; those of one token first, then the others."""


def wanting_all(step: Step) -> list[Chunk]:
    """The step with what each of its tokens gives: of a stage (model/stage.py) all states go on."""
    return [replace(chunk, num_logits=chunk.num_tokens) for chunk in step]


class Runner(Protocol):
    """A model over pages of KV cache: steps in, logits out."""

    page_tokens: int
    """Tokens a page."""
    num_pages: int
    """Pages of the pool. Page 0 is nobody's: padding writes there. 1 .. num_pages - 1 are used."""
    max_sequences: int
    """Slots are 0 .. max_sequences - 1; the table has one more row, for padding."""
    max_context: int
    """Tokens of the longest sequence."""
    vocab_size: int
    table: Tensor
    """int32 [max_sequences + 1, max_context + 1] on `device`: token ids of a slot by position."""
    device: torch.device
    max_step_tokens: int
    """Most tokens of all chunks of a step."""
    cache_bytes: int
    """Bytes of all pages; 0 where each sequence has a state of the model's own."""
    shares_prefixes: bool
    """Whether sequences that begin with the same tokens may share pages."""

    most_drafts: int
    """Drafts of a sequence that a step checks at little cost; 0 where it cannot."""

    def run(self, step: Step) -> Tensor:
        """Logits [sum of num_logits, V] in the order of chunks, float32 or the model's dtype.

        Called where its device is the current one (`transfer.on_device`), as an engine's thread is.
        Asynchronous on CUDA; valid until the next call. What the pages hold beyond a sequence's
        tokens is garbage, NaN included.
        """
        ...

    def close(self) -> None:
        """Free what the runner holds on the device."""
        ...
