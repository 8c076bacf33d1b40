"""Device code for penalties: one launch, one program a row, whatever the length of its history.

A program counts the ids of its history in a row of counters, then takes each counter away: who gets
one that is not 0 changes that id's score, once, and the counters are 0 again for the next step.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IN_PROMPT = tl.constexpr(1 << 30)
"""What a counter holds for any number of times in the prompt."""
BLOCK = 1024


class Penalizer:
    """engine/edits.py's `penalize` on one device."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(0, 0, dtype=torch.int32, device=device)

    def __call__(self, scores: Tensor, packed: Tensor, table: Tensor) -> None:
        """Rows of packed int32 [P, 7]: row, slot, length, where the text begins among them; the
        bits of three float32 penalties.
        """
        num_rows, vocab_size = len(packed), scores.shape[1]
        if len(self._counts) < num_rows:
            self._counts = self._counts.new_zeros(2 * num_rows, vocab_size)
        _penalize[(num_rows,)](
            scores, scores.stride(0), packed, table, table.stride(0), self._counts, vocab_size,
            BLOCK=BLOCK,
        )  # fmt: skip


@triton.jit
def _penalize(scores, scores_stride, packed, table, table_stride, counts, V, BLOCK: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    packed += p * 7
    counts += p * V
    scores += tl.load(packed).to(tl.int64) * scores_stride
    table += tl.load(packed + 1).to(tl.int64) * table_stride
    length = tl.load(packed + 2)
    begin = tl.load(packed + 3)
    repetition = tl.load(packed + 4).to(tl.float32, bitcast=True)
    presence = tl.load(packed + 5).to(tl.float32, bitcast=True)
    frequency = tl.load(packed + 6).to(tl.float32, bitcast=True)
    offsets = tl.arange(0, BLOCK)
    for first in range(0, length, BLOCK):
        at = first + offsets
        token = tl.load(table + at, mask=at < length, other=0)
        tl.atomic_add(counts + token, 1, mask=(at >= begin) & (at < length))
        tl.atomic_or(counts + token, IN_PROMPT, mask=(at < begin) & (at < length))
    tl.debug_barrier()
    for first in range(0, length, BLOCK):
        at = first + offsets
        token = tl.load(table + at, mask=at < length, other=0)
        count = tl.atomic_xchg(counts + token, 0, mask=at < length)
        mine = (at < length) & (count != 0)
        count = (count & (IN_PROMPT - 1)).to(tl.float32)
        score = tl.load(scores + token, mask=mine, other=0)
        score = tl.where(score > 0, score / repetition, score * repetition)
        score -= frequency * count + tl.where(count > 0, presence, 0.0)
        tl.store(scores + token, score, mask=mine)
