"""A step's few numbers as they go from rank 0 to the others: int32, five a chunk and new pages.

Of a chunk's pages only those go that its slot did not have in the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from halfweight.engine.step import Chunk, Step

_FIELDS = 6
"""slot, start, num_tokens, num_logits, pages to keep, new pages."""


class StepWriter:
    """Steps to bytes, in their order."""

    def __init__(self) -> None:
        self._known: dict[int, list[int]] = {}

    def write(self, step: Step) -> bytes:
        """The message of a step."""
        pages: list[Sequence[int]] = []
        heads = [len(step)]
        for chunk in step:
            known = self._known.get(chunk.slot, [])
            kept = len(known) if chunk.pages[: len(known)] == known else 0
            new = chunk.pages[kept:]
            self._known[chunk.slot] = list(chunk.pages)
            heads += (chunk.slot, chunk.start, chunk.num_tokens, chunk.num_logits, kept, len(new))
            pages.append(new)
        return np.fromiter(chain(heads, *pages), np.int32).tobytes()


class StepReader:
    """Bytes to steps, in their order."""

    def __init__(self) -> None:
        self._known: dict[int, list[int]] = {}

    def read(self, message: bytes) -> list[Chunk]:
        """The step of a message."""
        numbers = np.frombuffer(message, np.int32).tolist()
        count = numbers[0]
        at = 1 + count * _FIELDS
        step = []
        for i in range(1, at, _FIELDS):
            slot, start, num_tokens, num_logits, kept, num_new = numbers[i : i + _FIELDS]
            pages = self._known.get(slot, [])[:kept] + numbers[at : at + num_new]
            at += num_new
            self._known[slot] = pages
            step.append(Chunk(slot, start, num_tokens, num_logits, pages))
        return step
